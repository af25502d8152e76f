"""Pictures and states that a data set stores in another way are named; one replay serves all of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from geomcache.stages.evaluate.check import frames as frames_module
from geomcache.stages.evaluate.check.finding import Finding
from geomcache.stages.evaluate.check.frames import check_frames
from geomcache.stages.evaluate.check.opened import OpenedRun
from geomcache.stages.evaluate.check.scene import Replayed, Scenes
from geomcache.stages.evaluate.check.states import check_states
from tests.stages.evaluate.check.conftest import SIDE, scene_of, the_episode

pytestmark = [pytest.mark.sim, pytest.mark.slow]
Array = NDArray[Any]


def test_the_intact_pack_is_what_the_simulator_shows(replayed: Replayed) -> None:
    frames, stored, live = check_frames(replayed, None)
    assert frames.passed
    np.testing.assert_array_equal(stored[0], live[0])
    assert check_states(replayed, replayed.episode.states_TS).passed


@pytest.mark.parametrize(
    ("fault", "images"),
    [
        ("180° turn", lambda x: np.rot90(x, 2, axes=(2, 3))),
        ("horizontal mirror", lambda x: x[:, :, :, ::-1]),
        ("vertical flip", lambda x: x[:, :, ::-1]),
        ("stored rot90_left", lambda x: np.rot90(x, 1, axes=(2, 3))),
        ("BGR", lambda x: x[..., ::-1]),
        ("swapped cameras", lambda x: x[:, ::-1]),
        ("horizontal mirror", lambda x: np.stack([x[:, 0], x[:, 1, :, ::-1]], axis=1)),  # of the wrist camera only
        ("exposure", lambda x: np.clip(x + 3.0, 0, 255).astype(np.uint8)),
        ("exposure", lambda x: np.clip(x * 1.2 + 8.0, 0, 255).astype(np.uint8)),
        ("exposure", lambda x: (255.0 * (x / 255.0) ** 0.7).round().astype(np.uint8)),
    ],
)
def test_changed_pictures_are_named(
    fault: str, images: Callable[[Array], Array], plant: Callable[..., OpenedRun], replayed: Replayed
) -> None:
    found, _, _ = check_frames(replace(replayed, episode=the_episode(plant(images=images))), None)
    assert_named(found, fault)


def test_pictures_rendered_at_another_size_are_named(
    plant: Callable[..., OpenedRun],
    replayed: Replayed,
    scenes: Scenes,
    intact: OpenedRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames_module, "_RENDER_SIDES", (64, 128))  # rendering is what takes time
    scene = scene_of(scenes, the_episode(intact))
    scene.start()
    large = [scene.render(name, 128, 128) for name in scene.env.contract.camera_names]
    small = np.stack([np.asarray(Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for x in large])
    changed = replace(
        replayed,
        episode=the_episode(plant(images=lambda images: np.broadcast_to(small, images.shape))),
        observed={0: replayed.observed[0]},
    )
    found, _, _ = check_frames(changed, scene)
    assert_named(found, "resize method")
    assert "128 pixels" in found.found
    assert "bilinear (PIL)" in found.found


def _quaternion(states: Array) -> Array:
    """By another road than the check's: through a rotation matrix (scipy)."""
    from scipy.spatial.transform import Rotation

    quaternion = Rotation.from_rotvec(states[:, 3:6]).as_quat()
    return np.concatenate([states[:, :3], quaternion, states[:, 6:7]], axis=1)


def _antipodal(states: Array) -> Array:
    angle = np.linalg.norm(states[:, 3:6], axis=1, keepdims=True)
    other = -(2 * np.pi - angle) * states[:, 3:6] / angle
    return np.concatenate([states[:, :3], other, states[:, 6:]], axis=1)


@pytest.mark.parametrize(
    ("fault", "states"),
    [
        ("quaternion for axis-angle", _quaternion),
        ("antipodal axis-angle", _antipodal),
        ("state omitted", np.zeros_like),
        ("unexplained difference", lambda x: x * np.array([1, 1, 1, 57.3, 57.3, 57.3, 1, 1])),
        ("antipodal axis-angle", lambda x: np.where(np.arange(len(x))[:, None] % 3, x, _antipodal(x))),
        ("state order", lambda x: x[:, [6, 7, 0, 1, 2, 3, 4, 5]]),
        ("unexplained difference", lambda x: x + np.array([0.1, 0, 0, 0, 0, 0, 0, 0])),
    ],
)
def test_changed_states_are_named(
    fault: str, states: Callable[[Array], Array], plant: Callable[..., OpenedRun], replayed: Replayed
) -> None:
    episode = the_episode(plant(states=states))
    assert_named(check_states(replace(replayed, episode=episode), episode.states_TS), fault)


@pytest.mark.parametrize(
    ("fault", "states"),
    [
        ("quaternion for axis-angle", _quaternion),
        ("antipodal axis-angle", _antipodal),
        ("state omitted", np.zeros_like),
    ],
)
def test_a_closed_loop_with_other_states_is_named_too(
    fault: str, states: Callable[[Array], Array], replayed: Replayed
) -> None:
    """The pack is right, the live code is not."""
    changed = replace(replayed, states_TS=states(replayed.states_TS))
    assert_named(check_states(changed, replayed.episode.states_TS), fault)


def assert_named(found: Finding, fault: str) -> None:
    assert found.passed is False
    assert found.fault == fault, found
    assert found.fix
