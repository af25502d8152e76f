"""Orientations are found from motion in pictures drawn by a ray caster that shares no code with the project."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.pipeline.orientation_track import (
    LARGEST_ERROR,
    Track,
    gripper_sign_agrees,
    static_camera_errors,
    wrist_camera_errors,
)
from tests.pipeline.test_orientation import STORED

SIDE, TABLE = 48, 0.9  # pixels, metres
# Beyond the table, looking back and down at the robot: right is +y, down and forward as below.
STATIC_44 = np.array([[0.0, 0.6, -0.8, 0.7], [1.0, 0.0, 0.0, 0.0], [0.0, -0.8, -0.6, 1.6], [0.0, 0.0, 0.0, 1.0]])
WRIST_44 = np.array([[0.0, -1.0, 0.0, 0.05], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, -0.1], [0.0, 0.0, 0.0, 1.0]])
HAND_SPHERES = [(0.0, 0.03, 0.0, 0.02), (0.0, -0.03, 0.0, 0.02), *((0.0, 0.0, -d, 0.04) for d in (0.1, 0.17, 0.24))]


def intrinsics(height: int, width: int) -> NDArray[np.float64]:
    return np.array([[0.8 * height, 0.0, width / 2], [0.0, 0.8 * height, height / 2], [0.0, 0.0, 1.0]])


def moves(steps: int, *, sideways: float = 0.2, turning: float = 0.5) -> list[tuple[float, float, float, float]]:
    """(x, y, z, yaw) over the table, out and back in all directions."""
    return [
        (0.12 * np.sin(0.5 * i), sideways * np.sin(0.31 * i), 1.15 + 0.1 * np.cos(0.4 * i), turning * np.sin(0.2 * i))
        for i in range(steps)
    ]


def state(x: float, y: float, z: float, yaw: float) -> list[float]:
    """A hand that points down and is turned by yaw is turned by pi about an axis in the table's plane."""
    return [x, y, z, np.pi * np.cos(yaw / 2), np.pi * np.sin(yaw / 2), 0.0, 0.04, -0.04]


def hand_44(x: float, y: float, z: float, yaw: float) -> NDArray[np.float64]:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0.0, x], [s, -c, 0.0, y], [0.0, 0.0, -1.0, z], [0.0, 0.0, 0.0, 1.0]])


def draw(camera_44: NDArray[Any], hand: NDArray[Any], height: int, width: int) -> NDArray[np.uint8]:
    """[H, W, 3]: a patterned table and the hand's grey spheres, one ray a pixel."""
    k = intrinsics(height, width)
    rows, columns = np.indices((height, width))
    rays = np.stack([(columns + 0.5 - k[0, 2]) / k[0, 0], (rows + 0.5 - k[1, 2]) / k[1, 1], np.ones((height, width))])
    directions = np.einsum("ij,jhw->hwi", camera_44[:3, :3], rays)
    origin = camera_44[:3, 3]
    far = (TABLE - origin[2]) / np.minimum(directions[..., 2], -1e-3)
    x, y = (origin[i] + far * directions[..., i] for i in (0, 1))
    pattern = np.sin(23 * x + 4 * np.sin(9 * y)) + np.sin(31 * y - 11 * x) + np.sin(13 * y + 5)
    picture = np.stack([128 + 35 * pattern, 110 + 30 * pattern, 90 + 25 * pattern], axis=-1)
    for *centre, radius in HAND_SPHERES:
        to_origin = origin - (hand[:3, :3] @ centre + hand[:3, 3])
        a, b = (directions**2).sum(-1), 2 * directions @ to_origin
        root = b**2 - 4 * a * (to_origin @ to_origin - radius**2)
        near = (-b - np.sqrt(np.maximum(root, 0))) / (2 * a)
        picture[(root > 0) & (near > 0.0) & (near < far)] = 235 * (radius > 0.03) + 20
    return np.asarray(np.clip(picture, 0, 255), dtype=np.uint8)


def track(
    camera: str, path: list[tuple[float, float, float, float]], orientation: ImageOrientation, width: int = SIDE
) -> Track:
    hands = [hand_44(*at) for at in path]
    cameras = [STATIC_44 if camera == "static" else hand @ WRIST_44 for hand in hands]
    upright = [draw(c, hand, SIDE, width) for c, hand in zip(cameras, hands, strict=True)]
    return Track(
        np.stack([STORED[orientation](picture) for picture in upright]),
        np.array([state(*at) for at in path], dtype=np.float32),
        intrinsics(SIDE, width),
        STATIC_44 if camera == "static" else WRIST_44,
        TABLE,
    )


