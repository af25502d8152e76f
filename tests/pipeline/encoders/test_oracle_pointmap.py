from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.encoders.oracle_pointmap import Config, Encoder, cell_pixels
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.tokens import token_recipe

Contracts = Callable[..., Contract]
Frames = Callable[..., FrameBatch]

# As caches had it before there were other channels.
POINTS_DIGEST = "64272d4f28526495616fc86ce2f9cd85f43ab413a4f7b8c4c7ba4d2b0133087d"


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


ALL = ("xyz", "normals", "visibility", "confidence")


def plane_depth(normal: tuple[float, float, float], distance: float, size: int, focal: float) -> NDArray[np.float64]:
    """Depth [size, size] of the plane normal . p = distance, seen by a centred camera."""
    y, x = (np.mgrid[:size, :size] + 0.5 - size / 2) / focal
    return np.asarray(distance / (normal[0] * x + normal[1] * y + normal[2]), dtype=np.float64)


def scene(depths: list[NDArray[np.float64]], focal: float, poses: list[NDArray[np.float64]]) -> FrameBatch:
    """One time step of centred square cameras."""
    size = len(depths[0])
    K = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    return FrameBatch(
        np.zeros((1, len(depths), size, size, 3), np.uint8),
        np.stack(depths)[None].astype(np.float32),
        np.tile(K, (1, len(depths), 1, 1)),
        np.stack(poses)[None],
    )


def told(frames: FrameBatch, contract: Contracts, grid: tuple[int, int]) -> dict[str, NDArray[np.float32]]:
    """Each channel of one time step, [V, rows, columns] or [V, rows, columns, 3]."""
    cameras = tuple(f"camera{view}" for view in range(frames.images_BVHWC.shape[1]))
    encoder = Encoder(Config(grid=grid, batch_size=1, channels=ALL), contract(cameras, frames.images_BVHWC.shape[2]))
    tokens = encoder.encode(frames)[0].numpy().reshape(len(cameras), *grid, 8)
    return {"xyz": tokens[..., :3], "normals": tokens[..., 3:6], "visibility": tokens[..., 6], "sure": tokens[..., 7]}


def moved(x: float = 0.0, z: float = 0.0) -> NDArray[np.float64]:
    pose = np.eye(4)
    pose[:3, 3] = x, 0.0, z
    return pose


def test_a_tilted_plane_gives_its_normal_in_the_base_frame_towards_the_camera(contract: Contracts) -> None:
    normal = np.array([0.48, -0.36, -0.8])  # of unit length; z < 0: towards the camera
    pose = np.array([[0, 0, 1, 0.3], [-1, 0, 0, 0], [0, -1, 0, 1.2], [0, 0, 0, 1.0]])
    depth = plane_depth((0.48, -0.36, -0.8), -1.1, 24, 30.0)
    found = told(scene([depth], 30.0, [pose]), contract, (24, 24))  # border pixels too
    np.testing.assert_allclose(found["normals"], np.broadcast_to(pose[:3, :3] @ normal, (1, 24, 24, 3)), atol=2e-5)
    assert found["sure"].min() == 1.0
    sparse = told(scene([depth], 30.0, [pose]), contract, (5, 3))
    assert sparse["sure"].min() == 1.0  # slanted by 37 degrees: its depth varies by far more than the tolerance
    assert np.ptp(depth[:5, :8]) > 0.1


def test_normals_at_an_edge_and_at_a_crease_are_those_of_one_of_the_two_surfaces(contract: Contracts) -> None:
    size, focal = 16, 20.0
    left, right = (0.6, 0.0, -0.8), (0.0, -0.28, -0.96)
    # At -0.9 m the planes meet in the image, and one pixel in the corner has no two neighbours on its own; at -1.6 m
    # there is a step.
    for distance, corner in ((-0.9, [[15, 3]]), (-1.6, [])):
        a, b = plane_depth(left, -0.8, size, focal), plane_depth(right, distance, size, focal)
        which = np.arange(size)[None, :].repeat(size, 0) < 8 if distance == -1.6 else a > b
        assert 40 < which.sum() < 216
        found = told(scene([np.where(which, a, b)], focal, [np.eye(4)]), contract, (size, size))
        expected = np.where(which[..., None], left, right)
        wrong = np.abs(found["normals"][0] - expected).max(axis=-1) > 2e-5
        assert np.argwhere(wrong).tolist() == corner


def test_an_occluder_hides_a_point_from_the_other_view(contract: Contracts) -> None:
    """f = 4, 8 pixels, a wall at 2 m, the second camera 1 m to the right: pixel u of one is u - 2 of the other."""
    wall, with_post = np.full((8, 8), 2.0), np.full((8, 8), 2.0)
    with_post[:, 3] = 1.0
    frames = scene([wall, with_post], 4.0, [moved(), moved(1.0)])
    seen = told(frames, contract, (8, 8))["visibility"]
    assert seen[0].tolist() == [[0, 0, 1, 1, 1, 0, 1, 1]] * 8  # 0, 1: outside; 5: behind the post
    assert seen[1].tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]] * 8  # the first camera sees wall where the post stands
    three = scene([wall, with_post, wall], 4.0, [moved(), moved(1.0), moved()])
    assert told(three, contract, (8, 8))["visibility"][0].tolist() == [[0.5, 0.5, 1, 1, 1, 0.5, 1, 1]] * 8


