"""Turning stored images into true upright ones; used once, at the border where frames enter.

Convention: robosuite returns bottom-up images, so a vertical flip alone is the true picture. The community's
180 degree turn (OpenVLA, openpi, LeRobot conversions) looks upright but mirrors the world left-right.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import ImageOrientation


def to_upright(images: NDArray[Any], orientation: ImageOrientation, *, row_axis: int) -> NDArray[Any]:
    """Return ``images`` true upright and contiguous; rows on ``row_axis``, columns on the next axis."""
    if orientation == "bottom_up":
        images = np.flip(images, axis=row_axis)
    elif orientation == "rot180":
        images = np.flip(images, axis=row_axis + 1)
    return np.ascontiguousarray(images)
