"""The real simulator behind LiberoEnv: lazy frames, seeds, orientation, depth and poses."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError, UnknownName
from geomcache.pipeline.camera_geometry import inverse_pose, metric_depth
from geomcache.pipeline.orientation import to_upright
from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.libero_env import SETTLE_ACTION, LiberoEnv
from geomcache.pipeline.sim.system import quiet_simulator, require_simulator
from tests.pipeline.sim.objects_seen import ObjectsSeen

pytestmark = pytest.mark.sim

SEED, INIT_STATE = 3, 1
CAMERAS = ("agentview", "robot0_eye_in_hand")
WATCHED = (0, 1, 2, 5, 11)  # steps after which the lazy simulator is asked to observe


def wild_actions() -> NDArray[np.float64]:
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (12, 7))
    actions[:, 6] = np.sign(actions[:, 6])
    return actions


@pytest.fixture(scope="module")
def eager() -> tuple[list[dict[str, Any]], list[NDArray[np.float64]]]:
    """(observations, flat states) of LIBERO's own environment that renders at every step."""
    with quiet_simulator():
        from libero.libero.envs.env_wrapper import OffScreenRenderEnv

    require_simulator()
    task = suites.task_info("libero_object", 0)
    official = OffScreenRenderEnv(bddl_file_name=str(task.bddl_path), camera_depths=True)
    before = np.random.get_state()
    official.seed(SEED)
    official.reset()
    observations = [official.set_init_state(suites.init_state("libero_object", 0, INIT_STATE))]
    states = [official.get_sim_state()]
    for action in [*[SETTLE_ACTION] * 2, *wild_actions()]:
        observation, _, _, _ = official.step(action)
        observations.append(observation)
        states.append(official.get_sim_state())
    np.random.set_state(before)
    official.close()
    return observations, states


def assert_same_as_official(env: LiberoEnv, official: dict[str, Any]) -> None:
    observed = env.observe()
    near, far = env.depth_range()
    assert observed.frame.depth_BVHW is not None
    for v, camera in enumerate(CAMERAS):
        np.testing.assert_array_equal(observed.frame.images_BVHWC[0, v], official[f"{camera}_image"][::-1])
        depth = metric_depth(official[f"{camera}_depth"][::-1, :, 0], near, far)
        np.testing.assert_array_equal(observed.frame.depth_BVHW[0, v], depth)
    np.testing.assert_array_equal(observed.state_S[:3], official["robot0_eef_pos"].astype(np.float32))
    np.testing.assert_array_equal(observed.state_S[6:], official["robot0_gripper_qpos"].astype(np.float32))
    np.testing.assert_array_equal(env.proprioception().ee_quat_xyzw, official["robot0_eef_quat"])


def test_lazy_frames_equal_libero_own_bit_for_bit(
    eager: tuple[list[dict[str, Any]], list[NDArray[np.float64]]], env: LiberoEnv
) -> None:
    observations, states = eager
    env.reset(SEED, INIT_STATE, settle_steps=0)
    assert_same_as_official(env, observations[0])  # right after the reset
    env.reset(SEED, INIT_STATE, settle_steps=2)
    assert_same_as_official(env, observations[2])  # right after settling
    for i, action in enumerate(wild_actions()):
        env.step(action)
        np.testing.assert_array_equal(env.flat_state(), states[i + 3])
        if i in WATCHED:
            assert_same_as_official(env, observations[i + 3])


def test_reset_repeats_itself_and_leaves_the_callers_generator_alone(env: LiberoEnv) -> None:
    np.random.seed(7)
    wanted = np.random.random(3)
    np.random.seed(7)
    first = observe_after_reset(env)
    again = observe_after_reset(env)
    np.testing.assert_array_equal(np.random.random(3), wanted)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def observe_after_reset(env: LiberoEnv) -> list[NDArray[Any]]:
    env.reset(11, 2, settle_steps=3)
    seen = env.observe()
    assert seen.frame.depth_BVHW is not None
    return [seen.frame.images_BVHWC, seen.frame.depth_BVHW, seen.state_S, env.flat_state()]


