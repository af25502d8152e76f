"""Group means of projected tokens: D * C + C parameters, the same K tokens for every DiT block."""

import torch
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import ConfigError
from geomcache.stages.train.batch import GeomTokens


class Config(Schema):
    """No options yet."""


class Compressor(nn.Module):
    """The V * G tokens in flat (view, row, column) order, in K consecutive groups; each group's mean.

    Where K does not divide N = V * G the remainder is spread evenly: group k holds the flat tokens floor(k
    N / K) to floor((k + 1) N / K) - 1, so sizes differ by at most one and no token is dropped or counts
    twice. Masked tokens are left out of the mean; a group without any token left is masked from attention.
    The mean is taken before the Linear layer: equal to after it (it is affine), at K / N of its cost.

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
        total = views * tokens_per_view
        if not 1 <= num_tokens <= total:
            raise ConfigError(
                "geom_dit_tokens (K) does not fit the tokens of this encoder",
                expected=f"1 to {total} ({views} views x {tokens_per_view} tokens)",
                found=str(num_tokens),
                fix=f"set geom_dit_tokens to {min(max(num_tokens, 1), total)}, or use a finer grid",
            )
        self.config = config
        self.num_tokens = num_tokens  # K
        self._num_blocks = num_blocks
        self.projection = nn.Linear(dim, context_dim)
        index_N, index_K = torch.arange(total), torch.arange(num_tokens)
        first_K, end_K = index_K * total // num_tokens, (index_K + 1) * total // num_tokens
        groups_KN = ((index_N >= first_K[:, None]) & (index_N < end_K[:, None])).float()
        self.register_buffer("groups_KN", groups_KN, persistent=False)

    def forward(
        self,
        tokens_BVGD: torch.Tensor,
        mask_BVG: torch.Tensor,
        context_BSC: torch.Tensor,  # noqa: ARG002 - only gated compressors look at the context
        context_mask_BS: torch.Tensor,  # noqa: ARG002
    ) -> GeomTokens:
        """Float32 tokens and bool mask -> [L, B, K, C] (one tensor seen L times, no copy) and [B, K]."""
        mask_BN = mask_BVG.flatten(1)
        # where, not multiplication: a masked token may hold NaN
        tokens_BND = torch.where(mask_BN[..., None], tokens_BVGD.flatten(1, 2), 0.0)
        count_BK = mask_BN.float() @ self.groups_KN.T
        mean_BKD = (self.groups_KN @ tokens_BND) / count_BK.clamp(min=1.0)[..., None]
        geom_BKC = self.projection(mean_BKD)
        return GeomTokens(geom_BKC.expand(self._num_blocks, *geom_BKC.shape), count_BK > 0)
