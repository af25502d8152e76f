"""Playing many episodes with a crew: who plays which, whose observation is answered when, who must be replaced."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.pipeline.frames import Observation
from geomcache.stages.evaluate.crew import POLICY, Broken, Crew
from geomcache.stages.evaluate.live_policy import noise_seed
from geomcache.stages.evaluate.policy_worker import Answer
from geomcache.stages.evaluate.simulator import Episode, Played, Turn

_LOOK_SECONDS = 1.0
_START_SECONDS = 120.0  # beside ``hang_seconds``: for a new process, its imports and its first scene
POLICY_SECONDS = 900.0  # for loading weights, or for one answer; a large policy on a CPU is slow
_POLICY_DEATHS = 2  # in a row that are made good
_TRIES = 3  # of one episode whose simulators break; then it is left out
_BREAKS_IN_A_ROW = 3  # without a turn in between: something is wrong with every simulator


@dataclass
class Finished:
    """An episode that was played to its end."""

    episode: Episode
    played: Played
    queries: int
    restarts: int  # simulators that broke over it
    seconds: dict[str, float]  # reset, physics, rendering, encoder, vlm, head, total


@dataclass
class _Playing:
    """An episode in work."""

    episode: Episode
    started: float
    asked: float  # since when its simulator owes an answer, by the clock of listening
    queries: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("encoder", "vlm", "head"), 0.0))


class Play:
    """Plays episodes; iterate over ``results()``.

    Args:
        crew: the simulators and the policy.
        episodes: in the order in which results are wanted, roughly.
        batch: the most observations that the policy is given at once.
        hang_seconds: a simulator that owes an answer for longer is replaced.
    """

    def __init__(self, crew: Crew, episodes: Sequence[Episode], *, batch: int, hang_seconds: float) -> None:
        self._crew, self._batch, self._hang = crew, batch, hang_seconds
        self._todo = deque(episodes)
        self._idle = deque(range(crew.simulators))
        self._playing: dict[int, _Playing] = {}
        self._last_task: dict[int, tuple[str, int]] = {}  # its simulator stands already
        self._started: set[int] = set()  # those that have answered since their process began
        self._waiting: deque[tuple[int, Observation]] = deque()  # for the policy
        self._asked: list[tuple[int, _Playing]] = []  # whom the policy is answering
        self._questions: list[tuple[int, Observation]] = []  # what it was asked
        self._policy_asked = 0.0  # since when
        self._policy_deaths = 0  # in a row
        self._listened = 0.0  # seconds; a clock that stands still while nobody listens, so a pause is no hang
        self._breaks: dict[Episode, list[str]] = {}
        self._breaks_in_a_row = 0

    def results(self, on_turn: Callable[[], None]) -> Iterator[Finished]:
        """Yield episodes as they end; ``on_turn`` is called whenever something has happened.

        Raises:
            InputError: simulators break whatever they play; or, when all the others are done, over some episodes.
            GeomcacheError: what a simulator or the policy raised.
        """
        while self._todo or self._playing:
            self._hand_out()
            self._ask_policy()
            began = time.monotonic()
            answers = self._crew.answers(_LOOK_SECONDS)
            self._listened += min(time.monotonic() - began, 2 * _LOOK_SECONDS)  # more: the process was stopped
            for who, answer in answers:
                if who == POLICY:
                    self._take_answer(answer)
                elif isinstance(answer, Broken):
                    self._replace(who, str(answer))
                elif isinstance(answer, GeomcacheError | OSError):
                    raise answer
                elif (finished := self._take_turn(who, answer)) is not None:
                    yield finished
            self._replace_hung()
            on_turn()
        hopeless = {episode: said for episode, said in self._breaks.items() if len(said) >= _TRIES}
        if hopeless:
            raise self._all_broken(f"{len(hopeless)} episodes could not be played", hopeless)

    @property
    def now(self) -> str:
        """What is being played, for a progress bar."""
        return ", ".join(
            f"task {one.episode.task} state {one.episode.init_state} query {one.queries}"
            for one in self._playing.values()
        )

    def _hand_out(self) -> None:
        while self._idle and self._todo:
            who = self._idle.popleft()
            episode = self._choose(who)
            self._playing[who] = _Playing(episode, started=time.monotonic(), asked=self._listened)
            self._last_task[who] = episode.suite, episode.task
            self._crew.call(who, "begin", episode)

    def _choose(self, who: int) -> Episode:
        """One of its own task, whose scene it has built; else of a task nobody plays; else the first."""
        own = self._last_task.get(who)
        others = {(one.episode.suite, one.episode.task) for one in self._playing.values()}
        for wanted in (lambda task: task == own, lambda task: task not in others):
            for place, episode in enumerate(self._todo):
                if wanted((episode.suite, episode.task)):
                    del self._todo[place]
                    return episode
        return self._todo.popleft()

    def _ask_policy(self) -> None:
        if self._asked or not self._waiting:
            return
        chosen = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
        self._questions, self._asked = chosen, [(who, self._playing[who]) for who, _ in chosen]
        self._policy_asked = self._listened
        seeds = [
            noise_seed(
                one.episode.seed, f"{one.episode.suite}/{one.episode.task}/{one.episode.init_state}", one.queries
            )
            for _, one in self._asked
        ]
        self._crew.call(POLICY, "act", [observation for _, observation in chosen], seeds)

    def _take_answer(self, given: Answer | Exception) -> None:
        if isinstance(given, Broken) and self._policy_deaths < _POLICY_DEATHS:
            # A new one loads the weights, and is asked the same; noise belongs to the query, so nothing changes.
            self._policy_deaths += 1
            self._crew.replace(POLICY)
            self._waiting.extendleft(reversed(self._questions))
            self._asked = []
            return
        answer: Answer = answered(given)
        self._policy_deaths = 0
        asked, self._asked = self._asked, []
        for (who, playing), chunk_TA in zip(asked, answer.chunks_BTA, strict=True):
            for part, seconds in answer.seconds.items():
                playing.seconds[part] += seconds / len(asked)
            playing.queries += 1
            playing.asked = self._listened
            self._crew.call(who, "advance", chunk_TA)

    def _take_turn(self, who: int, turn: Turn) -> Finished | None:
        self._breaks_in_a_row = 0
        self._started.add(who)
        if isinstance(turn, Observation):
            self._waiting.append((who, turn))
            return None
        playing = self._playing.pop(who)
        self._idle.append(who)
        seconds = {**turn.seconds, **playing.seconds, "total": time.monotonic() - playing.started}
        restarts = len(self._breaks.pop(playing.episode, ()))
        return Finished(playing.episode, turn, playing.queries, restarts, seconds)

    def _owing(self) -> set[int]:
        """Simulators that owe an answer; the others wait for the policy."""
        return self._playing.keys() - {who for who, _ in self._waiting} - {who for who, _ in self._asked}

    def _replace_hung(self) -> None:
        if self._asked and self._listened - self._policy_asked > POLICY_SECONDS:
            raise policy_silent("does not answer", "")
        for who in self._owing() if self._crew.can_replace else ():
            limit = self._hang + (0.0 if who in self._started else _START_SECONDS)
            if self._listened - self._playing[who].asked > limit:
                self._replace(who, f"no answer for {limit:g} s")

    def _replace(self, who: int, said: str) -> None:
        """A simulator broke: another takes its place, its episode is played again from the start."""
        episode = self._playing.pop(who).episode
        self._breaks.setdefault(episode, []).append(said)
        self._breaks_in_a_row += 1
        if self._breaks_in_a_row >= _BREAKS_IN_A_ROW:
            raise self._all_broken("simulators break again and again", self._breaks)
        self._crew.replace(who)
        self._last_task.pop(who, None)
        self._started.discard(who)
        self._idle.append(who)
        if len(self._breaks[episode]) < _TRIES:
            self._todo.append(episode)  # the others first: it may be the episode

    def _all_broken(self, what: str, breaks: dict[Episode, list[str]]) -> InputError:
        episode, said = next(iter(breaks.items()))
        return InputError(
            what,
            expected=f"at most {_TRIES - 1} broken simulators over one episode",
            found=f"{episode.suite} task {episode.task}, initial state {episode.init_state}: {said[-1]}",
            fix="memory (dmesg), the graphics driver (MUJOCO_GL=osmesa needs none) and Ray itself are the usual "
            "causes, --set hang_seconds=... helps a slow machine; the same command continues with what is "
            "finished",
        )


def answered(answer: Any) -> Any:
    """What the policy answered; its error, raised."""
    if isinstance(answer, Broken):
        raise InputError(
            "the policy failed",
            expected="an answer",
            found=str(answer),
            fix="the same command continues; if memory ran out: other programs of the machine, fewer --workers, "
            "--set batch_size=1",
        )
    if isinstance(answer, Exception):
        raise answer
    return answer


def policy_silent(what: str, found: str) -> InputError:
    """It owes an answer for too long."""
    return InputError(
        f"the policy {what}",
        expected=f"within {POLICY_SECONDS:.0f} s",
        found=found or "nothing",
        fix="ray status says whether the cluster has room; the same command continues with what is finished",
    )
