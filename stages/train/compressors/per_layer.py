"""Group means projected by a Linear layer of each block's own.

L (D C + C) parameters, and those of the embeddings (``_common``) that are switched on: one table for all blocks,
since a token's place is the same for each, and each reads it through key and value weights of its own.
"""

import torch
from torch import nn

from geomcache.pipeline.pooling import group_means
from geomcache.stages.train.batch import GeomSizes, GeomTokens
from geomcache.stages.train.compressors._common import EmbeddingConfig, GroupedBase, PlaceEmbedding


class Config(EmbeddingConfig):
    """Embeddings only."""


class Compressor(GroupedBase):
    """As ``pool``, with one projection per cross-attending DiT block (blocks without one have none to waste).

    Args:
        config: which embeddings are added to the projected tokens.
        sizes: of the tokens that come in and of those that go out.

    Raises:
        ConfigError: K is larger than V * G, or not positive.
    """

    def __init__(self, config: Config, sizes: GeomSizes) -> None:
        super().__init__(config, sizes)
        self.projections = nn.ModuleList(nn.Linear(sizes.dim, sizes.context_dim) for _ in range(sizes.num_blocks))
        self.embedding = PlaceEmbedding(config, sizes)  # last: the other initial weights are the same with and without

    @staticmethod
    def reads_pooled(config: Config) -> bool:
        """Group means of tokens say enough: it is affine in them, unless each has an embedding of its own place."""
        return not config.any_embedding

    def forward(
        self,
        tokens_BVGD: torch.Tensor,
        mask_BVG: torch.Tensor,
        context_BSC: torch.Tensor,  # noqa: ARG002 - only gated compressors look at the context
        context_mask_BS: torch.Tensor,  # noqa: ARG002
    ) -> GeomTokens:
        """Float32 tokens and bool mask -> [L, B, K, C] and [B, K]."""
        mask_BN = mask_BVG.flatten(1)
        mean_BKD, mask_BK = group_means(tokens_BVGD.flatten(1, 2), mask_BN, self.groups_KN)
        geom_LBKC = torch.stack([projection(mean_BKD) for projection in self.projections])
        return GeomTokens(self.embedding.add_to_means(geom_LBKC, mask_BN, self.groups_KN), mask_BK)
