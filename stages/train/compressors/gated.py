"""Projected tokens scaled channel by channel by a gate that knows the VLM's state, then group means.

For token x of a sample whose mean VLM state over its real prompt tokens is s:

    gate = sigmoid(W_x x + W_s LN(s) + b_s)      geom_k = mean over group k of gate * (W x + b)

After the gated fusion of 3D-Mix (arXiv:2603.24393, equations 1 to 5), the best of the nine ways compared there.
The paper's gate weighs the VLM's own branch and 1 - gate the geometry: the gate here is that 1 - gate. What differs:
the VLM's branch is left out, since the DiT reads the VLM's states anyway; tokens are pooled to K; s is normalised
(the last hidden state's outlier channels would saturate the gate); all blocks share one gate, of the last layer's
state (the paper's layer-wise variant has one a layer). W_x acts on x and not on W x + b: the same functions as long
as W has rank D, for half of the parameters. Embeddings join W x + b, which is gated, not what the gate looks at.

2 D C + C^2 + 2 C parameters, and those of the embeddings (``_common``) that are switched on; the same K tokens for
every DiT block.
"""

import torch
from torch import nn
from torch.nn import functional

from geomcache.pipeline.pooling import group_means
from geomcache.stages.train.batch import GeomSizes, GeomTokens
from geomcache.stages.train.compressors._common import EmbeddingConfig, GroupedBase, PlaceEmbedding


class Config(EmbeddingConfig):
    """Embeddings only."""


class Compressor(GroupedBase):
    """Group means of gated tokens; groups and masks as in ``pool``.

    Args:
        config: which embeddings are added to the projected tokens.
        sizes: of the tokens that come in and of those that go out.

    Raises:
        ConfigError: K is larger than V * G, or not positive.
    """

    def __init__(self, config: Config, sizes: GeomSizes) -> None:
        super().__init__(config, sizes)
        self.projection = nn.Linear(sizes.dim, sizes.context_dim)
        self.token_gate = nn.Linear(sizes.dim, sizes.context_dim, bias=False)
        self.context_gate = nn.Linear(sizes.context_dim, sizes.context_dim)
        self.embedding = PlaceEmbedding(config, sizes)  # last: the other initial weights are the same with and without

    @staticmethod
    def reads_pooled(config: Config) -> bool:  # noqa: ARG004 - whatever the options
        """Group means of tokens do not say enough: the gate differs by token."""
        return False

    def forward(
        self,
        tokens_BVGD: torch.Tensor,
        mask_BVG: torch.Tensor,
        context_BSC: torch.Tensor,
        context_mask_BS: torch.Tensor,
    ) -> GeomTokens:
        """Float32 tokens and bool masks -> [L, B, K, C] (one tensor seen L times, no copy) and [B, K]."""
        tokens_BND, mask_BN = _without_masked(tokens_BVGD, mask_BVG)
        gate_BNC = self._gate(tokens_BND, context_BSC, context_mask_BS)
        projected_BNC = self.embedding.add_to_tokens(self.projection(tokens_BND))
        geom_BKC, mask_BK = group_means(gate_BNC * projected_BNC, mask_BN, self.groups_KN)
        return GeomTokens(geom_BKC.expand(self._num_blocks, *geom_BKC.shape), mask_BK)

    def gates(
        self,
        tokens_BVGD: torch.Tensor | None,
        mask_BVG: torch.Tensor | None,
        context_BSC: torch.Tensor,
        context_mask_BS: torch.Tensor,
    ) -> torch.Tensor:
        """The gates that ``forward`` multiplies with, [B, N, C] in (0, 1); NaN where there is no token."""
        assert tokens_BVGD is not None
        assert mask_BVG is not None
        tokens_BND, mask_BN = _without_masked(tokens_BVGD, mask_BVG)
        gate_BNC = self._gate(tokens_BND, context_BSC, context_mask_BS)
        return torch.where(mask_BN[..., None], gate_BNC, torch.nan)

    def _gate(self, tokens_BND: torch.Tensor, context_BSC: torch.Tensor, context_mask_BS: torch.Tensor) -> torch.Tensor:
        whole_1S = context_BSC.new_ones(1, context_BSC.shape[1])
        state_B1C, _ = group_means(context_BSC, context_mask_BS, whole_1S)
        state_B1C = self.context_gate(functional.layer_norm(state_B1C, state_B1C.shape[-1:]))
        return torch.sigmoid(self.token_gate(tokens_BND) + state_B1C)


def _without_masked(tokens_BVGD: torch.Tensor, mask_BVG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat tokens and mask; 0 where masked: such a token may hold NaN, and 0 * NaN reaches the weights' gradient."""
    mask_BN = mask_BVG.flatten(1)
    return torch.where(mask_BN[..., None], tokens_BVGD.flatten(1, 2), 0.0), mask_BN
