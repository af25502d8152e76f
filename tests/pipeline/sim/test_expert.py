"""The scripted expert in the real simulator, nothing rendered: the two tasks that defeat a naive plan."""

import numpy as np
import pytest

from geomcache.pipeline.sim import scene_geometry
from geomcache.pipeline.sim.expert import ScriptedExpert
from geomcache.pipeline.sim.libero_env import LiberoEnv

pytestmark = pytest.mark.sim


@pytest.mark.parametrize(
    ("task", "words"),
    [
        pytest.param(4, "in the top drawer", id="walls on all sides"),
        pytest.param(5, "on the ramekin", id="the bowl tips over while the hand is on its way"),
    ],
)
def test_hard_bowls_reach_the_plate_under_noise(task: int, words: str) -> None:
    generator = np.random.default_rng(0)
    with LiberoEnv("libero_spatial", task, depth=False) as env:
        assert words in env.instruction
        env.reset(0, 0)
        steps, solved = 0, False
        for action in ScriptedExpert(env).actions():
            assert action.shape == (7,)
            assert np.abs(action).max() <= 1.0
            noisy = action + 0.1 * np.array([*generator.standard_normal(3), 0.0, 0.0, 0.0, 0.0])
            solved = env.step(np.clip(noisy, -1.0, 1.0)) and action[-1] < 0.0
            steps += 1
            if solved:
                break
        assert solved
        assert steps <= env.horizon
        bowl, plate = (
            scene_geometry.object_position(env.simulator, name) for name in ("akita_black_bowl_1", "plate_1")
        )
        assert np.linalg.norm(bowl[:2] - plate[:2]) < 0.03


def test_what_a_hand_would_run_into_is_where_objects_touch(env: LiberoEnv) -> None:
    """MuJoCo's own contact points of the resting scene lie on the solid points' undersides."""
    env.reset(0, 0)
    simulator = env.simulator
    model, data = simulator.sim.model._model, simulator.sim.data
    names = scene_geometry.object_names(simulator)
    checked = 0
    for name in names:
        solid = scene_geometry.solid_points(simulator, name)
        body = simulator.obj_body_id[name]
        for contact in data._data.contact[: data.ncon]:
            bodies = model.body_rootid[model.geom_bodyid[[contact.geom1, contact.geom2]]]
            if body in bodies:
                assert np.linalg.norm(solid - contact.pos, axis=1).min() < 0.006
                assert contact.pos[2] == pytest.approx(solid[:, 2].min(), abs=0.002)
                checked += 1
    assert checked >= 3 * len(names)
