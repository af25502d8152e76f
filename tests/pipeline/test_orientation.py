"""Every orientation's name means what numpy's own turn of the upright picture gives."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.pipeline.orientation import ORIENTATIONS, to_upright

STORED: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    "upright": lambda upright: upright,
    "bottom_up": np.flipud,
    "rot180": np.fliplr,
    "upside_down": lambda upright: np.rot90(upright, 2),
    "rot90_left": lambda upright: np.rot90(upright, 1),
    "rot90_right": lambda upright: np.rot90(upright, -1),
    "transposed": lambda upright: np.swapaxes(upright, 0, 1),
    "antitransposed": lambda upright: np.swapaxes(np.rot90(upright, 2), 0, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_each_orientation_leads_back_to_the_upright_picture(orientation: str) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    stored = STORED[orientation](upright)
    np.testing.assert_array_equal(to_upright(stored, orientation, row_axis=0), upright)  # type: ignore[arg-type]
    batch = np.stack([stored, stored])
    np.testing.assert_array_equal(to_upright(batch, orientation, row_axis=1)[1], upright)  # type: ignore[arg-type]


def test_the_communitys_turn_of_the_raw_buffer_is_a_mirror_image() -> None:
    upright = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    raw = np.flipud(upright)
    np.testing.assert_array_equal(to_upright(np.rot90(raw, 2), "rot180", row_axis=0), upright)
