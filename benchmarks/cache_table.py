"""``benchmarks/cache.py --engines``: other engines as feeders of a trainer, in turns, and the table about it.

Every engine lives in a process of its own (some break after a fork, change the allocator or keep files mapped) that
waits while others are measured.
"""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_common import BATCH, PER_SHARD, ROW, ROW_BYTES, Rows, evict_files, fill, made_rows, new_cache
from cache_engines import ENGINES, THREADS, WORKERS, Engine, Geomcache, Way, epoch_seconds

_LONGEST_SECONDS = 600.0
_WAYS = {
    "reused": "reused buffers",
    "threads": f"reused buffers, {THREADS} threads",
    "workers": f"DataLoader, {WORKERS} processes",
}
Key = tuple[str, bool, Way]
Times = dict[Key, dict[str, list[float]]]


class Served:
    """An engine in a process of its own."""

    def __init__(self, cls: type[Engine], folder: Path, checked: bool) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cls, folder, checked))
        self._process.start()
        theirs.close()
        self.cls, self.folder, self.checked = cls, folder, checked

    def ask(self, command: str, *arguments: Any) -> Any:
        """Run ``command`` there and wait for its answer."""
        self._connection.send((command, arguments))
        if not self._connection.poll(_LONGEST_SECONDS):
            raise TimeoutError(f"{self.cls.name} hangs in {command}")
        return self._connection.recv()

    def end(self) -> None:
        """End the process."""
        self._connection.close()  # it sees the end of its questions
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection, cls: type[Engine], folder: Path, checked: bool) -> None:
    """Body of the process: answers questions until there are no more."""
    torch.set_num_threads(1)
    engine = cls(folder, ROW, "reused", checked)
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        answer = None
        if command == "write":
            engine.write(np.load(arguments[0]))
        elif command == "start":
            engine = cls(folder, ROW, arguments[0], checked)
            engine.start()
        elif command == "epoch":
            answer = epoch_seconds(engine, *arguments)
        else:
            engine.stop()
        connection.send(answer)


