"""A convolutional stem beside Qwen2.5-VL's vision transformer: what it sees is added to the merged image tokens.

Why: the tower has rotary positions only, and so has the language model; trained from scratch on thousands of frames
it hardly learns WHERE in the image something is. A stem says it outright: by the soft position of K learned features
(spatial softmax, Finn et al. 2016, "Deep Spatial Autoencoders for Visuomotor Learning", arXiv 1509.06113), by
convolutions inside each token's cell, and by an embedding of the cell's row and column.

Non-obvious:
- The image is put together again from ``pixel_values``: the packer's tensors, and so the live path, stay as they are.
- Patches come in merge order: [rows / 2, columns / 2, 2, 2] patches of [3, frames, 14, 14].
- The output layer starts small, so that a pretrained tower's tokens are nearly untouched at step 0.
"""

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from geomcache.cache_schemas.base import Schema

_CELL = 28  # pixels of a merged token's side
_STRIDE = 4  # pixels of a feature's side
_GROUPS = 8  # of the normalisation
_OUT_STD = 0.02
_HEATMAP_STD = 1.0  # so that a softmax over hundreds of places has a peak from the start: a flat one teaches nothing


class StemConfig(Schema):
    """Sizes of the stem."""

    channels: int = Field(16, gt=0, multiple_of=_GROUPS)  # of the first layer; later ones have twice as many
    keypoints: int = Field(32, ge=0)  # K soft positions a view; 0 = none


class Stem(nn.Module):
    """Images -> what is added to their merged tokens.

    Args:
        config: sizes.
        image_size: side S in pixels, a multiple of 28.
        width: C, of the tokens.
    """

    def __init__(self, config: StemConfig, *, image_size: int, width: int) -> None:
        super().__init__()
        self.cells = image_size // _CELL
        wide = 2 * config.channels
        self.features = nn.Sequential(
            *_layer(3, config.channels, kernel=2 * _STRIDE, stride=_STRIDE),
            *_layer(config.channels, wide, kernel=3, stride=1),
            *_layer(wide, wide, kernel=3, stride=1),
        )
        side = _CELL // _STRIDE
        self.cell = nn.Conv2d(wide, 2 * wide, side, stride=side, groups=wide)  # two maps of weights a channel
        self.cell_out = nn.Linear(2 * wide, width)
        self.heatmaps = nn.Conv2d(wide, config.keypoints, 1) if config.keypoints else None
        self.keypoint_out = nn.Linear(2 * config.keypoints, width) if config.keypoints else None
        self.row_embedding = nn.Parameter(_OUT_STD * torch.randn(self.cells, 1, width))
        self.column_embedding = nn.Parameter(_OUT_STD * torch.randn(1, self.cells, width))
        self.register_buffer("_axis", torch.linspace(-1.0, 1.0, image_size // _STRIDE), persistent=False)
        if self.heatmaps is not None:
            nn.init.normal_(self.heatmaps.weight, std=_HEATMAP_STD)
        for out in (self.cell_out, self.keypoint_out):
            if out is not None:
                nn.init.normal_(out.weight, std=_OUT_STD)
                nn.init.zeros_(out.bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``pixel_values`` of N images (see ``PolicyBatch``) -> [N * tokens per image, C], in the tokens' order."""
        features_NCHW = self.features(self._images(pixel_values))
        cells_NIJC = self.cell_out(self.cell(features_NCHW).permute(0, 2, 3, 1))
        tokens_NIJC = cells_NIJC + self.row_embedding + self.column_embedding
        if self.heatmaps is not None and self.keypoint_out is not None:
            points_NK2 = _soft_positions(self.heatmaps(features_NCHW), self._axis)
            tokens_NIJC = tokens_NIJC + self.keypoint_out(points_NK2.flatten(1))[:, None, None]
        tokens_MC: torch.Tensor = tokens_NIJC.flatten(0, 2)
        return tokens_MC

    _axis: torch.Tensor

    def _images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, S, S]; of the tower's equal frames of a still image, the first."""
        patch = _CELL // 2
        blocks = pixel_values.view(-1, self.cells, self.cells, 2, 2, 3, 2, patch, patch)[..., 0, :, :]
        # N, I, J, i, j, 3, y, x -> N, 3, I, i, y, J, j, x
        return blocks.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, self.cells * _CELL, self.cells * _CELL)


def _layer(inputs: int, outputs: int, *, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=(kernel - stride + 1) // 2)
    return convolution, nn.GroupNorm(_GROUPS, outputs), nn.SiLU()


def _soft_positions(heatmaps_NKHW: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    """[N, K, 2]: the mean (x, y) in -1..1 under each map's softmax."""
    weights_NKHW = functional.softmax(heatmaps_NKHW.flatten(2), dim=-1).view_as(heatmaps_NKHW)
    x_NK = (weights_NKHW.sum(dim=2) * axis).sum(dim=-1)
    y_NK = (weights_NKHW.sum(dim=3) * axis).sum(dim=-1)
    return torch.stack([x_NK, y_NK], dim=-1)
