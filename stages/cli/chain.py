"""What ``quickstart`` and ``proof`` share: the parts before training, parts side by side, what a part has cost."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from geomcache.cache_schemas.errors import TrainingFailed
from geomcache.stages.cli.common import progress_bar, say

if TYPE_CHECKING:
    from geomcache.configs.schema import ChainConfig, PackConfig
    from geomcache.pipeline.sim.recorder import Config as DemosConfig
    from geomcache.stages.evaluate.report.proof import Cost
    from geomcache.stages.extract.plan import ExtractConfig

Progress = Callable[..., None]
Part = Callable[[Progress], bool]  # does its work; returns whether it was finished before with the same inputs
Job = Sequence[tuple[str, Part]]  # parts with their titles, one after the other

_TOLD_AGAIN_SECONDS = 5.0  # between two signals to a process whose parent is gone
_COST_SECONDS = 15.0  # of work whose cost is lost at most when a process is killed


def demos_config(settings: "ChainConfig") -> "DemosConfig":
    """Of the recorder."""
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.pipeline.sim.recorder import Config

    return parse_config(Config, settings.demos, "demos")


def demos(settings: "ChainConfig", progress: Progress) -> bool:
    """Record demonstrations into ``out/demos``."""
    from geomcache.pipeline.sim.recorder import record
    from geomcache.stages.cli.demos import attempts_shown, require_all

    config = demos_config(settings)
    summary = record(config, settings.out / "demos", attempts_shown(progress, config))
    require_all(summary)
    return summary.attempted == 0


def pack_config(settings: "ChainConfig") -> "PackConfig":
    """Of the pack of those demonstrations."""
    from geomcache.configs.schema import PackConfig
    from geomcache.pipeline.config_errors import parse_config

    paths = {"sources": [settings.out / "demos"], "out": settings.out / "pack"}
    return parse_config(PackConfig, {**settings.pack, **paths}, "pack")


def pack(settings: "ChainConfig", progress: Progress) -> bool:
    """Pack them into ``out/pack``."""
    from geomcache.stages.cli.pack import build_from

    return build_from(pack_config(settings), progress)[1]


def extract_config(settings: "ChainConfig", name: str) -> "ExtractConfig":
    """Of the cache ``name``."""
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.stages.extract.plan import ExtractConfig

    paths = {"pack": settings.out / "pack", "out": settings.out / "caches" / name}
    return parse_config(ExtractConfig, {"encoder": name, **settings.extract[name], **paths}, f"extract {name}")


def extract(settings: "ChainConfig", name: str, progress: Progress) -> bool:
    """Extract the cache ``name`` into ``out/caches``."""
    from geomcache.stages.extract.run import run

    return run(extract_config(settings, name), progress).rows_encoded == 0


def check(settings: "ChainConfig") -> None:
    """Refuse a wrong setting of these parts, and a folder of another command."""
    from geomcache.pipeline import plugins
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.pipeline.files import require_config_slot

    require_config_slot(settings.out, type(settings))
    demos_config(settings)
    pack_config(settings)
    for name in settings.extract:
        config = extract_config(settings, name)
        parse_config(plugins.config_class("encoder", config.encoder), config.encoder_config, f"encoder {name}")


def run_part(title: str, part: Part) -> None:
    """A bar while a part runs, one line when it is over."""
    started = time.perf_counter()
    with progress_bar(title) as progress:
        stood = part(progress)
    _over(title, stood, time.perf_counter() - started)


def _over(title: str, stood: bool, seconds: float) -> None:
    say(f"{title}: " + ("finished before with the same inputs, skipped" if stood else f"done in {seconds:.0f} s"))


def side_by_side(jobs: Sequence[Job], processes: int, threads: int) -> None:
    """Work through jobs in order, each part in one of ``processes`` with ``threads`` of its own.

    Small networks gain little from a second thread and lose much to it on shared cores; a second process is all gain.
    When a part fails no other is begun; those that run are waited for, since they are work.

    Raises:
        TrainingFailed: a process was killed.
        BaseException: what a part has raised.
    """
    context = multiprocessing.get_context("spawn")  # neither torch nor an EGL context survives a fork
    with ProcessPoolExecutor(processes, context, initializer=_begin_process, initargs=(threads,)) as pool:
        try:
            _work_through(pool, [list(job) for job in jobs], processes)
        except (KeyboardInterrupt, SystemExit):  # a signal may have reached this process alone
            for process in multiprocessing.active_children():
                process.terminate()  # trainings save first
            raise


def _work_through(pool: ProcessPoolExecutor, waiting: list[list[tuple[str, Part]]], processes: int) -> None:
    running: dict[Future[tuple[bool, float]], tuple[str, list[tuple[str, Part]]]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            (title, part), *rest = waiting.pop(0)
            running[pool.submit(_timed, title, part)] = title, rest
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            try:
                stood, seconds = future.result()
            except BrokenProcessPool as problem:
                raise TrainingFailed(
                    f"a process was killed at {' or '.join(title for title, _ in running.values())}",
                    found="no result (out of memory?)",
                    fix="run the same command again; it continues from the last checkpoint or episode",
                ) from problem
            title, rest = running.pop(future)
            _over(title, stood, seconds)
            if rest:
                waiting.insert(0, rest)


def _begin_process(threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process; only the parent says so
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ask this process to save and end, as a scheduler would: its parent is dead, another will need its locks."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "in a child only"
    parent.join()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_TOLD_AGAIN_SECONDS)


def _timed(title: str, part: Part) -> tuple[bool, float]:
    started = time.perf_counter()
    with progress_bar(title, lines=True) as progress:
        return part(progress), time.perf_counter() - started


def with_cost(path: Path, folder: Path, part: Part, progress: Progress) -> bool:
    """Do a part and add what it cost to the file ``path``; every try counts, also those that were stopped.

    Args:
        path: of the record, ``Cost``.
        folder: what the part makes: where it is not there, an older record is of something else.
        part: that runs in this process; its CPU seconds are those of the process.
        progress: of the part.
    """
    from geomcache.pipeline.files import write_atomic
    from geomcache.stages.evaluate.report.proof import Cost

    before = (read_cost(path) if folder.exists() else None) or Cost()
    wall, cpu = time.perf_counter(), time.process_time()
    due = time.monotonic() + _COST_SECONDS

    def write() -> None:
        cost = Cost(
            wall_seconds=round(before.wall_seconds + time.perf_counter() - wall, 1),
            cpu_seconds=round(before.cpu_seconds + time.process_time() - cpu, 1),
        )
        write_atomic(path, cost.model_dump_json())

    def report(*arguments: object) -> None:
        nonlocal due
        progress(*arguments)
        if time.monotonic() > due:
            due = time.monotonic() + _COST_SECONDS
            write()

    stood = False
    try:
        stood = part(report)
    finally:
        if not stood:
            write()
    return stood


def read_cost(path: Path) -> "Cost | None":
    """What a part has cost so far; None where it was never begun."""
    from geomcache.cache_schemas.errors import InputError
    from geomcache.stages.evaluate.report.proof import Cost

    return Cost.parse(path.read_bytes(), str(path), InputError) if path.exists() else None