def measure_engines(folder: Path, rows: int, batch: int, rounds: int, table: Path) -> dict[str, float | str]:
    """Write all engines' files under ``folder``, measure, write the Markdown ``table``; flat figures."""
    source = folder / "source.npy"
    np.save(source, made_rows(range(rows)))
    fill(folder / Geomcache.name, new_cache(folder / Geomcache.name, rows, min(PER_SHARD, rows // 2)))
    missing = {cls.name: lacking for cls in ENGINES if (lacking := cls.missing())}
    served: list[Served] = []
    try:
        for cls in ENGINES:
            for checked in () if cls.name in missing else cls.checks:
                own = folder / (f"{cls.name}-{checked}" if cls.own_files else Geomcache.name)
                own.mkdir(exist_ok=True)
                served.append(Served(cls, own, checked))
                if cls.own_files:
                    served[-1].ask("write", source)
        times = _rounds(served, source, rows, batch, rounds)
    finally:
        for one in served:
            one.end()
    speeds = {
        key: {state: rows * ROW_BYTES / float(np.median(each)) / 1e9 for state, each in states.items()}
        for key, states in times.items()
    }
    ratios = {
        (name, checked, way): {
            state: float(np.median(np.array(times[Geomcache.name, checked, "reused"][state]) / np.array(each)))
            for state, each in states.items()
        }
        for (name, checked, way), states in times.items()
    }
    table.write_text(_markdown(speeds, ratios, missing, rows, batch, rounds))
    figures: dict[str, float | str] = {"engines_missing": ", ".join(missing)}
    for (name, checked, way), states in ratios.items():
        for state, ratio in states.items():
            key = f"{name.replace(' ', '_')}_{'checked' if checked else 'unchecked'}_{way}_{state}"
            figures[f"{key}_over_geomcache"] = ratio
            figures[f"{key}_gb_s"] = speeds[name, checked, way][state]
    return figures


def _rounds(served: Sequence[Served], source: Path, rows: int, batch: int, rounds: int) -> Times:
    generator = np.random.default_rng(4)
    entries = [(one, way) for one in served for way in one.cls.ways]
    times: Times = {(one.cls.name, one.checked, way): {"warm": [], "cold": []} for one, way in entries}
    for number in range(rounds):
        epoch: list[Rows] = np.array_split(generator.permutation(rows), rows // batch)
        for one, way in entries:
            mine = times[one.cls.name, one.checked, way]
            evict_files([path for path in one.folder.rglob("*") if path.is_file()])
            one.ask("start", way)
            mine["cold"].append(one.ask("epoch", epoch))
            one.ask("epoch", epoch, source if number == 0 else None)  # all values right; all pages in memory
            mine["warm"].append(one.ask("epoch", epoch))
            one.ask("stop")
        entries.append(entries.pop(0))
    return times


def _markdown(
    speeds: dict[Key, dict[str, float]],
    ratios: dict[Key, dict[str, float]],
    missing: dict[str, list[str]],
    rows: int,
    batch: int,
    rounds: int,
) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("numpy", "torch", "zarr", "tensorstore", "h5py", "lmdb", "pylance", "litdata")
        if not any(name.removeprefix("py") in lacking for lacking in missing.values())
    )
    classes = {cls.name: cls for cls in ENGINES}
    lines = [
        "# Feeding a trainer: geomcache beside other engines",
        "",
        "Made by `python benchmarks/cache.py --engines`"
        f"{'' if (rows, batch) == (512, BATCH) else f' at a smaller size ({rows} rows)'} with {versions}; Python "
        f"{platform.python_version()}, {os.cpu_count()} CPU cores.",
        "",
        f"{rows} rows of 1 MiB (2 views x 256 tokens x 1024, bfloat16), every row once in {batch}-row random batches.",
        "Time runs from asking for the first batch to holding the last; threads and processes run already; the",
        "consumer looks at one number of each row. Warm: all in the page cache. Cold: nothing is (evicted before each",
        f"round, and `mincore` agrees; a host may still have it). Medians of {rounds} rounds in turns; ratios are",
        "medians of ratios within a round: compare ratios, not GB/s of another day. Every engine was compared with",
        "the source, value by value. Each engine runs in every way that it supports, and its best one counts here.",
    ]
    for checked, title in ((True, "Checked: every row against a checksum"), (False, "Unchecked: bytes as they come")):
        lines += ["", f"## {title}", ""]
        lines += ["| engine | warm GB/s | ours = 1 | by | cold GB/s | ours = 1 | by |", "|---|---|---|---|---|---|---|"]
        faster = []
        for name in classes:
            cells = []
            for state in ("warm", "cold"):
                found = {way: ratios[key][state] for key in ratios if key[:2] == (name, checked) for way in [key[2]]}
                if name == Geomcache.name:
                    found = {"reused": found["reused"]}
                if found:
                    best = max(found, key=lambda way: found[way])
                    cells += [f"{speeds[name, checked, best][state]:.2f}", f"{found[best]:.2f}", _WAYS[best]]
                    faster += [f"{name} ({state}, x {found[best]:.2f})"] * (found[best] > 1)
            if cells:
                lines.append(f"| {name} | {' | '.join(cells)} |")
            elif name in missing and checked in classes[name].checks:
                lines.append(f"| {name} | not installed | | | | | |")
        lines += ["", f"Faster than ours: {', '.join(faster) or 'none'}."]
    lines += [
        "",
        "memmap and LMDB map their files: when warm they copy from pages that an untimed epoch has mapped before,",
        "without a system call. Nothing is verified on the way, and a page that the disk cannot deliver ends the",
        "process (SIGBUS) where the others raise an error.",
    ]
    lines += ["", "## How each is used", "", "| engine | configuration | a checked read compares |", "|---|---|---|"]
    lines += [f"| {name} | {cls.how} | {cls.verifies} |" for name, cls in classes.items()]
    lines += ["", "## Every way", "", "Speed, ours = 1 (geomcache, reused buffers, same kind of check).", ""]
    lines += ["| engine | way | checked | warm | cold |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {_WAYS[way]} | {'yes' if checked else 'no'} | {each['warm']:.2f} | {each['cold']:.2f} |"
        for (name, checked, way), each in ratios.items()
    ]
    return "\n".join(lines) + "\n"
