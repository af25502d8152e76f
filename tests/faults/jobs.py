"""What the processes of these tests do, how they are started and killed, and what must hold of a cache afterwards.

Non-obvious: children come from multiprocessing's fork server, which has imported everything once: 200 real processes
that each run for a few milliseconds are affordable. They import this file, so the repository must be on their path.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from geomcache.cache_schemas.errors import CacheLocked, CacheMissing
from geomcache.cache_schemas.layout import shard_rows
from geomcache.cache_schemas.manifest import EXTRACTION_NAME
from geomcache.pipeline.files import write_config
from geomcache.pipeline.store.lock import write_lock
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.verify import verify_cache
from geomcache.stages.extract.derive import DeriveConfig
from geomcache.stages.extract.derive import derive as run_derive
from geomcache.stages.extract.plan import ExtractConfig, begin, make_plan
from geomcache.stages.extract.report import LOG_NAME
from geomcache.stages.extract.worker import ShardWorker
from tests.conftest import nothing

ROOT = Path(__file__).parent.parent.parent
HANG_SECONDS = 60

# System calls that change what is on disk: a process can be killed right before each of them.
_CHANGES = {"mkdir", "flush", "writev", "pwrite", "ftruncate", "fsync", "replace", "unlink", "flock"}


def extract_config(pack: Path, out: Path, codec: str, grid: tuple[int, int] = (4, 4)) -> ExtractConfig:
    return ExtractConfig(pack=pack, out=out, encoder_config={"grid": grid, "batch_size": 3}, codec=codec, device="cpu")


def extract(pack: Path, out: Path, codec: str, grid: tuple[int, int] = (4, 4)) -> None:
    """``geomcache extract`` without Ray: the same lock, plan, worker and commits."""
    config = extract_config(pack, out, codec, grid)
    with write_lock(out, "geomcache extract"):
        plan = begin(make_plan(config))
        write_config(out, config)
        worker = ShardWorker(pack, out, plan.manifest, plan.device)
        for shard in plan.remaining:
            worker.run(shard)
        worker.close()


def derive(source: Path, out: Path, progress: Callable[[int, int], None] = nothing) -> None:
    """``geomcache cache derive --codec int8``."""
    run_derive(DeriveConfig(cache=str(source), out=out, codec="int8"), progress)


def derive_slowly(source: Path, out: Path, seconds: float) -> None:
    """``derive`` with a pause after each shard."""
    derive(source, out, lambda *_: time.sleep(seconds))


def repair(cache: Path) -> None:
    """``geomcache cache verify --repair``."""
    verify_cache(cache, repair=True, progress=nothing)


class _DieBefore:
    """A profile function: kill -9 of this process right before its n-th change on disk."""

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0

    def __call__(self, _frame: object, event: str, call: Any) -> None:
        if event == "c_call" and call.__name__ in _CHANGES:
            self.count += 1
            if self.count == self.number:
                os.kill(os.getpid(), signal.SIGKILL)


def _child(pipe: Connection, die_before: int, task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    counter = _DieBefore(die_before)
    pipe.send("begins")
    if die_before:
        sys.setprofile(counter)
    try:
        task(*arguments)
    except CacheLocked as problem:
        pipe.send(str(problem))
    else:
        pipe.send(counter.count)
    finally:
        sys.setprofile(None)


class Child:
    """A process that runs ``task(*arguments)``; ``die_before`` > 0: until its n-th change on disk."""

    def __init__(self, task: Callable[..., None], *arguments: Any, die_before: int = 0) -> None:
        self.pipe, theirs = _context.Pipe()
        self.process: BaseProcess = _context.Process(target=_child, args=(theirs, die_before, task, arguments))
        self.process.start()
        theirs.close()
        assert self.pipe.poll(HANG_SECONDS), "the process does not start"
        assert self.pipe.recv() == "begins"

    def kill(self) -> bool:
        """kill -9; whether it was still at work."""
        self.process.kill()
        return self.killed()

    def killed(self) -> bool:
        """Wait for its end; whether it was killed. Any other end than that or a good one is an error."""
        self.process.join(HANG_SECONDS)
        assert self.process.exitcode in (0, -signal.SIGKILL), f"exit code {self.process.exitcode}"
        return self.process.exitcode != 0

    def answer(self) -> Any:
        """How many changes it made on disk (with ``die_before``), or why it was refused."""
        assert self.pipe.poll(HANG_SECONDS), "the process hangs"
        found = self.pipe.recv()
        assert not self.killed()
        return found


def _fork_server() -> Any:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # handed to the children, which import this file
    context = multiprocessing.get_context("forkserver")
    rooms = ["stages.extract.run", "stages.extract.derive", "pipeline.encoders.oracle_pointmap"]
    rooms += [f"pipeline.codecs.{codec}" for codec in ("bf16", "int8", "lossless")]
    context.set_forkserver_preload(["pytest", *[f"geomcache.{room}" for room in rooms]])
    return context


_context = _fork_server()


def contents(cache: Path) -> dict[str, object]:
    """Every file below a cache, also hidden, temporary and lock files; less what differs between two equal runs."""
    found: dict[str, object] = {}
    for path in cache.rglob("*"):
        name = str(path.relative_to(cache))
        if path.is_dir() or name == "config.yaml":  # names the folder
            continue
        found[name] = path.read_bytes()
        if path.parent.name == "commits" and path.suffix == ".json":
            record = json.loads(path.read_bytes())
            found[name] = {key: value for key, value in record.items() if key not in ("seconds", "sha256")}
    return found


def differences(cache: Path, truth: Path) -> list[str]:
    """Files that one of the two has not, or has with other bytes; but what tells how it was made."""
    mine, theirs = contents(cache), contents(truth)
    names = (mine.keys() | theirs.keys()) - {LOG_NAME, EXTRACTION_NAME}
    return sorted(name for name in names if mine.get(name) != theirs.get(name))


def unsound(cache: Path, truth: Path) -> list[str]:
    """What is wrong with an unfinished cache: it must open, be clean, and its committed rows must be the true ones."""
    if not (cache / "manifest.json").exists():
        try:
            CachedTokens(cache, partial=True)
        except CacheMissing:
            return []
        return ["it opens without a manifest"]
    result = verify_cache(cache, repair=False, progress=nothing)
    wrong = [f"verify: {result.damaged} {result.metadata}"] if result.damaged or result.metadata else []
    with CachedTokens(cache, partial=True) as reader, CachedTokens(truth) as true:
        rows = [
            row for shard in reader.commits for row in shard_rows(shard, len(reader), reader.manifest.rows_per_shard)
        ]
        if not torch.equal(reader.tokens(rows), true.tokens(rows)):
            wrong.append("committed rows are not the true ones")
    return wrong
