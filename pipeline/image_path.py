"""THE image path: upright uint8 frames -> what a geometry model sees. The cache and the live path both call
it.

Steps, in this order, all in float32 on the CPU:

1. uint8 / 255
2. ``torch.nn.functional.interpolate(mode="bilinear", antialias=True, align_corners=False)`` to ``size``: a
   separable triangle filter, widened by the scale when it shrinks, edges renormalised (PIL's BILINEAR without
   its rounding to uint8). Skipped when the size is already right.
3. (x - mean) / std per channel

Orientation is settled before (``orientation.to_upright`` at the border where frames enter); nothing is
flipped here. cv2, PIL and torch resize differently, so a change of any step is a new ``IMAGE_PATH_VERSION``
and with it a new cache id.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

IMAGE_PATH_VERSION = "1: float32/255, torch bilinear antialias, normalise"

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB
IMAGENET_STD = (0.229, 0.224, 0.225)


def prepare(
    images_BVHWC: NDArray[np.uint8],
    size: tuple[int, int],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> torch.Tensor:
    """Resize and normalise; a frame's result does not depend on the frames beside it.

    Args:
        images_BVHWC: [B, V, H, W, 3] uint8 RGB, upright; B >= 1, any memory layout.
        size: (H, W) in pixels of the result.
        mean: per channel, of images in [0, 1].
        std: per channel, of images in [0, 1].

    Returns:
        [B, V, 3, H, W] float32, contiguous, on the CPU. The input is not changed and not shared.
    """
    assert images_BVHWC.dtype == np.uint8, f"images are {images_BVHWC.dtype}, expected uint8"
    assert images_BVHWC.ndim == 5, f"images have shape {images_BVHWC.shape}, expected [B, V, H, W, 3]"
    assert len(images_BVHWC) > 0, "a batch of no images"
    assert images_BVHWC.shape[-1] == 3, f"images have shape {images_BVHWC.shape}, expected [B, V, H, W, 3]"
    B, V, H, W, C = images_BVHWC.shape
    # One copy that also makes the layout channel-first: the resize kernel is picked by layout, and its bits
    # with it.
    planes: NDArray[Any] = np.ascontiguousarray(np.moveaxis(images_BVHWC, -1, 2), dtype=np.float32)
    images_NCHW = torch.from_numpy(planes).reshape(B * V, C, H, W).div_(255.0)
    if size != (H, W):
        images_NCHW = torch.nn.functional.interpolate(
            images_NCHW, size=size, mode="bilinear", antialias=True, align_corners=False
        )
    images_NCHW.sub_(torch.tensor(mean).view(1, C, 1, 1)).div_(torch.tensor(std).view(1, C, 1, 1))
    return images_NCHW.reshape(B, V, C, *size)
