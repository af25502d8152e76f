"""Projected tokens scaled channel by channel by a gate that knows the VLM's state, then group means.

For token x of a sample whose mean VLM state over its real prompt tokens is s:

    gate = sigmoid(W_x x + W_s LN(s) + b_s)      geom_k = mean over group k of gate * (W x + b)

After the gated fusion of 3D-Mix (arXiv:2603.24393, equations 1 to 5), the best of the nine ways compared there.
What differs: the VLM's own branch (1 - gate) W_s s is left out, since the DiT reads the VLM's states anyway;
tokens are pooled to K; s is normalised (the last hidden state's outlier channels would saturate the gate); all
blocks share one gate. W_x acts on x and not on W x + b: the same functions as long as W has rank D, for half
of the parameters.

2 D C + C^2 + 2 C parameters; the same K tokens for every DiT block.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from geomcache.cache_schemas.base import Schema
from geomcache.pipeline.pooling import group_means, groups_matrix
from geomcache.stages.train.batch import GeomTokens
from geomcache.stages.train.compressors._common import count_tokens


class Config(Schema):
    """No options."""


class Compressor(nn.Module):
    """Group means of gated tokens; groups and masks as in ``pool``.

    Args:
        config: no options.
        views: V.
        tokens_per_view: G.
        dim: D.
        context_dim: C, the width of the VLM's hidden states.
        num_blocks: L, the number of cross-attending DiT blocks.
        num_tokens: K.

    Raises:
        ConfigError: K is larger than V * G, or not positive.
    """

    # True when a group mean of tokens may be taken before it; the gate differs by token
    reads_pooled: ClassVar[bool] = False

    groups_KN: torch.Tensor

    def __init__(
        self,
        config: Config,
        *,
        views: int,
        tokens_per_view: int,
        dim: int,
        context_dim: int,
        num_blocks: int,
        num_tokens: int,
    ) -> None:
        super().__init__()
        total = count_tokens(views, tokens_per_view, num_tokens)
        self.config = config
        self.num_tokens = num_tokens  # K
        self._num_blocks = num_blocks
        self.projection = nn.Linear(dim, context_dim)
        self.token_gate = nn.Linear(dim, context_dim, bias=False)
        self.context_gate = nn.Linear(context_dim, context_dim)
        self.register_buffer("groups_KN", groups_matrix(total, num_tokens), persistent=False)

    def forward(
        self,
        tokens_BVGD: torch.Tensor,
        mask_BVG: torch.Tensor,
        context_BSC: torch.Tensor,
        context_mask_BS: torch.Tensor,
    ) -> GeomTokens:
        """Float32 tokens and bool masks -> [L, B, K, C] (one tensor seen L times, no copy) and [B, K]."""
        mask_BN = mask_BVG.flatten(1)
        # before the projections: a masked token may hold NaN, and 0 * NaN reaches the gradient of the weights
        tokens_BND = torch.where(mask_BN[..., None], tokens_BVGD.flatten(1, 2), 0.0)
        whole_1S = context_BSC.new_ones(1, context_BSC.shape[1])
        state_B1C, _ = group_means(context_BSC, context_mask_BS, whole_1S)
        state_B1C = self.context_gate(functional.layer_norm(state_B1C, state_B1C.shape[-1:]))
        gate_BNC = torch.sigmoid(self.token_gate(tokens_BND) + state_B1C)
        geom_BKC, mask_BK = group_means(gate_BNC * self.projection(tokens_BND), mask_BN, self.groups_KN)
        return GeomTokens(geom_BKC.expand(self._num_blocks, *geom_BKC.shape), mask_BK)
