"""What an evaluation found: the records of results.json, and how they are summed up.

While an evaluation runs, each finished episode is a line of ``episodes.jsonl``; ``results.json`` and
``episodes.parquet`` are made of them at the end, and whenever it stops.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from geomcache.cache_schemas.base import Schema, VersionedSchema
from geomcache.cache_schemas.errors import InputError
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.corruption import Drawn
from geomcache.stages.evaluate.corruption import EpisodeKey as EpisodeKey
from geomcache.stages.evaluate.metrics import GraspMetrics, MotionMetrics
from geomcache.stages.evaluate.statistics import wilson_interval

RESULTS_NAME, JOURNAL_NAME, PARQUET_NAME = "results.json", "episodes.jsonl", "episodes.parquet"
EVALUATION_NAME = "evaluation.json"


class EpisodeSeconds(Schema):
    """Where the wall time of one episode went, in seconds."""

    reset: float  # making the scene and settling it
    physics: float  # control steps
    rendering: float
    encoder: float  # the geometry model and the codec
    vlm: float  # packing images and text, and the VLM
    head: float  # compressor, DiT, denormalisation
    total: float

    @property
    def other(self) -> float:
        """Transport, waiting for the policy, records."""
        return self.total - self.reset - self.physics - self.rendering - self.encoder - self.vlm - self.head


class EpisodeResult(Schema):
    """One episode."""

    suite: str
    task: int
    task_name: str
    instruction: str
    init_state: int
    init_state_digest: str | None = None  # of the state's numbers; None: written by a geomcache that did not say
    seed: int
    success: bool
    steps: int  # control steps after settling
    queries: int
    restarts: int = 0  # simulators that died or hung over this episode before it was finished
    drawn: Drawn = Drawn()  # for the camera orbit and the rulers
    # The goal of the task that the policy was told about instead held at a step; None: it was told its own, or the
    # scene has not what the other is about.
    told_success: bool | None = None
    motion: MotionMetrics | None  # None: too few steps
    grasp: GraspMetrics | None  # None: the task has nothing to grasp
    seconds: EpisodeSeconds
    versions: dict[str, str]  # package -> version
    fingerprints: dict[str, str]  # of the checkpoint, the encoder's weights, the contract

    @property
    def key(self) -> EpisodeKey:
        """What makes it this episode."""
        return self.suite, self.task, self.init_state, self.seed


class Success(Schema):
    """Successes of some episodes, with the 95 % Wilson interval of the rate."""

    episodes: int
    successes: int
    rate: float
    low: float
    high: float

    @classmethod
    def counts(cls, episodes: Iterable[EpisodeResult]) -> dict[str, float]:
        """The fields for ``episodes``."""
        return cls.of([episode.success for episode in episodes])

    @staticmethod
    def of(found: Sequence[bool]) -> dict[str, float]:
        """The fields for episodes that succeeded or not."""
        low, high = wilson_interval(sum(found), len(found))
        rate = sum(found) / max(1, len(found))
        return {"episodes": len(found), "successes": sum(found), "rate": rate, "low": low, "high": high}


class TaskResult(Success):
    """One task, over its initial states and seeds."""

    suite: str
    task: int
    instruction: str


class SuiteResult(Success):
    """One suite, over its tasks."""

    suite: str
    horizon: int  # control steps


class Conditions(Schema):
    """What episodes depend on beside the settings; an evaluation is continued under the same ones."""

    checkpoint_weights: str  # digest of the checkpoint's weights, the averaged ones included
    checkpoint_step: int
    geomcache_version: str
    mode: Literal["reproducible", "throughput"]
    batch_size: int | None  # of every query of the policy; None: throughput
    device: str  # cpu or cuda


class Evaluation(VersionedSchema):
    """evaluation.json: which evaluation a folder is of; written before its first episode."""

    config: EvalConfig
    conditions: Conditions


class EvalResults(VersionedSchema):
    """results.json."""

    config: EvalConfig
    conditions: Conditions
    finished: bool
    overall: Success
    told: Success | None = None  # of what the policy was told instead of its task, in episodes where that is possible
    suites: tuple[SuiteResult, ...]
    tasks: tuple[TaskResult, ...]
    episodes: tuple[EpisodeResult, ...]


def task_results(episodes: Sequence[EpisodeResult]) -> tuple[TaskResult, ...]:
    """A line for every task that has episodes."""
    return tuple(
        TaskResult(suite=suite, task=task, instruction=own[0].instruction, **Success.counts(own))
        for suite, task in sorted({(episode.suite, episode.task) for episode in episodes})
        if (own := [episode for episode in episodes if (episode.suite, episode.task) == (suite, task)])
    )


def told_results(episodes: Iterable[EpisodeResult]) -> Success | None:
    """Over the episodes in which the policy was told of another task that could be done there."""
    found = [episode.told_success for episode in episodes if episode.told_success is not None]
    return Success(**Success.of(found)) if found else None


def filmstrip_name(suite: str, task: int) -> str:
    """Picture of a task's first episode, relative to the results."""
    return f"filmstrips/{suite}_{task:02d}.png"


def failure_name(suite: str, task: int) -> str:
    """Filmstrip of a task's first failure."""
    return f"filmstrips/{suite}_{task:02d}_failure.png"


def video_name(suite: str, task: int) -> str:
    """Video of a task's first episode, relative to the results."""
    return f"videos/{suite}_{task:02d}.mp4"


def read_results(folder: Path) -> EvalResults:
    """results.json of an evaluation; raises ``InputError``."""
    return EvalResults.read(folder / RESULTS_NAME, InputError)
