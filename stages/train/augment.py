"""Image augmentation in training: small random shifts and brightness, of what the VLM sees.

Random shifts are DrQ's (Kostrikov et al. 2020, arXiv 2004.13649): the edge is repeated and a window of the same size is
cut out, each view on its own. Cached geometry tokens come from the frame as it was. The draws of a sample are keyed on
(seed, step, its number in the step), so that a continued run sees the same images as one that was not stopped.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from geomcache.cache_schemas.base import Schema


class Augmentation(Schema):
    """How much; 0 = not at all."""

    shift: int = Field(0, ge=0)  # largest shift up, down, left and right, in pixels of the pack's images
    brightness: float = Field(0.0, ge=0, lt=1)  # pixel values are multiplied by 1 +- up to this

    def apply(self, images_BVHWC: NDArray[np.uint8], *, seed: int, step: int, first: int) -> NDArray[np.uint8]:
        """[B, V, H, W, 3] of the same shape; sample i is number ``first + i`` of the step."""
        if not self.shift and not self.brightness:
            return images_BVHWC
        generators = (np.random.default_rng((seed, step, first + i)) for i in range(len(images_BVHWC)))
        return np.stack([self._sample(one, rng) for one, rng in zip(images_BVHWC, generators, strict=True)])

    def _sample(self, images_VHWC: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        views, height, width, _ = images_VHWC.shape
        down_V, right_V = rng.integers(-self.shift, self.shift, (2, views), endpoint=True)
        factor_V = np.asarray(1.0 + self.brightness * rng.uniform(-1.0, 1.0, views))
        rows_VH = np.clip(np.arange(height) - down_V[:, None], 0, height - 1)
        columns_VW = np.clip(np.arange(width) - right_V[:, None], 0, width - 1)
        moved = images_VHWC[np.arange(views)[:, None, None], rows_VH[:, :, None], columns_VW[:, None, :]]
        if not self.brightness:
            return np.asarray(moved)
        levels_VL = np.clip(np.rint(np.arange(256) * factor_V[:, None]), 0, 255).astype(np.uint8)
        return np.asarray(levels_VL[np.arange(views)[:, None, None, None], moved])
