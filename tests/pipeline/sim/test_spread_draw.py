"""What a listed placement rests on, in the real simulator: it settles where it says, and resets without a rebuild."""

from pathlib import Path

import numpy as np
import pytest

from geomcache.pipeline.sim import scene_geometry, spread, suites
from geomcache.pipeline.sim.expert import ScriptedExpert
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.spread_draw import drawn, join, one_line_a_task

pytestmark = pytest.mark.sim

SUITE, NUMBER, STEPS = "libero_object_spread", 3, 70  # enough steps to touch the object


def test_a_reset_without_rebuild_gives_the_same_states_and_the_placement_stands(env: LiberoEnv) -> None:
    state = suites.init_state(SUITE, 0, NUMBER)
    episodes = []
    for rebuild in (True, False):  # the second time the gripper is closed and everything stands elsewhere
        env.reset(5, state, rebuild=rebuild)
        positions = {
            name: scene_geometry.object_position(env.simulator, name)[:2] for name in env.simulator.objects_dict
        }
        for step, action in enumerate(ScriptedExpert(env).actions()):
            env.step(action)
            if step == STEPS:
                break
        episodes.append(env.flat_state())
    np.testing.assert_array_equal(episodes[0], episodes[1])
    placed = {column: state[column : column + 2] for column in range(10, 10 + 7 * len(positions), 7)}
    # objects of the flat state are in the simulator's own order
    for xy, wanted in zip(positions.values(), placed.values(), strict=True):
        np.testing.assert_allclose(xy, wanted, atol=0.005)


def test_parts_are_joined_and_a_line_cut_short_does_not_count(tmp_path: Path) -> None:
    task = spread.task_spread(SUITE, 0)
    head = task.model_copy(update={"evaluation": (), "demonstrations": ()})
    numbers = [*reversed(range(52)), 53]  # 52 is missing, and so 53 cannot be used yet
    lines = [
        head.model_dump_json(),
        *(f'{{"number": {i}, "placement": {list(task.placement(i))}, "refused": {{}}}}' for i in numbers),
    ]
    part = tmp_path / f"{SUITE}_00.jsonl"
    part.write_text("\n".join(lines) + '\n{"number": 52, "placement": [1')
    (tmp_path / f"{SUITE}_01.jsonl").write_text("\n".join(lines[:9]) + "\n")  # evaluation is not complete
    assert sorted(drawn(part)) == [*range(52), 53]
    joined = join(SUITE, tmp_path)
    assert joined.tasks == (task.model_copy(update={"demonstrations": task.demonstrations[:2]}),)
    text = one_line_a_task(joined)
    assert spread.parse(SUITE, text, spread.digest_of(joined)) == joined
    assert len(text.splitlines()) == 3
