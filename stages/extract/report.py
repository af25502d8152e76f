"""What an extraction tells: a line of progress, a log in JSON lines, and the numbers of the run beside the manifest."""

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import geomcache
from geomcache.cache_schemas.manifest import EXTRACTION_NAME, ExtractionRecord, ShardCommit
from geomcache.pipeline.files import write_atomic

LOG_NAME = "extract.jsonl"  # one event a line, appended by every run
_STAGES = ("decode", "encode", "store", "write")
_SHOWN_WORKERS = 4


class RunLog:
    """Counts what workers say.

    Args:
        out: the cache's folder; None: nothing is written.
        progress: called with (rows done, rows in all, text).
        rows: of the cache. done: rows that stood before.
    """

    def __init__(self, out: Path | None, progress: Callable[..., None], rows: int, done: int) -> None:
        self._out, self._progress, self._all, self._committed = out, progress, rows, done
        self._began = time.perf_counter()
        self._ready: float | None = None
        self._last = self._began  # when a shard was finished
        self._in_work = 0
        self._finished: set[int] = set()  # shards; what a worker says may be a second old
        self.encoded = 0
        self.rows_not_finite = 0
        self.masked: dict[int, str] = {}
        self.slot_deviation: float | None = None
        self._busy: Counter[str] = Counter()
        self._states: dict[str, dict[str, Any]] = {}  # of every worker that ever answered, dead ones too
        self._alive: list[str] = []
        progress(done, rows)

    def event(self, event: str, **values: Any) -> None:
        """Append a line to the log."""
        if self._out is None:
            return
        line = {"time": round(time.time(), 3), "event": event, **values}
        with (self._out / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def begin(self, workers: int, device: str, shards: int) -> None:
        """The run's first line."""
        versions = {"geomcache": geomcache.__version__, "torch": torch.__version__, "python": platform.python_version()}
        self.event("begin", workers=workers, device=device, shards=shards, rows=self._all, **versions)

    def watch(self, states: Sequence[dict[str, Any] | None]) -> None:
        """Take what the workers say; called about every second."""
        if self._ready is None:
            self._ready = time.perf_counter()
        answered = [state for state in states if state is not None]
        for state in answered:
            if state["worker"] not in self._states:
                self.event("worker", worker=state["worker"], slot_deviation=state["slot_deviation"])
            if state["slot_deviation"] is not None:  # one that was started again measures after its first answer
                self.slot_deviation = max(state["slot_deviation"], self.slot_deviation or 0.0)
            self._states[state["worker"]] = state
        gone = set(self._alive) - {state["worker"] for state in answered}
        for worker in sorted(gone):
            self.event("worker lost", worker=worker, shards=list(self._states[worker]["shards"]))
        self._alive = [state["worker"] for state in answered]
        in_work = [each for state in answered for each in state["shards"].items()]
        self._in_work = sum(rows for shard, rows in in_work if shard not in self._finished)
        self._show()

    def shard(self, commit: ShardCommit, masked: dict[int, str], worker: str) -> None:
        """Count a finished shard."""
        self._committed += commit.rows
        self._last = time.perf_counter()
        self._finished.add(commit.shard)
        self._busy.update(commit.seconds)
        self._in_work = max(0, self._in_work - commit.rows)
        self.rows_not_finite += commit.invalid_rows
        self.encoded += commit.rows
        self.masked |= masked
        seconds = {stage: round(spent, 4) for stage, spent in commit.seconds.items()}
        self.event("shard", shard=commit.shard, rows=commit.rows, worker=worker, seconds=seconds)
        for row, problem in masked.items():
            self.event("masked", row=row, problem=problem)
        self._show()

    @property
    def start_seconds(self) -> float:
        """Until every worker was ready."""
        return (self._ready if self._ready is not None else self._began) - self._began

    @property
    def rows_per_second(self) -> float:
        """Since every worker was ready, until the last shard while none is in work; rows of unfinished shards count."""
        now = time.perf_counter() if self._in_work else self._last
        since = now - (self._ready if self._ready is not None else self._began)
        return (self.encoded + self._in_work) / since if since > 0 else 0.0

    @property
    def busy_seconds(self) -> dict[str, float]:
        """Of each stage, over all workers, of this run's finished shards."""
        return {stage: round(self._busy[stage], 3) for stage in _STAGES}

    def _show(self) -> None:
        busy: Counter[str] = Counter()  # as workers say, so that there is something before the first shard is finished
        for state in self._states.values():
            busy.update(state["seconds"])
        spent = sum(busy.values())
        shares = ", ".join(f"{stage} {busy[stage] / spent:.0%}" for stage in _STAGES) if spent else "starting"
        workers = []
        for name in self._alive[:_SHOWN_WORKERS]:
            shards = self._states[name]["shards"]
            workers.append(" ".join(f"{shard}:{rows}" for shard, rows in shards.items()) or "idle")
        more = f" | +{len(self._alive) - _SHOWN_WORKERS} workers" if len(self._alive) > _SHOWN_WORKERS else ""
        text = f"{self.rows_per_second:.3g} rows/s | {shares} | shard:rows {' | '.join(workers)}{more}"
        self._progress(min(self._committed + self._in_work, self._all), self._all, text)


def write_record(out: Path, record: ExtractionRecord) -> None:
    """Keep the numbers of this run beside the manifest; ``geomcache cache info`` shows them."""
    write_atomic(out / EXTRACTION_NAME, record.model_dump_json(indent=2))
