"""Suites with spread: the shipped lists against LIBERO's own states, and the keyed draws. Starts no simulation."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError, SourceDamaged, UnknownName
from geomcache.pipeline.sim import spread, spread_distribution, suites

pytestmark = pytest.mark.sim  # LIBERO's shipped states are read

BY_TASK = ("libero_object_spread", "libero_spatial_spread")  # the choice suite lists scenes: test_choice.py
PLACEMENTS = Path(spread.__file__).parent / "placements"
ROBOT = 9  # joint positions of arm and fingers, before those of objects
NEAREST_CM = {"libero_object_spread": (10.0, 20.0, 15.0), "libero_spatial_spread": (13.0, 13.0, 13.0)}


def listed() -> list[tuple[str, dict[str, Any]]]:
    return [
        (suite, task) for suite in BY_TASK for task in json.loads((PLACEMENTS / f"{suite}.json").read_text())["tasks"]
    ]


def centres_cm(state_D: NDArray[np.float64]) -> dict[int, NDArray[np.float64]]:
    """Column of x -> xy of every free object: 7 positions and 6 velocities each, after time and the robot's 9 + 9."""
    objects = (len(state_D) - 1 - 2 * ROBOT) // 13
    columns = [1 + ROBOT + 7 * k for k in range(objects)]
    return {column: 100.0 * state_D[column : column + 2] for column in columns}


def test_every_state_is_a_shipped_one_with_the_listed_objects_shifted() -> None:
    for suite, task in listed():
        base = spread.BASES[suite]
        shipped = np.stack([suites.init_state(base, task["task"], i) for i in range(50)])
        rows = task["evaluation"] + task["demonstrations"]
        for number, row in enumerate(rows):
            wanted = shipped[row[0]].copy()
            for k, move in enumerate(task["moves"]):
                for column in move["columns"]:
                    wanted[column] += row[1 + 2 * k] / 10_000.0
                    wanted[column + 1] += row[2 + 2 * k] / 10_000.0
                assert move["x"][0] <= row[1 + 2 * k] <= move["x"][1]
                assert move["y"][0] <= row[2 + 2 * k] <= move["y"][1]
            np.testing.assert_allclose(suites.init_state(suite, task["task"], number), wanted, rtol=0.0, atol=1e-12)
        assert len({tuple(row) for row in rows}) == len(rows)  # no held-out placement among the demonstrations


def test_listed_objects_keep_their_distances() -> None:
    for suite, task in listed():
        target, between, other = NEAREST_CM[suite]
        groups = [move["columns"] for move in task["moves"]]
        moved = {column: k for k, columns in enumerate(groups) for column in columns}
        for number in range(len(task["evaluation"]) + len(task["demonstrations"])):
            at = centres_cm(suites.init_state(suite, task["task"], number))
            assert set(moved) <= set(at)
            for a, b in itertools.combinations(at, 2):
                kinds = {moved.get(a), moved.get(b)}
                if len(kinds) == 1:
                    continue  # both stay, or move as one
                least = between if None not in kinds else target if 0 in kinds else other
                assert np.linalg.norm(at[a] - at[b]) >= least - 1e-6


def test_targets_of_the_object_suite_are_spread_and_shipped_ones_are_not() -> None:
    """What the suite is for; the drawn ranges alone have 4.6 and 4.0 cm."""
    for suite, task in listed():
        if suite != "libero_object_spread":
            continue
        column = task["moves"][0]["columns"][0]

        places = {
            name: np.stack([centres_cm(suites.init_state(name, task["task"], i))[column] for i in range(50)])
            for name in (suite, "libero_object")
        }
        assert (places[suite].std(axis=0) > 2.5).all()
        assert (places["libero_object"].std(axis=0) < 1.0).all()


