"""Group means projected by a Linear layer of each block's own: L * (D * C + C) parameters."""

from typing import ClassVar

import torch
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.pipeline.pooling import group_means, groups_matrix
from geomcache.stages.train.batch import GeomTokens
from geomcache.stages.train.compressors._common import count_tokens


class Config(Schema):
    """No options."""


class Compressor(nn.Module):
    """As ``pool``, with one projection per cross-attending DiT block (blocks without one have none to waste).

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
        self.projections = nn.ModuleList(nn.Linear(dim, context_dim) for _ in range(num_blocks))
        self.register_buffer("groups_KN", groups_matrix(total, num_tokens), persistent=False)

    def forward(
        self,
        tokens_BVGD: torch.Tensor,
        mask_BVG: torch.Tensor,
        context_BSC: torch.Tensor,  # noqa: ARG002 - only gated compressors look at the context
        context_mask_BS: torch.Tensor,  # noqa: ARG002
    ) -> GeomTokens:
        """Float32 tokens and bool mask -> [L, B, K, C] and [B, K]."""
        mean_BKD, mask_BK = group_means(tokens_BVGD.flatten(1, 2), mask_BVG.flatten(1), self.groups_KN)
        return GeomTokens(torch.stack([projection(mean_BKD) for projection in self.projections]), mask_BK)
