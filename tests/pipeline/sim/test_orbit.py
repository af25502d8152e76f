"""The agent-view camera turned about the workspace: picture, depth and matrices agree, and nothing else changes."""

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.pipeline.camera_geometry import unproject
from geomcache.pipeline.frames import Observation
from geomcache.pipeline.sim.camera_orbit import turned_pose
from geomcache.pipeline.sim.libero_env import LiberoEnv
from tests.pipeline.sim.objects_seen import ObjectsSeen

ORBIT = 20.0


def rotated(quaternion_wxyz: NDArray[np.float64], vector_3: NDArray[np.float64]) -> NDArray[np.float64]:
    w, axis = quaternion_wxyz[0], quaternion_wxyz[1:]
    return vector_3 + 2.0 * np.cross(axis, np.cross(axis, vector_3) + w * vector_3)


def test_a_quarter_turn_about_the_middle() -> None:
    quaternion = np.array([0.638, 0.305, 0.305, 0.638])
    quaternion /= np.linalg.norm(quaternion)
    position, turned = turned_pose(np.array([0.66, 0.1, 1.61]), quaternion, 90.0, np.array([-0.2, 0.0]))
    np.testing.assert_allclose(position, [-0.3, 0.86, 1.61])
    for axis in np.eye(3):  # what pointed along x points along y
        x, y, z = rotated(quaternion, axis)
        np.testing.assert_allclose(rotated(turned, axis), [-y, x, z], atol=1e-12)


def heights(seen: Observation, env: LiberoEnv) -> NDArray[np.float64]:
    """[H, W] world z of what each pixel of the agent view shows, by the matrices that are reported."""
    frame = seen.frame
    assert frame.depth_BVHW is not None
    assert frame.intrinsics_BV33 is not None
    assert frame.extrinsics_BV44 is not None
    to_world = env.robot_base_pose() @ frame.extrinsics_BV44[0, 0]
    points: NDArray[np.float64] = unproject(frame.depth_BVHW[0, 0], frame.intrinsics_BV33[0, 0], to_world)
    return points[..., 2]


@pytest.mark.sim
def test_a_turned_camera_sees_the_same_world(env: LiberoEnv) -> None:
    env.reset(0, 0, settle_steps=1)
    nominal, state = env.observe(), env.flat_state()
    nominal_44 = env.raw_camera("agentview").extrinsics_world_44

    env.reset(0, 0, settle_steps=1, agentview_orbit=ORBIT)
    turned = env.observe()
    np.testing.assert_array_equal(env.flat_state(), state)
    np.testing.assert_array_equal(turned.frame.images_BVHWC[0, 1], nominal.frame.images_BVHWC[0, 1])
    assert turned.frame.depth_BVHW is not None
    assert nominal.frame.depth_BVHW is not None
    np.testing.assert_array_equal(turned.frame.depth_BVHW[0, 1], nominal.frame.depth_BVHW[0, 1])
    changed = np.abs(turned.frame.images_BVHWC[0, 0].astype(float) - nominal.frame.images_BVHWC[0, 0]).mean()
    assert changed > 5.0

    # the camera went round the middle of the floor, at its own height, by that angle
    c, s = np.cos(np.deg2rad(ORBIT)), np.sin(np.deg2rad(ORBIT))
    about_z_44 = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    view = env.raw_camera("agentview")
    np.testing.assert_allclose(view.extrinsics_world_44, about_z_44 @ nominal_44, atol=1e-6)
    assert np.linalg.norm(view.extrinsics_world_44[:3, 3] - nominal_44[:3, 3]) > 0.25

    # what the matrices say of the new picture is where things are
    seen = ObjectsSeen(
        env,
        turned.frame.depth_BVHW[0, 0],
        env.segment("agentview"),
        view.intrinsics_33,
        view.extrinsics_world_44,
    )
    for name in ("basket_1", "milk_1", "alphabet_soup_1"):
        assert seen.fraction_in_box(name) >= 0.97
    for view_of in (nominal, turned):  # the floor; depth is good to 3 mm there
        assert (np.abs(heights(view_of, env)) < 0.006).mean() > 0.5
    wrong = ObjectsSeen(env, seen.depth_HW, seen.segments_HW, view.intrinsics_33, nominal_44)
    assert wrong.fraction_in_box("milk_1") < 0.1

    env.model_xml()
    env.reset(0, 0, settle_steps=1, rebuild=False)  # asks for the nominal view again, so it is rebuilt all the same
    np.testing.assert_array_equal(env.observe().frame.images_BVHWC, nominal.frame.images_BVHWC)
    np.testing.assert_array_equal(env.raw_camera("agentview").extrinsics_world_44, nominal_44)