ERRORS = {"static": static_camera_errors, "wrist": wrist_camera_errors}


def ranked(errors: dict[ImageOrientation, float]) -> list[tuple[float, ImageOrientation]]:
    return sorted((error, orientation) for orientation, error in errors.items())


@pytest.mark.parametrize("camera", ERRORS)
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_found(camera: str, orientation: ImageOrientation) -> None:
    (error, best), (next_error, _), *rest = ranked(ERRORS[camera]([track(camera, moves(30), orientation)]))
    assert best == orientation
    assert error < LARGEST_ERROR
    assert next_error > 1.5 * error
    assert len(rest) == 6


@pytest.mark.parametrize("camera", ERRORS)
def test_images_that_are_not_square_cannot_be_turned_by_a_quarter(camera: str) -> None:
    errors = ERRORS[camera]([track(camera, moves(30), "rot180", width=64)])
    assert set(errors) == {"upright", "bottom_up", "rot180", "upside_down"}
    assert ranked(errors)[0][1] == "rot180"


def test_motion_in_the_mirror_plane_decides_nothing_until_another_episode_does() -> None:
    in_plane = [track("static", moves(30, sideways=0.0, turning=0.0), "rot180")]
    (error, one), (next_error, other), *_ = ranked(static_camera_errors(in_plane))
    assert {one, other} == {"upright", "rot180"}
    assert next_error == pytest.approx(error, rel=0.05)
    (error, best), (next_error, _), *_ = ranked(static_camera_errors([*in_plane, track("static", moves(30), "rot180")]))
    assert best == "rot180"
    assert next_error > 1.5 * error


@pytest.mark.parametrize("camera", ERRORS)
def test_a_hand_that_stands_still_explains_nothing(camera: str) -> None:
    still = track(camera, [(0.0, 0.1, 1.1, 0.0)] * 5, "upright")
    assert set(ERRORS[camera]([still]).values()) == {1.0}


@pytest.mark.parametrize("camera", ERRORS)
def test_states_in_the_robots_frame_are_no_finding(camera: str) -> None:
    right = track(camera, moves(30), "upright")
    in_base = right.states_TS - np.array([-0.66, 0.0, 0.912, 0.0, 0.0, 0.0, 0.0, 0.0])
    shifted = Track(right.images_THWC, in_base, right.intrinsics_33, right.camera_44, TABLE)
    assert ranked(ERRORS[camera]([shifted]))[0][0] > LARGEST_ERROR


def test_finer_images_give_the_same_answer() -> None:
    coarse = track("static", moves(30), "bottom_up")
    fine = Track(
        coarse.images_THWC.repeat(3, axis=1).repeat(3, axis=2),
        coarse.states_TS,
        np.diag([3.0, 3.0, 1.0]) @ coarse.intrinsics_33,
        STATIC_44,
        TABLE,
    )
    assert static_camera_errors([fine]) == pytest.approx(static_camera_errors([coarse]), abs=1e-4)


def episode(closing: float, opening: float, follows: bool = True) -> tuple[NDArray[Any], NDArray[Any]]:
    """40 rows: open, closed from row 12, open again from row 27; the fingers need three rows."""
    actions, states = np.zeros((40, 7)), np.zeros((40, 8))
    closed = (np.arange(40) >= 12) & (np.arange(40) < 27)
    actions[:, 6] = np.where(closed, closing, opening)
    finger = 0.04
    for t in range(40):
        states[t, 6:] = finger, -finger
        wanted = 0.01 if closed[t] == follows else 0.04
        finger += np.clip(wanted - finger, -0.01, 0.01)
    return actions, states


@pytest.mark.parametrize(
    ("closing", "opening", "score"),
    [(1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 0.0, 1.0), (0.0, 1.0, -1.0)],
)
def test_a_swapped_gripper_sign_is_seen(closing: float, opening: float, score: float) -> None:
    found = gripper_sign_agrees(*episode(closing, opening))
    assert (found.score, found.switches) == (score, 2)


def test_without_switches_nothing_is_said_about_the_gripper() -> None:
    actions, states = episode(1.0, -1.0)
    for nothing_seen in ((actions[:10], states[:10]), (actions, np.zeros_like(states)), (actions[:13], states[:13])):
        found = gripper_sign_agrees(*nothing_seen)
        assert (found.score, found.switches) == (0.0, 0)
