"""K learned queries attend to all V * G tokens; the same K tokens for every DiT block.

D C + C (projection) + K C (queries) + 4 C^2 + 4 C (attention) + 4 C (two LayerNorms) parameters, and those of the
embeddings (``_common``) that are switched on.
"""

import math

import torch
from pydantic import Field
from torch import nn

from geomcache.cache_schemas.errors import ConfigError
from geomcache.stages.train.batch import GeomSizes, GeomTokens
from geomcache.stages.train.compressors._common import (
    CompressorBase,
    EmbeddingConfig,
    PlaceEmbedding,
    count_tokens,
)

QUERY_STD = 0.02


class Config(EmbeddingConfig):
    """Heads of the attention, and embeddings."""

    heads: int = Field(8, gt=0)


class Compressor(CompressorBase):
    """attention(LN(queries), LN(projection(tokens) + embeddings)): one multi-head cross-attention, no residual.

    Masked tokens are left out of the attention; a sample without any token gives zeros, masked. Without embeddings
    the tokens are seen as a set: which of them stands where is only in their features.

    Args:
        config: number of heads, and which embeddings are added to the projected tokens.
        sizes: of the tokens that come in and of those that go out.

    Raises:
        ConfigError: K is larger than V * G, or not positive; C is no multiple of the heads.
    """

    def __init__(self, config: Config, sizes: GeomSizes) -> None:
        super().__init__()
        count_tokens(sizes)
        if sizes.context_dim % config.heads:
            raise ConfigError(
                "geom_compression.heads of qformer does not divide the VLM's width",
                expected=f"a divisor of {sizes.context_dim}",
                found=str(config.heads),
                fix=f"set geom_compression.heads to {math.gcd(sizes.context_dim, config.heads)}",
            )
        self.config = config
        self.num_tokens = sizes.num_tokens  # K
        self._num_blocks = sizes.num_blocks
        self.projection = nn.Linear(sizes.dim, sizes.context_dim)
        self.token_norm = nn.LayerNorm(sizes.context_dim)
        self.queries_KC = nn.Parameter(QUERY_STD * torch.randn(sizes.num_tokens, sizes.context_dim))
        self.query_norm = nn.LayerNorm(sizes.context_dim)
        self.attention = nn.MultiheadAttention(sizes.context_dim, config.heads, batch_first=True)
        self.embedding = PlaceEmbedding(config, sizes)  # last: the other initial weights are the same with and without

    @staticmethod
    def reads_pooled(config: Config) -> bool:  # noqa: ARG004 - whatever the options
        """Group means of tokens do not say enough: the attention's weights differ by token."""
        return False

    def forward(
        self,
        tokens_BVGD: torch.Tensor,
        mask_BVG: torch.Tensor,
        context_BSC: torch.Tensor,  # noqa: ARG002 - only gated compressors look at the context
        context_mask_BS: torch.Tensor,  # noqa: ARG002
    ) -> GeomTokens:
        """Float32 tokens and bool mask -> [L, B, K, C] (one tensor seen L times, no copy) and [B, K]."""
        mask_BN = mask_BVG.flatten(1)
        some_B1 = mask_BN.any(dim=1, keepdim=True)
        # before the projection: a masked token may hold NaN, and 0 * NaN reaches the gradient of the weights
        tokens_BND = torch.where(mask_BN[..., None], tokens_BVGD.flatten(1, 2), 0.0)
        tokens_BNC = self.token_norm(self.embedding.add_to_tokens(self.projection(tokens_BND)))
        queries_BKC = self.query_norm(self.queries_KC).expand(len(mask_BN), -1, -1)
        ignored_BN = ~mask_BN & some_B1  # no kernel is asked for a softmax over nothing (NaN in some): zeroed below
        geom_BKC, _ = self.attention(
            queries_BKC, tokens_BNC, tokens_BNC, key_padding_mask=ignored_BN, need_weights=False
        )
        geom_BKC = torch.where(some_B1[..., None], geom_BKC, 0.0)
        return GeomTokens(geom_BKC.expand(self._num_blocks, *geom_BKC.shape), some_B1.expand(-1, self.num_tokens))