def test_cameras_turned_about_their_axis_see_what_a_plain_projection_says(contract: Contracts) -> None:
    """Both look straight down on the floor, turned by 30 and 75 degrees: which points land in the other's picture."""
    poses = []
    for degrees, x, y in ((30.0, 0.0, 0.0), (75.0, 0.9, 0.4)):
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        pose = np.eye(4)
        pose[:3, :3] = [[cos, sin, 0], [sin, -cos, 0], [0, 0, -1]]
        pose[:3, :3] = pose[:3, :3] @ [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # no longer its own transpose
        pose[:3, 3] = x, y, 2.0
        poses.append(pose)
    floor = np.full((32, 32), 2.0)
    found = told(scene([floor, floor], 16.0, poses), contract, (8, 8))
    for view, other in ((0, 1), (1, 0)):
        points, visible = found["xyz"][view].reshape(-1, 3), found["visibility"][view].ravel()
        for point, seen in zip(points, visible, strict=True):
            camera = np.linalg.inv(poses[other]) @ [*point, 1.0]
            u, v = 16.0 * camera[:2] / camera[2] + 16.0
            assert seen == (0 <= u < 32 and 0 <= v < 32)
            assert abs(float(point[2])) < 1e-5
        assert 0 < found["visibility"][view].sum() < 64


def test_nobody_else_sees_a_point_alone_behind_the_camera_or_from_the_back(contract: Contracts) -> None:
    wall, turned_round = np.full((8, 8), 1.0), np.diag([-1.0, 1.0, -1.0, 1.0])
    assert not told(scene([wall], 4.0, [moved()]), contract, (4, 4))["visibility"].any()
    assert not told(scene([wall, wall], 4.0, [moved(), turned_round]), contract, (4, 4))["visibility"].any()
    opposite = turned_round.copy()
    opposite[2, 3] = 2.005  # a plate of 5 mm between the cameras, less than the tolerance
    assert not told(scene([wall, wall], 4.0, [moved(), opposite]), contract, (4, 4))["visibility"].any()
    assert told(scene([wall, wall], 4.0, [moved(), moved()]), contract, (4, 4))["visibility"].all()


def test_an_edge_lowers_confidence_by_the_share_of_its_pixels(contract: Contracts) -> None:
    depth = np.full((8, 8), 1.0)
    depth[:, 0] = 1.02  # a step of twice the tolerance, one column of the left cells
    depth[0, 5:7] = np.nan
    depth[:, 7] = 1.005  # within the tolerance
    sure = told(scene([depth], 9.0, [np.eye(4)]), contract, (2, 2))["sure"]
    assert sure[0].tolist() == [[0.75, 14 / 16], [0.75, 1.0]]


def test_a_pixel_without_neighbours_has_no_normal(contract: Contracts) -> None:
    depth = np.full((8, 8), np.nan)
    depth[2::4, 2::4] = 1.0  # only what is picked
    found = told(scene([depth, depth], 9.0, [np.eye(4)] * 2), contract, (2, 2))
    assert not found["normals"].any()
    assert not found["visibility"].any()
    assert not found["sure"].any()


def test_all_channels_keep_their_bits_in_any_slot_and_the_points_are_those_alone(
    contract: Contracts, frames: Frames
) -> None:
    batch = frames(7)
    encoder = Encoder(Config(grid=(5, 7), batch_size=3, channels=ALL), contract())
    tokens = encode_padded(encoder, batch)
    alone = torch.cat([encode_padded(encoder, batch[i : i + 1]) for i in range(7)])
    assert torch.equal(alone, tokens)
    assert torch.equal(encode_padded(encoder, batch[np.array([6, 1, 5, 0])]), tokens[[6, 1, 5, 0]])
    points = Encoder(Config(grid=(5, 7), batch_size=3), contract())
    assert torch.equal(encode_padded(points, batch), tokens[..., :3])
    some = Encoder(Config(grid=(5, 7), batch_size=3, channels=("xyz", "confidence")), contract())
    assert (some.spec.tap, some.spec.dim) == ("xyz.confidence", 4)
    assert torch.equal(encode_padded(some, batch), tokens[..., [0, 1, 2, 7]])
    assert (encoder.spec.tap, encoder.spec.dim) == ("xyz.normals.visibility.confidence", 8)


def test_channels_change_the_cache_id_and_points_alone_keep_the_one_they_had(contract: Contracts) -> None:
    def digest(config: Config) -> str:
        return token_recipe(Encoder(config, contract()), contract(), "pack").fingerprint.encoder_config

    assert digest(Config()) == POINTS_DIGEST
    assert len({digest(Config(channels=ALL[:n])) for n in (1, 2, 3, 4)}) == 4


@pytest.mark.parametrize("channels", [(), ("normals",), ("xyz", "xyz"), ("xyz", "confidence", "normals")])
def test_channels_out_of_order_are_refused(channels: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="begin with xyz"):
        Config.model_validate({"channels": channels})


def test_images_too_small_for_normals_are_refused(contract: Contracts) -> None:
    assert Encoder(Config(grid=(2, 2)), contract(size=3)).spec.dim == 3
    with pytest.raises(InputError, match="too small for surface normals"):
        Encoder(Config(grid=(2, 2), channels=("xyz", "normals")), contract(size=3))
