"""Frames: what packing, reading and recording cost beside doing the same by hand; ratios of speeds within one run.

    python benchmarks/frames.py [--json FILE] [--rows 6000] [--strict]

One real demonstration is recorded; its frames, with varied actions, make the data set.

Keys (above 1: ours is faster):
  read_over_tar_decode   rows/s of PackReader in order over tarfile + PIL
  random_over_decode     rows/s of PackReader in random order, one row a call, over PIL alone on bytes in memory
  pack_over_bare_pair    rows/s of `pack build --workers 2` over two bare processes that read the same HDF5 rows, turn
                         them and encode the same PNGs; starting Ray or the processes is in neither
  render_share           of recording's time that is not physics, resets or planning, the share that is rendering
  pack_peak_mb, pack_peak_mb_100x   largest memory of one packing process, and with 100 times the rows

Limits: 0.8, 0.8, 0.9, 0.85, and 600 MB; with --strict exit 1 when one is missed (machines are noisy).
"""

import argparse
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
from PIL import Image

from geomcache.cache_schemas.pack_info import PackInfo
from geomcache.configs.schema import PackConfig
from geomcache.pipeline.pack.reader import PackReader
from geomcache.stages.cli.pack import build_from

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
ROUNDS = 5
LIMITS = {"read_over_tar_decode": 0.8, "random_over_decode": 0.8, "pack_over_bare_pair": 0.9, "render_share": 0.85}
MOST_MB = 600.0


def record(out: Path) -> tuple[Path, float]:
    """Record one demonstration; (its file, share of rendering)."""
    from geomcache.pipeline.sim import recorder
    from geomcache.pipeline.sim.libero_env import LiberoEnv
    from geomcache.pipeline.sim.observed_moment import ObservedMoment

    spent = {"other": 0.0, "render": 0.0}
    depth = 0

    def timed(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                depth -= 1
                if depth == 0:  # a reset steps, planning does both
                    spent[kind] += time.perf_counter() - started

        return wrapped

    LiberoEnv.reset = timed(LiberoEnv.reset, "other")  # type: ignore[method-assign]
    LiberoEnv.step = timed(LiberoEnv.step, "other")  # type: ignore[method-assign]
    recorder.plan_episode = timed(recorder.plan_episode, "other")  # type: ignore[assignment]
    ObservedMoment._render = timed(ObservedMoment._render, "render")  # type: ignore[method-assign]
    started = time.perf_counter()
    summary = recorder.record(recorder.Config(tasks=(0,), episodes=1), out)
    total = time.perf_counter() - started
    return summary.files[0], spent["render"] / (total - spent["other"])


def enlarge(demonstration: Path, path: Path, rows: int) -> Path:
    """A data set of at least ``rows`` rows: the same frames again and again, under actions of their own."""
    with h5py.File(demonstration) as source, h5py.File(path, "w") as file:
        demo = source["data/demo_0"]
        steps = len(demo["actions"])
        data = file.create_group("data")
        data.attrs["problem_info"] = "{}"
        generator = np.random.default_rng(0)
        done = number = 0
        while done < rows:
            length = min(steps, rows - done + 1)
            if length < 2:
                break
            group = data.create_group(f"demo_{number}")
            group["actions"] = generator.uniform(-1, 1, (length, 7))
            for key in ("ee_states", "gripper_states", *CAMERAS):
                group[f"obs/{key}"] = demo[f"obs/{key}"][:length]
            done, number = done + length - 1, number + 1
    return path


def settings(source: Path, out: Path, **values: Any) -> PackConfig:
    return PackConfig.model_validate({"sources": [source], "out": out, "rows_per_shard": 256, **values})


def ratio(ours: Callable[[], float], theirs: Callable[[], float]) -> float:
    """Median over interleaved rounds of their seconds over ours."""
    ours(), theirs()  # warm
    return float(np.median([theirs() / ours() for _ in range(ROUNDS)]))


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_ratios(pack_path: Path) -> tuple[float, float]:
    pack = PackReader(pack_path)
    size = pack.info.request.rows_per_shard
    shards = [range(first, min(first + size, len(pack))) for first in range(0, len(pack), size)]

    def in_order() -> None:
        for rows in shards:
            pack.images(rows)

    def by_hand() -> None:
        for file in pack.info.shards:
            with tarfile.open(pack_path / file.name) as tar:
                images = []
                for member in tar:
                    data = tar.extractfile(member)
                    if member.name.endswith(".png") and data is not None:
                        images.append(np.asarray(Image.open(data)))
                np.stack(images)

    order = np.random.default_rng(0).permutation(len(pack)).tolist()
    encoded = [[pack._member(row, view) for view in range(len(CAMERAS))] for row in order]

    def random() -> None:
        for row in order:
            pack.images([row])

    def decode() -> None:
        for row in encoded:
            np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in row])

    ratios = (
        ratio(lambda: seconds(in_order), lambda: seconds(by_hand)),
        ratio(lambda: seconds(random), lambda: seconds(decode)),
    )
    pack.close()
    return ratios


