"""Group means of projected tokens, the same K tokens for every DiT block.

D C + C parameters, and those of the embeddings (``_common``) that are switched on.
"""

import torch
from torch import nn

from geomcache.pipeline.pooling import group_means
from geomcache.stages.train.batch import GeomSizes, GeomTokens
from geomcache.stages.train.compressors._common import EmbeddingConfig, GroupedBase, PlaceEmbedding


class Config(EmbeddingConfig):
    """Embeddings only."""


class Compressor(GroupedBase):
    """The V * G tokens in flat (view, row, column) order, in K consecutive groups (``pooling``); each group's mean.

    Masked tokens are left out of the mean; a group without any token left is masked from attention. The mean
    is taken before the Linear layer: equal to after it (it is affine), at K / N of its cost.
    Embeddings tell the DiT which group a mean is of, not what stood where in the group: a mean forgets that.

    Args:
        config: which embeddings are added to the projected tokens.
        sizes: of the tokens that come in and of those that go out.

    Raises:
        ConfigError: K is larger than V * G, or not positive.
    """

    def __init__(self, config: Config, sizes: GeomSizes) -> None:
        super().__init__(config, sizes)
        self.projection = nn.Linear(sizes.dim, sizes.context_dim)
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
        """Float32 tokens and bool mask -> [L, B, K, C] (one tensor seen L times, no copy) and [B, K]."""
        mask_BN = mask_BVG.flatten(1)
        mean_BKD, mask_BK = group_means(tokens_BVGD.flatten(1, 2), mask_BN, self.groups_KN)
        geom_BKC = self.embedding.add_to_means(self.projection(mean_BKD), mask_BN, self.groups_KN)
        return GeomTokens(geom_BKC.expand(self._num_blocks, *geom_BKC.shape), mask_BK)
