"""One simulator of an evaluation under camera orbit and rulers, and for a blind policy: what the policy is given."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from geomcache.cache_schemas.contract import CameraContract, Contract
from geomcache.pipeline.frames import Observation
from geomcache.pipeline.sim.libero_env import SETTLE_ACTION
from geomcache.pipeline.sim.suites import init_state
from geomcache.stages.evaluate.corruption import Corruption, Drawn, encoder_frame
from geomcache.stages.evaluate.simulator import Episode, Played, Scene, Simulator

pytestmark = pytest.mark.sim

SIDE = 32
CAMERAS = tuple(CameraContract(name=name, height=SIDE, width=SIDE) for name in ("agentview", "robot0_eye_in_hand"))
SCENE = Scene(Contract(image_orientation="upright", cameras=CAMERAS, has_depth=True), True, 0, 2)
EPISODE = Episode("libero_object", 0, 0, 7, 6)


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    """Its scene is exchanged by the tests; the built task stays."""
    simulator = Simulator(SCENE)
    yield simulator
    simulator.close()


def begun(simulator: Simulator, corruption: Corruption, *, blind: bool = False, **drawn: Any) -> Observation:
    simulator._scene = replace(SCENE, corruption=corruption, blind=blind)
    turn = simulator.begin(replace(EPISODE, drawn=Drawn(**drawn)))
    assert isinstance(turn, Observation)
    return turn


def test_rulers_reach_the_encoder_alone(simulator: Simulator) -> None:
    """True matrices stand 15 degrees about the vertical from what the encoder is told; pictures are this scene's."""
    asked = begun(simulator, Corruption(nominal_extrinsics=True), camera_orbit=15.0)
    true, told = asked.frame, encoder_frame(asked)
    assert true.extrinsics_BV44 is not None
    assert told.extrinsics_BV44 is not None
    turn_33 = true.extrinsics_BV44[0, 0, :3, :3] @ told.extrinsics_BV44[0, 0, :3, :3].T
    angle = np.deg2rad(15.0)
    expected_33 = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    np.testing.assert_allclose(turn_33, expected_33, atol=1e-9)
    np.testing.assert_array_equal(true.extrinsics_BV44[0, 1], told.extrinsics_BV44[0, 1])
    assert told.images_BVHWC is true.images_BVHWC
    assert told.depth_BVHW is true.depth_BVHW
    # shuffled: another placement, seen by a camera that is turned as it was in that episode
    assert simulator._env is not None
    simulator._scene = replace(SCENE, corruption=Corruption(shuffle_geometry=True))
    drawn = Drawn(camera_orbit=15.0, geometry_of=9, geometry_orbit=0.0)
    elsewhere = simulator._changes(simulator._env, replace(EPISODE, drawn=drawn)).elsewhere
    assert elsewhere is not None
    assert elsewhere.extrinsics_BV44 is not None
    np.testing.assert_allclose(elsewhere.extrinsics_BV44[0, 0], told.extrinsics_BV44[0, 0], atol=1e-12)
    expected = simulator._env.observe().frame
    np.testing.assert_array_equal(elsewhere.depth_BVHW, expected.depth_BVHW)
    assert np.abs(simulator._env.flat_state() - init_state("libero_object", 0, 9)).max() < 1e-6


def test_for_a_blind_policy_nothing_is_rendered_but_films(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begun(simulator, Corruption(), blind=True)
    env = simulator._env
    assert env is not None
    observe, rendered = env.observe, []

    def counted() -> Observation:
        rendered.append(1)
        return observe()

    monkeypatch.setattr(env, "observe", counted)
    chunk_TA = np.stack([SETTLE_ACTION] * 2).astype(np.float32)
    second = simulator.advance(chunk_TA)
    assert rendered == []
    simulator._episode = replace(EPISODE, video=True)
    third = simulator.advance(chunk_TA)
    played = simulator.advance(chunk_TA)
    assert len(rendered) == 2
    for turn in (first, second, third):  # filmed or not: black to the policy
        assert isinstance(turn, Observation)
        assert (turn.frame.images_BVHWC.shape, turn.frame.images_BVHWC.max()) == ((1, 2, SIDE, SIDE, 3), 0)
        assert turn.instruction == env.instruction
    assert isinstance(played, Played)
    assert (played.steps, len(played.frames)) == (6, 2)
    assert all(frame.max() > 0 for frame in played.frames)