def test_observation_follows_the_contract(env: LiberoEnv) -> None:
    env.reset(0, 0, settle_steps=1)
    seen, contract = env.observe(), env.contract
    assert (contract.image_orientation, contract.camera_names, contract.has_depth) == (
        "upright",
        CAMERAS,
        True,
    )
    assert seen.frame.images_BVHWC.shape == (1, 2, 128, 128, 3)
    assert seen.frame.images_BVHWC.dtype == np.uint8
    assert seen.frame.depth_BVHW is not None
    assert seen.frame.intrinsics_BV33 is not None
    assert seen.frame.extrinsics_BV44 is not None
    assert (seen.frame.depth_BVHW.shape, seen.frame.depth_BVHW.dtype) == ((1, 2, 128, 128), np.float32)
    assert (seen.state_S.shape, seen.state_S.dtype) == ((8,), np.float32)
    assert seen.instruction == env.instruction
    assert env.horizon == 280
    for v, camera in enumerate(CAMERAS):
        in_world = env.robot_base_pose() @ seen.frame.extrinsics_BV44[0, v]
        np.testing.assert_allclose(in_world, env.raw_camera(camera).extrinsics_world_44, atol=1e-12)
    assert np.linalg.norm(env.robot_base_pose()[:3, 3]) > 0.1  # so base-relative differs from world


def test_images_are_upright_and_not_mirrored(env: LiberoEnv) -> None:
    # 256 pixels, so that small objects have an inside; a second simulator must not disturb the shared one.
    env.reset(0, 0, settle_steps=1)
    shared = env.observe()
    with LiberoEnv("libero_object", 0, cameras=("agentview",), height=256, width=256) as fine:
        fine.reset(0, 0)
        view, segments = fine.raw_camera("agentview"), fine.segment("agentview")
        z_buffer = to_upright(view.zbuffer_HW, "bottom_up", row_axis=0)
        seen = ObjectsSeen(
            fine, metric_depth(z_buffer, *fine.depth_range()), segments, view.intrinsics_33, view.extrinsics_world_44
        )
        for name in ("alphabet_soup_1", "milk_1", "basket_1", "butter_1"):
            assert seen.fraction_in_box(name) >= 0.99
        for name in ("alphabet_soup_1", "milk_1", "basket_1"):
            assert seen.mirrored().fraction_in_box(name) < 0.1
        np.testing.assert_array_equal(env.observe().frame.images_BVHWC, shared.frame.images_BVHWC)
    np.testing.assert_array_equal(env.observe().frame.images_BVHWC, shared.frame.images_BVHWC)


def test_wrist_camera_moves_with_the_hand(env: LiberoEnv) -> None:
    env.reset(0, 0, settle_steps=2)
    before = env.observe()
    for _ in range(8):
        env.step(np.array([0.0, 0.0, -0.6, 0.0, 0.0, 0.0, -1.0]))
    after = env.observe()
    assert before.frame.extrinsics_BV44 is not None
    assert after.frame.extrinsics_BV44 is not None
    moved = (after.frame.extrinsics_BV44 - before.frame.extrinsics_BV44)[0, :, :3, 3]
    np.testing.assert_array_equal(moved[0], np.zeros(3))
    assert moved[1, 2] < -0.05
    relative = inverse_pose(before.frame.extrinsics_BV44[0, 1]) @ before.frame.extrinsics_BV44[0, 1]
    np.testing.assert_allclose(relative, np.eye(4), atol=1e-6)


def test_wrong_inputs_are_named(env: LiberoEnv) -> None:
    env.reset(0, 0, settle_steps=0)
    with pytest.raises(InputError, match="7 finite numbers"):
        env.step(np.zeros(6))
    with pytest.raises(InputError, match="110 numbers"):
        env.reset(0, np.zeros(5))
    with pytest.raises(UnknownName, match="agentview, robot0_eye_in_hand"):
        env.raw_camera("sideview")
    with pytest.raises(InputError, match="none twice"):
        LiberoEnv("libero_object", 0, cameras=("agentview", "agentview"))
