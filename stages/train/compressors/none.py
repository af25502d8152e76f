"""No geometry: the QwenPI baseline. K = 0, no parameters."""

import torch

from geomcache.cache_schemas.base import Schema
from geomcache.stages.train.batch import GeomSizes, GeomTokens
from geomcache.stages.train.compressors._common import CompressorBase


class Config(Schema):
    """No options."""


class Compressor(CompressorBase):
    """Returns no tokens; takes the same arguments as the others, so that nobody need ask which one it is."""

    def __init__(self, config: Config, sizes: GeomSizes) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = 0  # K
        self._num_blocks, self._context_dim = sizes.num_blocks, sizes.context_dim

    @staticmethod
    def reads_pooled(config: Config) -> bool:  # noqa: ARG004 - whatever the options
        """Group means of tokens say enough: it looks at none."""
        return True

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
