"""Finding how a data set stores its images when it has neither depth nor simulator states.

All eight flips and turns of a picture look plausible to a program, and the community's (rot180) even to a person.
What tells them apart is motion: the states say where the hand went, the camera's matrices say where that must show.

- A static camera (``static_camera_errors``): pixels change where the hand was and where it is now. For pairs of rows
  between which the hand moved, the change |I_b - I_a| is correlated with blobs along the projected hand.
  Error = 1 - correlation.
- The wrist camera (``wrist_camera_errors``): the hand stands still in it and the table moves. Row b is warped into
  row a by the plane of the table under the camera's known motion; pixels near the hand are left out.
  Error = what the warp leaves of the change, |warp(I_b) - I_a| / |I_b - I_a|.

In both, an error of 1 says that the orientation explains nothing. Measured on one episode of each of ten tasks in all
five kinds of scene, down to 32 pixels, JPEG and MP4: the right orientation 0.23-0.60, the next one at least 1.75 times
that. With states in another frame than the simulator's world the best was above 0.75, hence LARGEST_ERROR.
Pure numpy; matrices and the table's height come from the simulator (pipeline/sim/agentview_camera.py).

Non-obvious:
- One straight motion cannot tell an image from its mirror image at that line; the two errors are then close and are
  no decision. More episodes mend that, best of several tasks.
- The state's position is the point between the fingertips, its rotation the hand's; both belong to one rigid body.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.pipeline.camera_geometry import inverse_pose
from geomcache.pipeline.orientation import ORIENTATIONS, to_upright

LARGEST_ERROR = 0.7  # an orientation with a larger one explains too little to be a finding

_SMALLEST_SIDE = 48  # pixels left after averaging; finer images cost time and decide no better
_HAND_STEP = 0.03  # metres between the rows of a pair, for a static camera
_HAND_POINTS = (0.0, -0.05, -0.10, -0.15, -0.20, -0.25)  # metres along the hand's axis, from the fingertips to the arm
_HAND_RADIUS = 0.05  # metres
_MOST_CHANGE = 6.0  # times the picture's mean; a few glaring pixels say no more than many plain ones
_WRIST_STEP = 0.08  # camera motion between the rows of a pair, as a part of its height above the surface
_WRIST_HAND = 0.35  # of the image's width: what is closer to the fingertips is the hand or what it holds
_OPENING_CHANGED = 0.002  # metres; a smaller change of the opening answers no command
_OPENING_ROWS = 10  # half a second, after which the fingers have answered


@dataclass(frozen=True)
class Track:
    """One view of one episode as a data set stores it, with the camera of the upright image."""

    images_THWC: NDArray[np.uint8]  # [T, H, W, 3] as stored
    states_TS: NDArray[np.floating[Any]]  # [T, 8] see Contract.state_layout; positions in the simulator's world
    intrinsics_33: NDArray[np.float64]  # pixels at H x W
    camera_44: NDArray[np.float64]  # metres, OpenCV axes; static: camera-to-world, wrist: camera-to-hand
    surface_height: float  # world z of the table or floor, metres; used for the wrist camera only


@dataclass(frozen=True)
class GripperAgreement:
    """Whether the fingers do what the commands say."""

    score: float  # 1: every switch is answered as commanded; -1: always the other way round; 0: no switches
    switches: int  # changes of the command that the fingers answered by a motion


def static_camera_errors(tracks: Sequence[Track]) -> dict[ImageOrientation, float]:
    """Error of each orientation for a camera that does not move, 0 to 2; the right one has the lowest.

    Quarter turns are tried for square images only. All tracks are of one data set and so of one image size.
    """
    # of seen * predicted, seen squared, predicted squared
    sums = {orientation: np.zeros(3) for orientation in _possible(tracks)}
    for track in tracks:
        images_THW, intrinsics_33 = _small_grey(track)
        hand_T44 = hand_poses(track.states_TS)
        for a, b in _pairs(hand_T44[:, :3, 3], np.full(len(hand_T44), _HAND_STEP)):
            change_HW = np.abs(images_THW[b] - images_THW[a])
            predicted = _evened(_hand_blobs(hand_T44[[a, b]], track.camera_44, intrinsics_33, change_HW.shape))
            for orientation, total in sums.items():
                seen = _evened(to_upright(change_HW, orientation, row_axis=0))
                total += (seen * predicted).sum(), (seen * seen).sum(), (predicted * predicted).sum()
    return {
        orientation: float(1.0 - product / np.sqrt(seen * predicted)) if seen * predicted else 1.0
        for orientation, (product, seen, predicted) in sums.items()
    }


def wrist_camera_errors(tracks: Sequence[Track]) -> dict[ImageOrientation, float]:
    """Error of each orientation for the camera in the hand, from 0; the right one has the lowest.

    Quarter turns are tried for square images only. All tracks are of one data set and so of one image size.
    """
    sums = {orientation: np.zeros(2) for orientation in _possible(tracks)}  # change left by the warp, change seen
    for track in tracks:
        images_THW, intrinsics_33 = _small_grey(track)
        height, width = images_THW.shape[1:]
        camera_T44 = hand_poses(track.states_TS) @ track.camera_44
        u_HW, v_HW = _pixel_centres(height, width)
        fingertips_2 = _project(inverse_pose(track.camera_44)[:3, 3], intrinsics_33)[0]
        off_hand_HW = np.hypot(u_HW - fingertips_2[0], v_HW - fingertips_2[1]) > _WRIST_HAND * width
        steps_T = _WRIST_STEP * np.abs(camera_T44[:, 2, 3] - track.surface_height)
        for a, b in _pairs(camera_T44[:, :3, 3], steps_T):
            where_HW2, seen_HW = _same_surface_point(
                camera_T44[a], camera_T44[b], intrinsics_33, track.surface_height, height, width
            )
            used_HW = seen_HW & off_hand_HW
            for orientation, total in sums.items():
                image_a, image_b = to_upright(images_THW[[a, b]], orientation, row_axis=1)
                left = _sampled(image_b, where_HW2[used_HW]) - image_a[used_HW]
                total += np.abs(left).sum(), np.abs(image_b - image_a)[used_HW].sum()
    return {o: float(left / change) if change else 1.0 for o, (left, change) in sums.items()}


def gripper_sign_agrees(actions_TA: NDArray[Any], states_TS: NDArray[Any]) -> GripperAgreement:
    """Do the fingers close after the higher gripper command and open after the lower one?

    This is the simulator's sign (-1 opens, +1 closes); commands are split at the middle of their range, so 0 and 1 do
    as well. Row t's state is before its action.
    """
    closes_T = actions_TA[:, 6] > (actions_TA[:, 6].min() + actions_TA[:, 6].max()) / 2.0
    opening_T = np.abs(states_TS[:, 6:8]).sum(axis=1)
    switches = np.flatnonzero(closes_T[1:] != closes_T[:-1]) + 1
    ends = np.minimum(np.append(switches[1:], len(closes_T) - 1), switches + _OPENING_ROWS)
    opened = opening_T[ends] - opening_T[switches]
    answered = np.abs(opened) > _OPENING_CHANGED
    agree = np.where(closes_T[switches], opened < 0.0, opened > 0.0)[answered]
    return GripperAgreement(float((2.0 * agree - 1.0).mean()) if len(agree) else 0.0, len(agree))


def _possible(tracks: Sequence[Track]) -> list[ImageOrientation]:
    """The orientations that keep the images' height and width."""
    shapes = {track.images_THWC.shape[1:3] for track in tracks}
    assert len(shapes) == 1, "tracks of one image size, at least one"
    (shape,) = shapes
    return [o for o in ORIENTATIONS if to_upright(np.empty(shape, dtype=bool), o, row_axis=0).shape == shape]


