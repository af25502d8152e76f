"""The grasp sensor against robosuite's own check, LIBERO's own success and the objects' own boxes."""

from collections import Counter

import numpy as np
import pytest

from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.expert import ScriptedExpert
from geomcache.pipeline.sim.grasp_sensor import GraspSensor, task_targets
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.scene_geometry import solid_points

pytestmark = pytest.mark.sim

# Of the public 130: what is only opened, closed, switched or pushed; and what moves two objects.
NOTHING_TO_GRASP = {
    "libero_goal": [0, 5, 7],
    "libero_90": [0, 6, 7, 11, 20, 22, 23, 28, 33, 35, 39, 44],
}
TWO_TARGETS = {"libero_10": [0, 1, 4, 6, 7, 8], "libero_90": [63, 64]}


def test_what_is_held_is_what_robosuite_says(env: LiberoEnv) -> None:
    env.reset(seed=0, init_state=0)
    sensor, simulator = GraspSensor(env), env.simulator
    parts = simulator.robots[0].gripper.important_geoms
    fingers = [parts["left_finger"], parts["right_finger"]]
    start, held = sensor.heights(), []
    assert sensor.objects == tuple(simulator.objects_dict)
    assert sensor.targets == ("alphabet_soup_1",)
    for action in ScriptedExpert(env).actions():
        success = env.step(action)
        answers = [simulator._check_grasp(fingers, simulator.objects_dict[name]) for name in sensor.objects]
        assert sensor.held().tolist() == answers
        assert sensor.at_goal("alphabet_soup_1") == success
        held.append(sensor.objects[answers.index(True)] if any(answers) else None)
        for name, height in zip(sensor.objects, sensor.heights(), strict=True):
            assert height == simulator.sim.data.body_xpos[simulator.obj_body_id[name]][2]
        if success:
            break
    assert success
    assert Counter(held)["alphabet_soup_1"] > 50
    assert set(held) == {None, "alphabet_soup_1"}
    assert np.argmax(np.abs(sensor.heights() - start)) == sensor.target_numbers[0]


def test_a_rim_is_held_by_fingers_and_not_only_by_their_pads() -> None:
    """robosuite's default asks for both pads: it would call this carried and placed bowl never grasped."""
    with LiberoEnv("libero_spatial", 5, depth=False) as env:
        env.reset(seed=0, init_state=0)
        sensor, simulator = GraspSensor(env), env.simulator
        (bowl,) = sensor.target_numbers
        rows = []
        for action in ScriptedExpert(env).actions():
            success = env.step(action)
            by_pads = simulator._check_grasp(simulator.robots[0].gripper, simulator.objects_dict[sensor.targets[0]])
            rows.append((sensor.heights()[bowl], bool(sensor.held()[bowl]), by_pads))
            if success:
                break
    heights, held, by_pads = (np.array(column) for column in zip(*rows, strict=True))
    lifted = heights > heights.min() + 0.05
    assert success
    assert lifted.sum() > 50
    assert held[lifted].all()
    assert not by_pads.any()


def test_the_distance_is_from_the_pads_to_the_nearest_object(env: LiberoEnv) -> None:
    env.reset(seed=0, init_state=0)
    sensor, simulator = GraspSensor(env), env.simulator
    model, data = simulator.sim.model._model, simulator.sim.data._data
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    distances = []
    for number, action in enumerate(ScriptedExpert(env).actions()):
        env.step(action)
        if number % 12 == 0 or action[-1] > 0:
            pads = []
            for name in ("gripper0_finger1_pad_collision", "gripper0_finger2_pad_collision"):
                geom = simulator.sim.model.geom_name2id(name)
                turn = data.geom_xmat[geom].reshape(3, 3)
                pads.append(corners * model.geom_size[geom] @ turn.T + data.geom_xpos[geom])
            solid = np.concatenate([solid_points(simulator, name) for name in sensor.objects])
            nearest = np.linalg.norm(solid[:, None] - np.concatenate(pads)[None], axis=-1).min()
            distances.append(sensor.distance())
            # A pad is 2 cm wide and the points lie 8 mm apart, so a corner and a point are near the nearest two places.
            assert nearest - 0.02 <= distances[-1] <= nearest + 1e-9
        if action[-1] > 0:
            break
    assert distances[0] > 0.1
    assert distances[-1] < 0.02


def test_targets_of_all_public_tasks() -> None:
    from libero.libero.envs import bddl_utils

    found: dict[str, dict[int, tuple[str, ...]]] = {}
    for suite in suites.PUBLIC_SUITES:
        for index in range(suites.task_count(suite)):
            task = suites.task_info(suite, index)
            problem = bddl_utils.robosuite_parse_problem(str(task.bddl_path))
            movable = {name for names in problem["objects"].values() for name in names}
            targets = task_targets(problem["goal_state"], movable, task.instruction)
            assert set(targets) <= movable
            assert targets or index in NOTHING_TO_GRASP[suite], task.instruction
            found.setdefault(suite, {})[index] = targets
    assert sum(map(len, found.values())) == 130
    for count, expected in ((0, NOTHING_TO_GRASP), (2, TWO_TARGETS)):
        counted = {
            suite: [i for i, targets in tasks.items() if len(targets) == count] for suite, tasks in found.items()
        }
        assert {suite: tasks for suite, tasks in counted.items() if tasks} == expected
    assert found["libero_10"][3] == ("akita_black_bowl_1",)  # in a drawer that must be closed afterwards
    assert found["libero_90"][63] == ("akita_black_bowl_1", "akita_black_bowl_2")  # stacked, then moved together


@pytest.mark.parametrize(
    ("goals", "instruction", "targets"),
    [
        ([["on", "bowl_1", "plate_1"]], "put the bowl on the plate", ("bowl_1",)),
        ([["on", "plate_1", "table_front_region"]], "push the plate to the front", ()),
        ([["open", "cabinet_1_top_region"], ["in", "bowl_1", "cabinet_1_top_region"]], "open and put", ("bowl_1",)),
        ([["turnon", "stove_1"]], "turn on the stove", ()),
        ([["in", "bowl_1", "tray_1"], ["on", "bowl_1", "plate_1"]], "one bowl, two conditions", ("bowl_1",)),
        ([["on", "stove_1", "table_region"]], "a fixture does not move", ()),
    ],
)
def test_targets_are_what_the_goal_wants_moved(
    goals: list[list[str]], instruction: str, targets: tuple[str, ...]
) -> None:
    assert task_targets(goals, {"bowl_1", "plate_1"}, instruction) == targets
