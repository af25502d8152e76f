"""Camera matrices measured in the simulator, and orientations found with them in its own pictures."""

from collections import defaultdict

import numpy as np
import pytest

from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.cache_schemas.errors import UnknownName
from geomcache.pipeline.camera_geometry import inverse_pose
from geomcache.pipeline.orientation_track import LARGEST_ERROR, static_camera_errors, wrist_camera_errors
from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.agentview_camera import AGENTVIEW, WRIST, scene_cameras
from geomcache.pipeline.sim.libero_env import LiberoEnv

pytestmark = pytest.mark.sim

# (x, y, z, turn, gripper) for three steps each, full scale 5 cm
MOVES = [
    (0.5, 1, -0.5, 0, -1), (1, 0.5, -1, 0.3, -1), (0.5, -1, 0, 0.3, -1), (0, -1, 0.5, 0, -1), (-0.5, -1, -0.5, 0, -1),
    (-1, -0.5, 0, -0.3, 1), (-0.5, 1, 0.5, 0, 1), (0.5, 1, -0.5, 0, 1), (1, 0, 0, 0, 1), (-0.5, 1, 0.5, 0, 1),
    (-1, 0.5, 0, 0, 1), (0, -1, 0, 0, 1),
]  # fmt: skip


def test_matrices_fit_the_simulator_and_find_how_its_pictures_are_stored(env: LiberoEnv) -> None:
    env.reset(5, 2)
    images, states = [], []
    for x, y, z, turn, gripper in MOVES:
        seen = env.observe()
        images.append(seen.frame.images_BVHWC[0])
        states.append(seen.state_S)
        for _ in range(3):
            env.step(np.array([x, y, z, 0, 0, turn, gripper]))
    images_TVHWC, states_TS = np.stack(images), np.stack(states)

    cameras = scene_cameras(env.instruction)
    seen = env.observe()
    assert seen.frame.intrinsics_BV33 is not None
    for v, camera in enumerate((AGENTVIEW, WRIST)):
        np.testing.assert_allclose(cameras.intrinsics(camera, 128, 128), seen.frame.intrinsics_BV33[0, v], atol=1e-9)
    np.testing.assert_allclose(cameras.agentview_to_world_44, env.raw_camera(AGENTVIEW).extrinsics_world_44, atol=1e-9)
    hand = env.simulator.robots[0].eef_site_id
    fingertips = inverse_pose(cameras.wrist_to_hand_44)[:3, 3]  # in the camera: ahead of it and off its axis
    wrist_44 = env.raw_camera(WRIST).extrinsics_world_44
    np.testing.assert_allclose(wrist_44[:3, :3] @ fingertips + wrist_44[:3, 3], seen.state_S[:3], atol=1e-5)
    np.testing.assert_allclose(seen.state_S[:3], env.simulator.sim.data.site_xpos[hand], atol=5e-3)
    assert cameras.surface_height == pytest.approx(0.0, abs=2e-3)  # libero_object's scenes stand on the floor

    stored: dict[ImageOrientation, slice | tuple[slice, ...]] = {
        "rot180": np.s_[:, :, ::-1],
        "bottom_up": np.s_[:, ::-1],
        "upright": np.s_[:],
    }
    for orientation, turned in stored.items():
        for v, (camera, errors_of) in enumerate(((AGENTVIEW, static_camera_errors), (WRIST, wrist_camera_errors))):
            errors = errors_of([cameras.track(camera, images_TVHWC[:, v][turned], states_TS)])
            (best, error), (_, next_error), *_ = sorted(errors.items(), key=lambda item: item[1])
            assert (best, error < LARGEST_ERROR, next_error > 1.5 * error) == (orientation, True, True)


def test_an_instruction_belongs_to_one_kind_of_scene() -> None:
    """Else the instruction would not be enough; the stove's two kinds have the same cameras."""
    kinds = defaultdict(set)
    for suite in suites.PUBLIC_SUITES:
        for i in range(suites.task_count(suite)):
            task = suites.task_info(suite, i)
            kinds[task.instruction].add(task.bddl_path.read_text().split("problem")[1].split(")")[0].strip())
    assert {instruction: found for instruction, found in kinds.items() if len(found) > 1} == {
        "turn on the stove": {"LIBERO_Tabletop_Manipulation", "LIBERO_Kitchen_Tabletop_Manipulation"}
    }


def test_an_instruction_that_libero_does_not_have_is_named() -> None:
    with pytest.raises(UnknownName, match="make a cup of tea"):
        scene_cameras("make a cup of tea")
