"""Turning stored images into true upright ones; used once, at the border where frames enter.

Convention: robosuite returns bottom-up images, so a vertical flip alone is the true picture. The community's
180 degree turn (OpenVLA, openpi, LeRobot conversions) looks upright but mirrors the world left-right.
"""

from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import ImageOrientation

# Orientation -> what makes it upright: (swap rows and columns first, then flip rows, then flip columns)
_STEPS: dict[ImageOrientation, tuple[bool, bool, bool]] = {
    "upright": (False, False, False),
    "bottom_up": (False, True, False),
    "rot180": (False, False, True),
    "upside_down": (False, True, True),
    "transposed": (True, False, False),
    "rot90_left": (True, False, True),
    "rot90_right": (True, True, False),
    "antitransposed": (True, True, True),
}
ORIENTATIONS: tuple[ImageOrientation, ...] = get_args(ImageOrientation)


def to_upright(images: NDArray[Any], orientation: ImageOrientation, *, row_axis: int) -> NDArray[Any]:
    """Return ``images`` true upright and contiguous; rows on ``row_axis``, columns on the next axis."""
    swap, flip_rows, flip_columns = _STEPS[orientation]
    if swap:
        images = np.swapaxes(images, row_axis, row_axis + 1)
    if flip_rows:
        images = np.flip(images, axis=row_axis)
    if flip_columns:
        images = np.flip(images, axis=row_axis + 1)
    return np.ascontiguousarray(images)