def _small_grey(track: Track) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """([T, h, w] grey images averaged over whole blocks of pixels, their intrinsics)."""
    steps, height, width = track.images_THWC.shape[:3]
    most = max(1, min(height, width) // _SMALLEST_SIDE)
    # Only a block that divides both sides leaves the picture's middle in the middle of every flip and turn.
    n = max(n for n in range(1, most + 1) if height % n == 0 and width % n == 0)
    blocks = track.images_THWC.reshape(steps, height // n, n, width // n, n, 3)
    return blocks.mean(axis=(2, 4, 5), dtype=np.float32), np.diag([1.0 / n, 1.0 / n, 1.0]) @ track.intrinsics_33


def hand_poses(states_TS: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """[T, 4, 4] hand-to-world: the states' position and, by Rodrigues' formula, their axis-angle."""
    states = states_TS.astype(np.float64)
    angle_T = np.linalg.norm(states[:, 3:6], axis=1)
    x, y, z = (states[:, 3:6] / np.maximum(angle_T, 1e-12)[:, None]).T
    zero = np.zeros_like(x)
    cross_T33 = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(-1, 3, 3)
    poses_T44 = np.tile(np.eye(4), (len(states), 1, 1))
    sine, versine = np.sin(angle_T)[:, None, None], (1.0 - np.cos(angle_T))[:, None, None]
    poses_T44[:, :3, :3] += sine * cross_T33 + versine * cross_T33 @ cross_T33
    poses_T44[:, :3, 3] = states[:, :3]
    return poses_T44


def _pairs(positions_T3: NDArray[np.float64], steps_T: NDArray[np.float64]) -> Iterator[tuple[int, int]]:
    """Rows (a, b): b is the first after a at which the position has moved by a's step; b is the next pair's a."""
    a = 0
    for b in range(1, len(positions_T3)):
        if np.linalg.norm(positions_T3[b] - positions_T3[a]) >= steps_T[a]:
            yield a, b
            a = b


def _pixel_centres(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    u_HW, v_HW = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return u_HW, v_HW


def _project(
    points_N3: NDArray[np.float64], intrinsics_33: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """([..., 2] pixels, [...] depth) of points [..., 3] in the camera's axes."""
    pixels = np.asarray(points_N3 @ intrinsics_33.T)
    return pixels[..., :2] / pixels[..., 2:], pixels[..., 2]


def _hand_blobs(
    hand_N44: NDArray[np.float64],
    camera_44: NDArray[np.float64],
    intrinsics_33: NDArray[np.float64],
    shape: tuple[int, ...],
) -> NDArray[np.float64]:
    """[H, W] in 0..1, round blobs of the hand's size where a static camera sees it in poses [N, 4, 4]."""
    u_HW, v_HW = _pixel_centres(*shape)
    axis_P4 = np.array([[0.0, 0.0, along, 1.0] for along in _HAND_POINTS])
    points_Q3 = (axis_P4 @ (inverse_pose(camera_44) @ hand_N44).transpose(0, 2, 1)).reshape(-1, 4)[:, :3]
    blobs_HW = np.zeros(shape)
    for (u, v), depth in zip(*_project(points_Q3, intrinsics_33), strict=True):
        radius = _HAND_RADIUS * intrinsics_33[0, 0] / depth
        if depth > _HAND_RADIUS:  # else it is behind the camera
            blobs_HW = np.maximum(blobs_HW, np.exp(-((u_HW - u) ** 2 + (v_HW - v) ** 2) / (2.0 * radius**2)))
    return blobs_HW


def _evened(image_HW: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Mean 0, and scaled so that every pair of rows counts alike, however much its pixels change."""
    if not image_HW.any():
        return image_HW
    scaled_HW = np.minimum(image_HW / image_HW.mean(), _MOST_CHANGE)
    return np.asarray(scaled_HW - scaled_HW.mean())


def _same_surface_point(
    from_44: NDArray[np.float64],
    to_44: NDArray[np.float64],
    intrinsics_33: NDArray[np.float64],
    surface_height: float,
    height: int,
    width: int,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Where camera ``to`` sees the surface point that each pixel of camera ``from`` sees.

    Returns ([H, W, 2] pixels, [H, W] whether both see it); poses are camera-to-world.
    """
    u_HW, v_HW = _pixel_centres(height, width)
    rays_HW3 = np.stack([u_HW, v_HW, np.ones_like(u_HW)], axis=-1) @ (from_44[:3, :3] @ np.linalg.inv(intrinsics_33)).T
    with np.errstate(divide="ignore", invalid="ignore"):  # a ray along the surface never meets it
        depth_HW = (surface_height - from_44[2, 3]) / rays_HW3[..., 2]
        points_HW3 = from_44[:3, 3] + rays_HW3 * depth_HW[..., None]
        there_HW2, there_depth_HW = _project((points_HW3 - to_44[:3, 3]) @ to_44[:3, :3], intrinsics_33)
        inside_HW = ((there_HW2 >= 0.5) & (there_HW2 <= np.array([width, height]) - 0.5)).all(axis=-1)
    return there_HW2, inside_HW & (depth_HW > 0.0) & (there_depth_HW > 0.0)


def _sampled(image_HW: NDArray[np.float32], pixels_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] values between pixel centres, bilinear."""
    at_N2 = pixels_N2[:, ::-1] - 0.5  # (row, column)
    first_N2 = np.minimum(at_N2.astype(np.int64), np.array(image_HW.shape) - 2)
    (down, right), (i, j) = (at_N2 - first_N2).T, first_N2.T
    above = image_HW[i, j] * (1.0 - right) + image_HW[i, j + 1] * right
    below = image_HW[i + 1, j] * (1.0 - right) + image_HW[i + 1, j + 1] * right
    return np.asarray(above * (1.0 - down) + below * down)