def _bare(path: Path, part: int, start: Any, results: Any) -> None:
    """Half of the data set: read, turn, encode."""
    with h5py.File(path) as file:
        demos = [file[f"data/demo_{i}"] for i in range(len(file["data"]))][part::2]
        start.wait()
        rows = 0
        for demo in demos:
            steps = len(demo["actions"]) - 1
            for camera in CAMERAS:
                for image in np.ascontiguousarray(demo[f"obs/{camera}"][:steps][:, ::-1]):
                    Image.fromarray(image).save(io.BytesIO(), "PNG", compress_level=3)
            rows += steps
    results.put(rows)


def bare_pair_speed(path: Path) -> float:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_bare, args=(path, part, start, results)) for part in range(2)]
    for process in processes:
        process.start()
    start.wait()
    started = time.perf_counter()
    rows = sum(results.get() for _ in processes)
    elapsed = time.perf_counter() - started
    for process in processes:
        process.join()
    return rows / elapsed


def pack_pair_speed(path: Path, out: Path) -> float:
    """Rows per second after the first third, so that starting Ray and its helpers is not in it."""
    seen: list[tuple[float, int]] = []
    build_from(
        settings(path, out, workers=2),
        lambda done, _total, what: seen.append((time.perf_counter(), done)) if what == "rows" and done else None,
    )
    (began, before), (ended, after) = seen[len(seen) // 3], seen[-1]
    return (after - before) / (ended - began)


def peak_megabytes(path: Path, out: Path) -> float:
    """Of a process of its own that packs with one worker and reads every row again."""
    command = [sys.executable, __file__, "--pack-alone", str(path), str(out)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def pack_alone(path: Path, out: Path) -> None:
    info, _ = build_from(settings(path, out), lambda *_: None)
    assert isinstance(info, PackInfo)
    with PackReader(out) as pack:
        for first in range(0, len(pack), 256):
            pack.images(range(first, min(first + 256, len(pack))))
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory before exec
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024)


def measure(folder: Path, rows: int) -> dict[str, float]:
    demonstration, render_share = record(folder / "demos")
    large = enlarge(demonstration, folder / "large_demo.hdf5", rows)
    small = enlarge(demonstration, folder / "small_demo.hdf5", max(2, rows // 100))
    bare = [bare_pair_speed(large)]
    ours = []
    for number in range(2):
        ours.append(pack_pair_speed(large, folder / f"pack{number}"))
        bare.append(bare_pair_speed(large))
    read, random = read_ratios(folder / "pack0")
    return {
        "read_over_tar_decode": read,
        "random_over_decode": random,
        "pack_over_bare_pair": float(np.mean(ours) / np.mean(bare)),
        "render_share": render_share,
        "pack_peak_mb": peak_megabytes(small, folder / "small"),
        "pack_peak_mb_100x": peak_megabytes(large, folder / "alone"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--pack-alone", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pack_alone:
        pack_alone(*arguments.pack_alone)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: round(value, 3) for name, value in measure(Path(folder), arguments.rows).items()}
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures))
    missed = [name for name, limit in LIMITS.items() if figures[name] < limit]
    missed += ["pack_peak_mb_100x"] * (figures["pack_peak_mb_100x"] > MOST_MB)
    if missed:
        print(f"limit missed: {', '.join(missed)}", file=sys.stderr)
    return int(arguments.strict and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
