from collections.abc import Callable

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.encoders.oracle_pointmap import Config, Encoder, cell_pixels
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch

Contracts = Callable[..., Contract]
Frames = Callable[..., FrameBatch]


def test_hand_computed_points(contract: Contracts) -> None:
    """4x4 pixels, f = 2, centre (2, 2), 2x2 cells: centres at 1 and 3, pixels 1 and 3, whose own centres are
    1.5, 3.5.

    The camera stands at (1, 0, 2) and looks straight down: x_base = x_cam, y_base = -y_cam, z_base = 2 -
    z_cam.
    """
    depth = np.full((1, 1, 4, 4), 9.0, dtype=np.float32)  # what no token may see
    depth[0, 0, 1, 1], depth[0, 0, 1, 3], depth[0, 0, 3, 1], depth[0, 0, 3, 3] = 1.0, 2.0, 0.5, 1.0
    extrinsics = np.array([[1, 0, 0, 1], [0, -1, 0, 0], [0, 0, -1, 2], [0, 0, 0, 1]], dtype=np.float64)
    frames = FrameBatch(
        np.zeros((1, 1, 4, 4, 3), dtype=np.uint8),
        depth,
        np.array([[2, 0, 2], [0, 2, 2], [0, 0, 1]], dtype=np.float64)[None, None],
        extrinsics[None, None],
    )
    encoder = Encoder(Config(grid=(2, 2), batch_size=1), contract(("top",), 4))
    assert encoder.encode(frames)[0, 0].tolist() == [
        [1 - 0.25, 0.25, 1.0],  # (1.5 - 2) / 2 * 1 = -0.25
        [1 + 1.5, 0.5, 0.0],  # u 3.5: 0.75 * 2; v 1.5: -0.25 * 2
        [1 - 0.125, -0.375, 1.5],
        [1 + 0.75, -0.75, 1.0],
    ]


def test_equals_an_independent_formula(contract: Contracts, frames: Frames) -> None:
    """A homogeneous matrix product per pixel, with a skewed camera, against the encoder's closed form."""
    batch = frames(3)
    assert batch.intrinsics_BV33 is not None
    assert batch.extrinsics_BV44 is not None
    assert batch.depth_BVHW is not None
    batch.intrinsics_BV33[..., 0, 1] = 3.0
    tokens = encode_padded(Encoder(Config(grid=(5, 7), batch_size=2), contract()), batch).numpy()
    for b, view, row, column in np.ndindex(3, 2, 5, 7):
        v = min(range(64), key=lambda p: (abs(p + 0.5 - (row + 0.5) * 64 / 5), -p))
        u = min(range(64), key=lambda p: (abs(p + 0.5 - (column + 0.5) * 64 / 7), -p))
        ray = np.linalg.solve(batch.intrinsics_BV33[b, view], [u + 0.5, v + 0.5, 1.0])
        point = batch.extrinsics_BV44[b, view] @ [*(ray * batch.depth_BVHW[b, view, v, u]), 1.0]
        np.testing.assert_allclose(tokens[b, view, row * 7 + column], point[:3], rtol=1e-6, atol=1e-6)


def test_world_point_projects_back_to_its_pixel(contract: Contracts, frames: Frames) -> None:
    batch = frames(2)
    assert batch.intrinsics_BV33 is not None
    assert batch.extrinsics_BV44 is not None
    tokens = Encoder(Config(grid=(16, 16), batch_size=2), contract()).encode(batch).double().numpy()
    camera = (
        np.linalg.inv(batch.extrinsics_BV44)[:, :, None]
        @ np.concatenate([tokens, np.ones((*tokens.shape[:3], 1))], axis=-1)[..., None]
    )
    pixel = (batch.intrinsics_BV33[:, :, None] @ camera[..., :3, :])[..., 0]
    uv = (pixel[..., :2] / pixel[..., 2:]).reshape(2, 2, 16, 16, 2)
    centres = np.arange(16) * 4 + 2.5  # cell centre 4i + 2 lies between two pixels; the later one is taken
    np.testing.assert_allclose(uv[..., 0], np.broadcast_to(centres, (2, 2, 16, 16)), atol=1e-4)
    np.testing.assert_allclose(uv[..., 1], np.broadcast_to(centres[:, None], (2, 2, 16, 16)), atol=1e-4)


@pytest.mark.parametrize(("cells", "pixels"), [(1, 1), (16, 256), (18, 252), (5, 64), (7, 64), (3, 3), (14, 255)])
def test_cell_pixels_are_nearest_to_the_centres(cells: int, pixels: int) -> None:
    found = cell_pixels(cells, pixels)
    centres = (np.arange(cells) + 0.5) * pixels / cells
    distance = np.abs(np.arange(pixels)[None] + 0.5 - centres[:, None])
    np.testing.assert_allclose(distance[np.arange(cells), found], distance.min(axis=1), atol=1e-9)
    assert (np.diff(found) > 0).all()


def test_takes_points_never_averages_across_an_edge(contract: Contracts, frames: Frames) -> None:
    batch = frames(1, views=1)
    assert batch.depth_BVHW is not None
    batch.depth_BVHW[:] = 1.0
    batch.depth_BVHW[..., 31:] = 3.0  # an edge through the middle of the image
    assert batch.extrinsics_BV44 is not None
    batch.extrinsics_BV44[:] = np.eye(4)
    tokens = Encoder(Config(grid=(4, 5), batch_size=1), contract(("one",))).encode(batch)
    assert set(tokens[..., 2].flatten().tolist()) == {1.0, 3.0}


def test_spec_names_metres_and_an_exact_codec(contract: Contracts) -> None:
    encoder = Encoder(Config(), contract())
    assert encoder.spec.row_shape == (2, 256, 3)
    assert (encoder.spec.tap, encoder.spec.codec, encoder.spec.image_size) == ("xyz", "fp32", (64, 64))
    assert encoder.weights_digest() == "none"
    assert encoder.license == "none (no weights)"
    assert encoder.needs == {"depth", "cameras"}


def test_refuses_a_contract_without_depth(contract: Contracts) -> None:
    with pytest.raises(InputError, match="needs metric depth") as caught:
        Encoder(Config(), contract(depth=False))
    assert "geomcache demos" in caught.value.fix


def test_refuses_views_of_differing_size_and_too_fine_a_grid(contract: Contracts) -> None:
    cameras = (*contract(("a",), 64).cameras, *contract(("b",), 32).cameras)
    with pytest.raises(InputError, match="a 64x64, b 32x32"):
        Encoder(Config(), contract().model_copy(update={"cameras": cameras}))
    with pytest.raises(InputError, match="finer than the image"):
        Encoder(Config(grid=(16, 65)), contract())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_pixel_without_depth_is_named(contract: Contracts, frames: Frames, value: float) -> None:
    batch = frames(2)
    assert batch.depth_BVHW is not None
    batch.depth_BVHW[1, 1, 2, 6] = value
    with pytest.raises(InputError, match=r"batch row 1, camera wrist, pixel \(6, 2\)"):
        Encoder(Config(batch_size=2), contract()).encode(batch)
    batch.depth_BVHW[1, 1, 2, 6] = 1.0
    batch.depth_BVHW[1, 1, 0, 0] = value  # a pixel that no token looks at
    assert torch.isfinite(Encoder(Config(batch_size=2), contract()).encode(batch)).all()
