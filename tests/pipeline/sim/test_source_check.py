"""``pack check`` on real frames: a LeRobot set (MP4, turned as the community does) and an HDF5 file with states."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from geomcache.pipeline.open_source import SourceRequest
from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.source_check import SourceCheck, check_source
from tests.conftest import nothing
from tests.lerobot_files import TASKS, Recorded, write_data_set
from tests.pipeline.sim.test_agentview_camera import MOVES

pytestmark = pytest.mark.sim

TASK_INDEX = 7  # whose instruction is the data set writer's first


@pytest.fixture(scope="module")
def seen() -> tuple[Recorded, np.ndarray, np.ndarray]:
    """One episode of big motions as the simulator shows it, flat states, joints; row t is before action t."""
    images, states, actions, flat, joints = [], [], [], [], []
    with LiberoEnv("libero_object", TASK_INDEX, height=64, width=64, depth=False) as env:
        env.reset(5, 2)
        for x, y, z, turn, gripper in MOVES:
            for _ in range(3):
                observed = env.observe()
                images.append(observed.frame.images_BVHWC[0])
                states.append(observed.state_S)
                flat.append(env.flat_state())
                joints.append(env.proprioception().joint_pos_7)
                actions.append(np.array([x, y, z, 0, 0, turn, gripper], dtype=np.float32))
                env.step(actions[-1])
        assert env.instruction == TASKS[0]
    return (
        Recorded(Path(), [np.stack(images)], [np.stack(states)], [np.stack(actions)], [TASKS[0]]),
        np.stack(flat),
        np.stack(joints),
    )


def check(path: Path, **settings: str) -> SourceCheck:
    return check_source(SourceRequest(path=str(path), settings=settings), 4, nothing)


def test_a_lerobot_set_is_found_out_from_its_pictures(
    seen: tuple[Recorded, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    recorded, _, _ = seen
    turned = [images[:, :, :, ::-1] for images in recorded.images_TVHWC]  # the community's rot180
    stored = Recorded(tmp_path, turned, recorded.states_TS, recorded.actions_TA, recorded.instructions)
    write_data_set(tmp_path / "libero", images="mp4", recorded=stored)
    found = check(tmp_path / "libero")
    assert (found.declared, found.found, found.orientation_agrees, found.gripper_agrees) == (
        *["rot180"] * 2,
        True,
        True,
    )
    assert [finding.decided for _, finding in found.findings] == [True, True]
    wrong = check(tmp_path / "libero", image_orientation="upright")
    assert (wrong.found, wrong.orientation_agrees) == ("rot180", False)


def test_a_swapped_gripper_sign_is_found_out(seen: tuple[Recorded, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    recorded, _, _ = seen
    swapped = recorded.actions_TA[0] * np.array([1, 1, 1, 1, 1, 1, -1], dtype=np.float32)
    stored = Recorded(tmp_path, recorded.images_TVHWC, recorded.states_TS, [swapped], recorded.instructions)
    write_data_set(tmp_path / "libero", recorded=stored)
    found = check(tmp_path / "libero", image_orientation="upright")
    assert (found.orientation_agrees, found.gripper_agrees) == (True, False)


def test_an_hdf5_file_is_found_out_from_its_states(
    seen: tuple[Recorded, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """A file of the no-noops kind (no attributes, observations before actions) that somebody stored upside down."""
    recorded, flat, joints = seen
    path = tmp_path / f"{suites.task_info('libero_object', TASK_INDEX).name}_demo.hdf5"
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"], demo["states"] = recorded.actions_TA[0], flat
        demo["obs/joint_states"] = joints
        demo["obs/ee_states"], demo["obs/gripper_states"] = recorded.states_TS[0][:, :6], recorded.states_TS[0][:, 6:]
        for view, name in enumerate(("agentview", "eye_in_hand")):
            demo[f"obs/{name}_rgb"] = recorded.images_TVHWC[0][:, view, ::-1, ::-1]
    found = check(path)
    assert (found.declared, found.found, found.orientation_agrees) == ("bottom_up", "upside_down", False)
    right = check(path, image_orientation="upside_down")
    assert (right.observations[0][1:], right.agrees) == (("before_action", "before_action"), True)
    wrong = check(path, image_orientation="upside_down", observation="after_action")
    assert (wrong.orientation_agrees, wrong.observation_agrees, wrong.agrees) == (True, False, False)
