"""Who plays what, who is asked when, who is replaced: the loop alone, with turns that are given out in order."""

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.stages.evaluate import play as module
from geomcache.stages.evaluate.crew import POLICY, Broken
from geomcache.stages.evaluate.live_policy import noise_seed
from geomcache.stages.evaluate.play import Finished, Play
from geomcache.stages.evaluate.policy_worker import Answer
from geomcache.stages.evaluate.simulator import Episode, Played

SEEN = Observation(FrameBatch(np.zeros((1, 1, 2, 2, 3), np.uint8)), np.zeros(8, np.float32), "x")


class Turns:
    """A crew whose members answer at once: an episode takes ``turns`` queries. ``faults``: (state, try) -> what."""

    can_replace = True

    def __init__(self, simulators: int, turns: int = 2, faults: dict[tuple[int, int], Any] | None = None) -> None:
        self.simulators, self.turns, self.faults = simulators, turns, faults or {}
        self.calls: list[tuple[int, str, tuple[Any, ...]]] = []
        self.asked: list[list[int]] = []  # seeds of every query
        self.begun: list[tuple[int, Episode]] = []
        self.replaced: list[int] = []
        self._left: dict[int, int] = {}

    def call(self, who: int, method: str, *arguments: Any) -> None:
        self.calls.append((who, method, arguments))

    def answers(self, timeout: float) -> list[tuple[int, Any]]:  # noqa: ARG002 - nobody waits here
        calls, self.calls = self.calls, []
        found = [(who, self._answer(who, method, arguments)) for who, method, arguments in calls]
        if not any(answer is not None for _, answer in found):
            time.sleep(0.02)
        return [(who, answer) for who, answer in found if answer is not None]

    def replace(self, who: int) -> None:
        self.replaced.append(who)

    def _answer(self, who: int, method: str, arguments: tuple[Any, ...]) -> Any:
        if who == POLICY:
            observations, seeds = arguments
            self.asked.append(list(seeds))
            return Answer(np.zeros((len(observations), 8, 7), np.float32), {"encoder": 0.6, "vlm": 0.3, "head": 0.0})
        if method == "begin":
            (episode,) = arguments
            tries = sum(one == episode for _, one in self.begun)
            self.begun.append((who, episode))
            self._left[who] = self.turns
            fault = self.faults.get((episode.init_state, tries))
            return None if fault == "hang" else fault or SEEN
        self._left[who] -= 1
        done = Played(True, 8, None, None, {"reset": 1.0, "physics": 0.0, "rendering": 0.0}, [])
        return SEEN if self._left[who] else done


def episodes(tasks: Sequence[int] = (0,), states: int = 4) -> list[Episode]:
    return [Episode("libero_object", task, state, 7, 280) for task in tasks for state in range(states)]


def play(crew: Turns, wanted: list[Episode], *, batch: int = 1, hang: float = 100.0) -> list[Finished]:
    return list(Play(crew, wanted, batch=batch, hang_seconds=hang).results(lambda: None))


def test_every_episode_once_and_each_query_its_own_noise() -> None:
    crew, wanted = Turns(3), episodes((0, 1))
    found = play(crew, wanted, batch=2)
    assert sorted(one.episode.init_state + 10 * one.episode.task for one in found) == [0, 1, 2, 3, 10, 11, 12, 13]
    assert {one.queries for one in found} == {2}
    keys = [noise_seed(7, f"libero_object/{e.task}/{e.init_state}", query) for e in wanted for query in (0, 1)]
    assert sorted(seed for asked in crew.asked for seed in asked) == sorted(keys)
    assert max(map(len, crew.asked)) == 2
    shared = sum(one.seconds["encoder"] for one in found)
    assert shared == pytest.approx(0.6 * len(crew.asked))  # a batch's time is counted once
    assert all(one.seconds["total"] > 0 and one.restarts == 0 for one in found)


def test_a_simulator_stays_with_its_task() -> None:
    crew = Turns(2)
    play(crew, episodes((0, 1), states=5))
    tasks = {who: [episode.task for each, episode in crew.begun if each == who] for who in (0, 1)}
    assert [sum(a != b for a, b in pairwise(each)) for each in tasks.values()] == [0, 0]


def test_a_broken_simulator_is_replaced_and_its_episode_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "_START_SECONDS", 0.05)
    crew = Turns(2, faults={(0, 0): Broken("SIGSEGV"), (1, 0): "hang", (2, 0): Broken("again"), (2, 1): "hang"})
    found = play(crew, episodes(), hang=0.05)
    assert {one.episode.init_state: one.restarts for one in found} == {0: 1, 1: 1, 2: 2, 3: 0}
    assert len(crew.replaced) == 4


def test_an_episode_that_breaks_every_simulator_is_named_when_the_others_are_played() -> None:
    crew = Turns(1, faults={(1, number): Broken("ValueError: bad") for number in range(9)})
    found: list[Finished] = []
    with pytest.raises(InputError, match="1 episodes could not be played") as caught:
        found.extend(Play(crew, episodes(states=6), batch=1, hang_seconds=9).results(lambda: None))
    assert [one.episode.init_state for one in found] == [0, 2, 3, 4, 5]
    assert "initial state 1: ValueError: bad" in str(caught.value)


def test_when_all_break_it_ends_at_once() -> None:
    crew = Turns(2, faults={(state, number): Broken("no GPU") for state in range(9) for number in range(9)})
    with pytest.raises(InputError, match="again and again"):
        play(crew, episodes(states=9))
    assert len(crew.begun) <= 5


def test_a_pause_of_this_process_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """While results are written, or after Ctrl-Z, nobody listens; who has answered meanwhile is not replaced."""
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "_START_SECONDS", 0.0)
    crew = Turns(6)
    done = 0
    for _ in Play(crew, episodes(states=12), batch=4, hang_seconds=0.1).results(lambda: None):
        done += 1
        if done == 3:
            time.sleep(0.3)
    assert (done, crew.replaced) == (12, [])


def test_a_policy_that_dies_is_started_again_and_asked_the_same() -> None:
    crew, wanted = Turns(2), episodes()
    plain = Turns(2)
    play(plain, wanted)
    inner, deaths = crew._answer, iter([2, 5, 6])
    dies = next(deaths)

    def answer(who: int, method: str, arguments: tuple[Any, ...]) -> Any:
        nonlocal dies
        found = inner(who, method, arguments)
        if who == POLICY and len(crew.asked) == dies:
            dies = next(deaths, -1)
            return Broken("killed")
        return found

    crew._answer = answer  # type: ignore[method-assign]
    assert len(play(crew, wanted)) == len(wanted)
    assert crew.replaced == [POLICY] * 3
    assert {tuple(asked) for asked in crew.asked} == {tuple(asked) for asked in plain.asked}
    assert len(crew.asked) == len(plain.asked) + 3


@pytest.mark.parametrize(("answer", "said"), [(Broken("killed"), "killed"), (InputError("no such weights"), "weights")])
def test_the_policys_error_ends_it(answer: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Turns(1)
    inner = crew._answer
    monkeypatch.setattr(crew, "_answer", lambda who, *rest: answer if who == POLICY else inner(who, *rest))
    with pytest.raises(InputError, match=said):
        play(crew, episodes())
