"""The episodes of an evaluation on disk: a line each in ``episodes.jsonl``, and the files that are made of them."""

import os
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.files import atomic_writer, write_all, write_atomic
from geomcache.pipeline.sim import suites
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.results import (
    EVALUATION_NAME,
    JOURNAL_NAME,
    PARQUET_NAME,
    RESULTS_NAME,
    Conditions,
    EpisodeKey,
    EpisodeResult,
    EvalResults,
    Evaluation,
    Success,
    SuiteResult,
    read_results,
    task_results,
    told_results,
)


class Journal:
    """Finished episodes; those of a stopped evaluation are read back.

    Args:
        config: of the evaluation.
        conditions: what else an episode depends on.
        wanted: keys of all its episodes.

    Raises:
        InputError: the folder holds results of another evaluation, or episodes that are not asked for.
    """

    def __init__(self, config: EvalConfig, conditions: Conditions, wanted: Collection[EpisodeKey]) -> None:
        self._config, self._conditions = config, conditions
        self._size: int | None = None  # bytes of whole lines in the journal
        self.done: dict[EpisodeKey, EpisodeResult] = {}
        if not (config.out / EVALUATION_NAME).exists():
            return
        standing = Evaluation.read(config.out / EVALUATION_NAME, InputError)
        results = _readable_results(config.out)
        if results is not None and results.episodes and not (config.out / JOURNAL_NAME).exists():
            raise InputError(
                f"{config.out / JOURNAL_NAME} is gone",
                expected=f"the {len(results.episodes)} episodes of {RESULTS_NAME}, a line each",
                found="no such file",
                fix="put it back, or choose another --out",
            )
        self.done = {episode.key: episode for episode in _read_lines(config.out / JOURNAL_NAME)}
        differences = standing.config.identity().describe_difference(config.identity())
        differences += standing.conditions.describe_difference(conditions)
        extra = self.done.keys() - wanted
        if extra and not differences:
            raise InputError(
                f"{config.out} holds what is asked for, and {len(extra)} episodes more",
                expected="at least the suites, tasks, episodes and seeds that were played",
                found=f"fewer: {len(wanted)} episodes",
                fix=f"geomcache report {config.out} shows them all; or choose another --out",
            )
        if differences and self.done:
            raise InputError(
                f"{config.out} holds results of another evaluation",
                expected="the same configuration and checkpoint, to continue it (more tasks, episodes or seeds may be "
                "added)",
                found="; ".join(differences),
                fix="choose another --out",
            )

    def begin(self) -> None:
        """Write down which evaluation this is; the folder is there."""
        record = Evaluation(config=self._config, conditions=self._conditions)
        write_atomic(self._config.out / EVALUATION_NAME, record.model_dump_json(indent=2))
        self.write_results(finished=False)

    def add(self, episode: EpisodeResult) -> None:
        """Append an episode; it is on the disk when this returns."""
        line = episode.model_dump_json().encode() + b"\n"
        path = self._config.out / JOURNAL_NAME
        with path.open("ab") as file:
            if self._size is None:
                self._size = len(_whole_lines(path))
            file.truncate(self._size)  # less a line that a kill or a full disk has cut
            write_all(file.fileno(), [line])
            os.fsync(file.fileno())
        self._size += len(line)
        self.done[episode.key] = episode

    def is_first_failure(self, suite: str, task: int, seed: int, init_state: int) -> bool:
        """Whether no failure of the task comes before this one."""
        order = list(self._config.seeds)
        mine = order.index(seed), init_state
        return not any(
            (order.index(one.seed), one.init_state) < mine
            for one in self.done.values()
            if (one.suite, one.task, one.success) == (suite, task, False)
        )

    def standing_results(self) -> EvalResults:
        """Of a finished evaluation, written anew only where a kill came before that."""
        standing = _readable_results(self._config.out)
        if standing is not None and standing.finished and len(standing.episodes) == len(self.done):
            return standing
        return self.write_results(finished=True)

    def write_results(self, *, finished: bool) -> EvalResults:
        """Write results.json and episodes.parquet of what is done."""
        config = self._config
        place = {seed: number for number, seed in enumerate(config.seeds)}
        episodes = sorted(
            self.done.values(),
            key=lambda one: (config.suites.index(one.suite), one.task, place[one.seed], one.init_state),
        )
        results = EvalResults(
            config=config,
            conditions=self._conditions,
            finished=finished,
            overall=Success(**Success.counts(episodes)),
            told=told_results(episodes),
            suites=tuple(
                SuiteResult(suite=suite, horizon=config.horizon or suites.horizon(suite), **Success.counts(own))
                for suite in config.suites
                if (own := [episode for episode in episodes if episode.suite == suite])
            ),
            tasks=task_results(episodes),
            episodes=tuple(episodes),
        )
        _write_parquet(config.out / PARQUET_NAME, episodes)
        write_atomic(config.out / RESULTS_NAME, results.model_dump_json(indent=2))
        return results


def _readable_results(folder: Path) -> EvalResults | None:
    """None where there are none, or damaged ones: they are made again of the journal."""
    try:
        return read_results(folder) if (folder / RESULTS_NAME).exists() else None
    except InputError:
        return None


def _read_lines(path: Path) -> list[EpisodeResult]:
    """Their episodes."""
    episodes = []
    for number, line in enumerate(_whole_lines(path).splitlines()):
        try:
            episodes.append(EpisodeResult.model_validate_json(line))
        except ValidationError as problem:
            raise InputError(
                f"{path} is damaged",
                expected="an episode's record in each line",
                found=f"line {number + 1}: {problem.errors()[0]['msg']}",
                fix=f"delete that line; its episode is played again (sed -i {number + 1}d {path})",
            ) from problem
    return episodes


def _whole_lines(path: Path) -> bytes:
    """Without a last line that a kill has cut."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def _write_parquet(path: Path, episodes: list[EpisodeResult]) -> None:
    """One row an episode; nested records become columns with a dot."""
    rows = [_flat(episode.model_dump(mode="json")) for episode in episodes]
    columns: dict[str, None] = {name: None for row in rows for name in row}  # an episode without a grasp has fewer
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    with atomic_writer(path) as file:
        pq.write_table(table, file)


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = value
    return flat
