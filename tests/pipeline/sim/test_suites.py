"""Suites and tasks by name; reads LIBERO's task lists, starts no simulation."""

import hashlib

import pytest

from geomcache.cache_schemas.errors import UnknownName
from geomcache.pipeline.official_layout import instruction_of
from geomcache.pipeline.sim import suites

pytestmark = pytest.mark.sim


def test_a_task_is_described() -> None:
    task = suites.task_info("libero_object", 0)
    assert task.name == "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    assert task.instruction == "pick up the alphabet soup and place it in the basket"
    assert task.bddl_path.is_file()
    assert task.n_init_states == 50
    state = suites.init_state("libero_object", 0, 49)
    assert state.shape == (110,)
    content = (880).to_bytes(8, "little") + state.astype("<f8").tobytes()
    assert suites.init_state_digest("libero_object", 0, 49) == hashlib.sha256(content).hexdigest()


def test_every_suite_has_its_tasks_and_horizon() -> None:
    assert {name: suites.task_count(name) for name in suites.PUBLIC_SUITES} == {
        "libero_spatial": 10,
        "libero_object": 10,
        "libero_goal": 10,
        "libero_10": 10,
        "libero_90": 90,
    }
    assert [suites.horizon(name) for name in suites.PUBLIC_SUITES] == [220, 280, 300, 520, 400]


def test_a_misspelt_suite_gets_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="did you mean 'libero_object'"):
        suites.task_info("libero_objct", 0)
    with pytest.raises(UnknownName, match="libero_spatial, libero_object, libero_goal, libero_10, libero_90"):
        suites.horizon("metaworld")


def test_an_unknown_task_or_state_gets_the_list() -> None:
    with pytest.raises(UnknownName) as problem:
        suites.task_info("libero_object", 10)
    assert "0 to 9" in str(problem.value)
    assert "6  pick_up_the_milk_and_place_it_in_the_basket" in str(problem.value) or "milk" in str(problem.value)
    with pytest.raises(UnknownName, match="0 to 49"):
        suites.init_state("libero_object", 0, 50)


def test_the_sources_rule_gives_every_tasks_instruction() -> None:
    """So that a policy is trained on the sentence that evaluation gives it."""
    tasks = [suites.task_info(suite, i) for suite in suites.PUBLIC_SUITES for i in range(suites.task_count(suite))]
    assert len(tasks) == 130
    assert [task.name for task in tasks if instruction_of(task.name) != task.instruction] == []
