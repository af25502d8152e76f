"""Group means of projected tokens: D * C + C parameters, the same K tokens for every DiT block."""

from typing import ClassVar

import torch
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.pipeline.pooling import group_means, groups_matrix
from geomcache.stages.train.batch import GeomTokens
from geomcache.stages.train.compressors._common import count_tokens


class Config(Schema):
    """No options yet."""


class Compressor(nn.Module):
    """The V * G tokens in flat (view, row, column) order, in K consecutive groups (``pooling``); each group's mean.

    Masked tokens are left out of the mean; a group without any token left is masked from attention. The mean
    is taken before the Linear layer: equal to after it (it is affine), at K / N of its cost.

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

    # True when a group mean of tokens may be taken before it (it is affine in the tokens), so that a cache may
    # keep K pooled tokens instead of V * G
    reads_pooled: ClassVar[bool] = True

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
        self.register_buffer("groups_KN", groups_matrix(total, num_tokens), persistent=False)

    def forward(
        self,
        tokens_BVGD: torch.Tensor,
        mask_BVG: torch.Tensor,
        context_BSC: torch.Tensor,  # noqa: ARG002 - only gated compressors look at the context
        context_mask_BS: torch.Tensor,  # noqa: ARG002
    ) -> GeomTokens:
        """Float32 tokens and bool mask -> [L, B, K, C] (one tensor seen L times, no copy) and [B, K]."""
        mean_BKD, mask_BK = group_means(tokens_BVGD.flatten(1, 2), mask_BVG.flatten(1), self.groups_KN)
        geom_BKC = self.projection(mean_BKD)
        return GeomTokens(geom_BKC.expand(self._num_blocks, *geom_BKC.shape), mask_BK)
