"""The suite in which the instruction alone decides: its scenes against LIBERO's parser and predicate, its layouts."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import UnknownName
from geomcache.pipeline.sim import choice, suites
from geomcache.pipeline.sim.grasp_sensor import GraspSensor, goal_holds
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.system import quiet_simulator

pytestmark = pytest.mark.sim

SUITE, BASE = choice.SUITE, "libero_object"
PLACES_CM = np.array([(-12, -24), (5, -10), (-15, 6), (10, -20), (15, 3), (-20, -8)])  # LIBERO's own, in every scene
FIRST_OBJECT, IN_BASKET = 10, np.array([0.0, 0.0, 0.03])  # column of x; metres from the basket's origin


def texts() -> list[str]:
    return [suites.task_info(BASE, index).bddl_path.read_text() for index in range(10)]


def test_a_scene_with_another_task_is_what_liberos_parser_reads(tmp_path: Path) -> None:
    with quiet_simulator():
        from libero.libero.envs.bddl_utils import robosuite_parse_problem

    bddl, problems = texts(), []
    for index in range(10):
        problems.append(robosuite_parse_problem(str(suites.task_info(BASE, index).bddl_path)))
        assert choice.with_task_of(bddl[index], bddl[index]) == bddl[index]
        assert suites.goal_state(SUITE, suites.task_info(SUITE, index).instruction) == (
            ("in", choice.target_of(bddl[index]), "basket_1_contain_region"),
        )
    for scene, task in ((0, 5), (3, 0), (9, 2)):
        path = tmp_path / f"{scene}_{task}.bddl"
        path.write_text(choice.with_task_of(bddl[scene], bddl[task]))
        wanted = {key: problems[task][key] for key in ("goal_state", "obj_of_interest", "language_instruction")}
        assert robosuite_parse_problem(str(path)) == problems[scene] | wanted


def test_every_layout_is_met_under_each_of_its_six_instructions_and_under_no_other() -> None:
    """So neither the objects nor their places say which one is wanted."""
    bddl = texts()
    layouts: set[bytes] = set()
    for first, last in ((0, 24), (24, 66)):  # evaluation, and the demonstrations of configs/tiny/language.yaml
        met: dict[bytes, list[int]] = defaultdict(list)
        for task in range(10):
            for i in range(first, last):
                scene = suites.scene_bddl(SUITE, task, i) or bddl[task]
                key = suites.init_state(SUITE, task, i).tobytes() + choice.section(scene, ":objects").encode()
                met[key].append(task)
        assert len(met) == 10 * (last - first) / 6
        assert not layouts & set(met)
        layouts |= set(met)
        for key, tasks in met.items():
            wanted = {choice.target_of(bddl[task]) for task in tasks}
            assert len(tasks) == len(wanted) == 6
            assert all(name.encode() in key for name in wanted)


def test_objects_stand_at_liberos_places_as_tall_and_turned_as_there_and_each_at_any() -> None:
    counts: Counter[tuple[str, int]] = Counter()
    bddl = texts()
    for task in range(10):
        for i in range(24, 144, 6):  # each layout once, from one of its scenes
            names = choice.objects_of(suites.scene_bddl(SUITE, task, i) or bddl[task])
            (scene,) = (index for index in range(10) if choice.objects_of(bddl[index]) == names)
            state, shipped = suites.init_state(SUITE, task, i), suites.init_state(BASE, scene, 0)
            taken = []
            for number, name in enumerate(names):
                x = FIRST_OBJECT + 7 * number
                np.testing.assert_allclose(state[x + 2 : x + 7], shipped[x + 2 : x + 7], atol=1e-12)
                apart = np.abs(100.0 * state[x : x + 2] - (PLACES_CM if name != "basket_1" else [[0.0, 26.0]]))
                assert apart.max(axis=1).min() < 5.0  # 2 cm, beside what the shipped states vary by themselves
                if name != "basket_1":
                    taken.append(int(apart.max(axis=1).argmin()))
                    counts[name, taken[-1]] += 1
            assert sorted(taken) == list(range(6))
    assert len(counts) == 60  # each of ten objects at each of six places


def test_numbers_and_what_can_be_told() -> None:
    assert suites.task_info(SUITE, 4).n_init_states == 24
    assert suites.demo_states(SUITE, 4) == range(24, 144)
    assert suites.horizon(SUITE) == 280
    with pytest.raises(UnknownName, match="0 to 143"):
        suites.init_state(SUITE, 4, 144)
    for i in range(6):
        told = suites.instructions_at(SUITE, 4, i)
        objects = choice.objects_of(suites.scene_bddl(SUITE, 4, i) or texts()[4])
        assert len(told) == 6
        assert suites.task_info(SUITE, 4).instruction in told
        assert all(suites.goal_state(SUITE, text)[0][1] in objects for text in told)
    assert len(suites.instructions_at("libero_object_spread", 4, 0)) == 10
    assert suites.scene_bddl("libero_object_spread", 4, 0) is None


def put_into_basket(state_D: NDArray[np.float64], objects: tuple[str, ...], name: str) -> NDArray[np.float64]:
    state = state_D.copy()
    x, basket = (FIRST_OBJECT + 7 * objects.index(one) for one in (name, "basket_1"))
    state[x : x + 3] = state_D[basket : basket + 3] + IN_BASKET
    return state


def test_the_simulator_builds_the_states_scene_and_wants_the_tasks_object() -> None:
    """Task 0 asks for the soup; state 1 is in the scene of task 1, whose own target is the cream cheese."""
    soup, cheese = (suites.goal_state(SUITE, suites.task_info(SUITE, index).instruction) for index in (0, 1))
    ketchup = suites.goal_state(SUITE, suites.task_info(SUITE, 4).instruction)
    with LiberoEnv(SUITE, 0, depth=False) as env:
        env.reset(0, 1)
        objects = tuple(env.simulator.objects_dict)
        assert objects == choice.objects_of(texts()[1])
        assert GraspSensor(env).targets == ("alphabet_soup_1",)
        assert env.instruction == suites.task_info(BASE, 0).instruction
        assert goal_holds(env, ketchup) is None  # no ketchup here
        state = suites.init_state(SUITE, 0, 1)
        for name, own, other in (("alphabet_soup_1", True, False), ("cream_cheese_1", False, True)):
            env.simulator.sim.set_state_from_flattened(put_into_basket(state, objects, name))
            env.simulator.sim.forward()
            assert (env.success(), goal_holds(env, soup), goal_holds(env, cheese)) == (own, own, other)
        env.reset(0, suites.init_state(SUITE, 0, 0))  # a flat state is of the task's own scene
        assert env.scene_bddl is None
        assert tuple(env.simulator.objects_dict) == choice.objects_of(texts()[0])
