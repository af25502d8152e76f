"""No geometry: the QwenPI baseline. K = 0, no parameters."""

from typing import ClassVar

import torch
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.stages.train.batch import GeomTokens


class Config(Schema):
    """No options."""


class Compressor(nn.Module):
    """Returns no tokens; takes the same arguments as the others, so that nobody need ask which one it is."""

    # True when a group mean of tokens may be taken before it: it looks at none
    reads_pooled: ClassVar[bool] = True

    def __init__(
        self,
        config: Config,
        *,
        views: int,  # noqa: ARG002 - the constructor every compressor has
        tokens_per_view: int,  # noqa: ARG002
        dim: int,  # noqa: ARG002
        context_dim: int,
        num_blocks: int,
        num_tokens: int,  # noqa: ARG002
    ) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = 0  # K
        self._num_blocks, self._context_dim = num_blocks, context_dim

    def forward(
        self,
        tokens_BVGD: torch.Tensor | None,  # noqa: ARG002
        mask_BVG: torch.Tensor | None,  # noqa: ARG002
        context_BSC: torch.Tensor,
        context_mask_BS: torch.Tensor,  # noqa: ARG002
    ) -> GeomTokens:
        """[L, B, 0, C] and [B, 0]."""
        batch = context_BSC.shape[0]
        return GeomTokens(
            context_BSC.new_zeros(self._num_blocks, batch, 0, self._context_dim, dtype=torch.float32),
            torch.zeros(batch, 0, dtype=torch.bool, device=context_BSC.device),
        )