@pytest.mark.parametrize("number", [0, 7, 49, 50, 120])
def test_a_listed_placement_is_among_the_first_draws_of_its_own_number(number: int) -> None:
    """Anybody can draw it again, and neither the order nor the other numbers matter."""
    task = spread.task_spread("libero_object_spread", 0)
    shipped = np.stack([suites.init_state("libero_object", 0, i) for i in range(50)])

    def draws(own_number: int) -> list[spread.Placement]:
        columns = list(centres_cm(shipped[0]))
        arguments = ("libero_object_spread", 0, own_number, task.moves, task.moves_apart, shipped, columns)
        return list(itertools.islice(spread_distribution.candidates(*arguments), 20))

    assert task.placement(number) in draws(number)
    assert not set(draws(number)) & set(draws(number + 1))


def test_numbers_for_evaluation_and_for_demonstrations_are_apart() -> None:
    assert suites.task_info("libero_object_spread", 0).n_init_states == 50
    assert suites.demo_states("libero_object_spread", 0) == range(50, 200)
    assert suites.demo_states("libero_object", 0) == suites.demo_states("libero_goal", 3) == range(50)
    assert suites.init_state("libero_object_spread", 0, 199).shape == (110,)
    for wrong in (-1, 200):
        with pytest.raises(UnknownName, match="0 to 199"):
            suites.init_state("libero_object_spread", 0, wrong)
    with pytest.raises(UnknownName, match="0 to 49"):
        suites.init_state("libero_object", 0, 50)


def test_a_suite_with_spread_has_the_tasks_of_its_base() -> None:
    for suite, base in spread.BASES.items():
        assert suites.task_count(suite) == suites.task_count(base) == 10
        assert suites.horizon(suite) == suites.horizon(base)
    for suite, listed_task in listed():
        task = suites.task_info(suite, listed_task["task"])
        shipped = suites.task_info(spread.BASES[suite], task.index)
        assert (task.name, task.instruction, task.bddl_path) == (shipped.name, shipped.instruction, shipped.bddl_path)
        assert task.suite == suite
        assert task.name == listed_task["name"]
    assert len(suites.all_instructions()) == 112
    assert list(suites.PUBLIC_SUITES) == ["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
    assert list(suites.SUITES) == [*suites.PUBLIC_SUITES, *spread.BASES]


def test_a_misspelt_suite_with_spread_gets_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="did you mean 'libero_object_spread'"):
        suites.task_info("libero_object_sprea", 0)
    with pytest.raises(UnknownName, match="0 to 9"):
        suites.demo_states("libero_object_spread", 10)


def test_a_changed_list_is_refused() -> None:
    suite = "libero_object_spread"
    text = (PLACEMENTS / f"{suite}.json").read_text()
    assert len(text.encode()) < 150_000
    known = spread.DIGESTS[suite]
    assert spread.parse(suite, text, known).tasks[0].evaluation
    reordered = json.dumps(json.loads(text), indent=1, sort_keys=True)
    assert spread.parse(suite, reordered, known) == spread.parse(suite, text, known)
    changed = json.loads(text)
    changed["tasks"][0]["evaluation"][3][1] += 1  # a tenth of a millimetre
    with pytest.raises(InputError, match="were changed"):
        spread.parse(suite, json.dumps(changed), known)
    with pytest.raises(SourceDamaged, match=r"libero_spatial_spread, version 1"):
        spread.parse("libero_spatial_spread", text, known)
    with pytest.raises(SourceDamaged, match="cannot be read"):
        spread.parse(suite, text[:-200], known)


def test_a_task_without_placements_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    first = spread.task_spread("libero_object_spread", 0)
    others = spread.SpreadList(
        version=1, suite="libero_object_spread", base="libero_object", unit="", distribution="", tasks=(first,)
    )
    monkeypatch.setattr(spread, "_read", lambda _: others)
    with pytest.raises(UnknownName, match="spread_draw --suite libero_object_spread --tasks 11"):
        spread.task_spread("libero_object_spread", 11)
