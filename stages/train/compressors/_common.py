"""What compressors share: the check of K, the interface's defaults, and embeddings of a token's view and place."""

import torch
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import ConfigError
from geomcache.pipeline.pooling import groups_matrix
from geomcache.stages.train.batch import GeomSizes

EMBEDDING_STD = 0.02  # small beside projected standardised tokens, not 0: each entry acts from the first step on


class EmbeddingConfig(Schema):
    """Options of every compressor with geometry; without them a token's place is only in its features."""

    view_embedding: bool = False  # a learned vector for each view: V C parameters
    position_embedding: bool = False  # one for each row and one for each column of the grid: (rows + columns) C

    @property
    def any_embedding(self) -> bool:
        """A token's place counts, so its mean with its neighbours does not say enough."""
        return self.view_embedding or self.position_embedding


class PlaceEmbedding(nn.Module):
    """view_v + row_i + column_j for the projected token at row i, column j of view v; nothing where switched off.

    Factorised: (V + rows + columns) C parameters where a vector for each of the N tokens would have N C.

    Args:
        config: which of them there are; without any, the module has no parameters and changes no number.
        sizes: V, the grid and C.
    """

    view_VC: nn.Parameter | None
    row_hC: nn.Parameter | None
    column_wC: nn.Parameter | None

    def __init__(self, config: EmbeddingConfig, sizes: GeomSizes) -> None:
        super().__init__()
        self.shape = sizes.views, *sizes.grid, sizes.context_dim
        views, rows, columns, context_dim = self.shape
        self.view_VC = _table(views, context_dim) if config.view_embedding else None
        self.row_hC = _table(rows, context_dim) if config.position_embedding else None
        self.column_wC = _table(columns, context_dim) if config.position_embedding else None

    def add_to_tokens(self, tokens_BNC: torch.Tensor) -> torch.Tensor:
        """To each token its own."""
        table_NC = self._table_NC()
        return tokens_BNC if table_NC is None else tokens_BNC + table_NC

    def add_to_means(self, means_LBKC: torch.Tensor, mask_BN: torch.Tensor, groups_KN: torch.Tensor) -> torch.Tensor:
        """To each group's mean (of each block) that of its unmasked tokens: as if added before the mean was taken."""
        table_NC = self._table_NC()
        if table_NC is None:
            return means_LBKC
        members_BKN = groups_KN * mask_BN[:, None]  # K N numbers a sample, where a table for each sample has N C
        share_BKN = members_BKN / members_BKN.sum(dim=-1, keepdim=True).clamp(min=1.0)
        return means_LBKC + share_BKN @ table_NC

    def _table_NC(self) -> torch.Tensor | None:
        parts = []
        if self.view_VC is not None:
            parts.append(self.view_VC[:, None, None])
        if self.row_hC is not None and self.column_wC is not None:
            parts.append(self.row_hC[:, None] + self.column_wC)
        return sum(parts[1:], parts[0]).expand(self.shape).flatten(0, 2) if parts else None


class CompressorBase(nn.Module):
    """What a compressor may leave as it is."""

    def gates(
        self,
        tokens_BVGD: torch.Tensor | None,  # noqa: ARG002 - the arguments of ``forward``
        mask_BVG: torch.Tensor | None,  # noqa: ARG002
        context_BSC: torch.Tensor,  # noqa: ARG002
        context_mask_BS: torch.Tensor,  # noqa: ARG002
    ) -> torch.Tensor | None:
        """The gate of every token and channel, [B, N, C] in (0, 1), NaN where there is no token; None: no gates."""
        return None


class GroupedBase(CompressorBase):
    """A compressor of K consecutive groups of tokens (``pooling``).

    Args:
        config: kept as ``config``.
        sizes: of the tokens that come in and of those that go out.

    Raises:
        ConfigError: K is larger than V * G, or not positive.
    """

    groups_KN: torch.Tensor

    def __init__(self, config: EmbeddingConfig, sizes: GeomSizes) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = sizes.num_tokens  # K
        self._num_blocks = sizes.num_blocks
        self.register_buffer("groups_KN", groups_matrix(count_tokens(sizes), sizes.num_tokens), persistent=False)


def count_tokens(sizes: GeomSizes) -> int:
    """N = V * G; ``ConfigError`` when K tokens cannot be made of them."""
    total = sizes.views * sizes.tokens_per_view
    if not 1 <= sizes.num_tokens <= total:
        raise ConfigError(
            "geom_dit_tokens (K) does not fit the tokens of this encoder",
            expected=f"1 to {total} ({sizes.views} views x {sizes.tokens_per_view} tokens)",
            found=str(sizes.num_tokens),
            fix=f"set geom_dit_tokens to {min(max(sizes.num_tokens, 1), total)}, or use a finer grid",
        )
    return total


def _table(entries: int, width: int) -> nn.Parameter:
    return nn.Parameter(EMBEDDING_STD * torch.randn(entries, width))
