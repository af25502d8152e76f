"""Stage one beside a bare loop of the same encoder; ratios of speeds within one run, medians of rounds that take turns.

    python benchmarks/extract.py [--json FILE] [--rows 24] [--rounds 5] [--smallest] [--device cuda] [--strict]
    python benchmarks/extract.py --flops [--json FILE]      # every model, with random weights: minutes and 12 GB

A real demonstration is recorded and repeated; da3-small has random weights (the same work). Start-up is in no ratio:
both sides are timed from the moment when their encoder is loaded, and neither is warmed up.

Keys (above 1: ours is faster; limits in AT_LEAST, --strict: exit 1 when one is missed, machines are noisy):
  extract_over_bare          rows/s of `geomcache extract`, one worker, da3-small at 252 px, over encode_padded in a
                             loop over frames that are decoded in memory
  two_workers_over_bare_pair rows/s of two workers over two bare processes at the same time, one thread each
  overhead_ms_per_row        of `geomcache extract` with oracle_pointmap, which computes next to nothing
  start_seconds              until a worker is ready: Ray, imports, weights
  actors_start_seconds, actors_ms_per_shard        tasks that do nothing, on our actors
  ray_data_start_seconds, ray_data_ms_per_shard    the same on Ray Data's pool of actors (map_batches); only where
                             pandas is installed, which Ray Data imports
  worker_peak_mb, worker_peak_mb_8x   memory of a worker (da3-small), and with 8 times the rows in 8 times the shard
  bare_rows_per_second, extract_rows_per_second    of this run; never compare them with another's
  gflop_per_frame_ENCODER    of one picture; a frame rate times this, over the device's peak, is its utilisation
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import h5py
import numpy as np
import torch

from geomcache.configs.schema import PackConfig
from geomcache.pipeline.encoding import encode_padded, gflop_per_row
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.ray_workers import Pool, ray_session, run_tasks
from geomcache.pipeline.tokens import build_encoder
from geomcache.stages.cli.pack import build_from
from geomcache.stages.extract.plan import ExtractConfig, begin, make_plan
from geomcache.stages.extract.worker import ShardWorker

SMALL = {"model": "da3-small", "weights": "random", "process_size": [252, 252], "batch_size": 2}
AT_LEAST = {"extract_over_bare": 0.95, "two_workers_over_bare_pair": 0.93}
EMPTY_TASKS = 200
PARTS = ["flops", "speed", "ray", "memory"]
MODELS = ("da3-small", "da3-base", "da3-large-1.1", "da3-giant-1.1")


def make_packs(folder: Path, rows: int) -> dict[str, Path]:
    """``pair``: two shards of ``rows`` each; ``large``: 8 times as many in one shard; of one recorded episode."""
    from geomcache.pipeline.sim import recorder

    file = recorder.record(recorder.Config(tasks=(0,), episodes=1), folder / "demos").files[0]
    return {
        "pair": _pack(_repeat(file, folder / "pair_demo.hdf5", 2 * rows), folder / "pair", rows),
        "small": _pack(_repeat(file, folder / "small_demo.hdf5", rows), folder / "small", rows),
        "large": _pack(_repeat(file, folder / "large_demo.hdf5", 8 * rows), folder / "large", 8 * rows),
    }


def _repeat(demonstration: Path, path: Path, rows: int) -> Path:
    """A data set of exactly ``rows`` rows: the same frames again and again, under actions of their own."""
    generator = np.random.default_rng(0)
    with h5py.File(demonstration) as source, h5py.File(path, "w") as file:
        demo, data, done = source["data/demo_0"], file.create_group("data"), 0
        data.attrs.update({name: value for name, value in source["data"].attrs.items() if name != "num_demos"})
        while done < rows:
            length = min(len(demo["actions"]), rows - done + 1)  # recorded steps give one row less
            length -= rows - done - (length - 1) == 1  # what is left over must be an episode too
            group = data.create_group(f"demo_{len(data)}")
            group.attrs.update(demo.attrs)
            group["actions"] = generator.uniform(-1, 1, (length, 7))
            for name, values in demo["obs"].items():
                group[f"obs/{name}"] = values[:length]
            done += length - 1
    return path


def _pack(source: Path, out: Path, rows_per_shard: int) -> Path:
    build_from(PackConfig.model_validate({"sources": [source], "out": out, "rows_per_shard": rows_per_shard}), _nothing)
    return out


def _nothing(*_: object) -> None:
    pass


def _bare(pack: Path, rows: range, device: str, start: Any, results: Any) -> None:
    """The honest alternative: frames in memory, the encoder in a loop, nothing kept."""
    torch.set_num_threads(1)
    with PackReader(pack) as reader:
        frames: FrameBatch = reader.frames(rows)
        encoder = build_encoder("depth_anything3", SMALL, reader.info.contract, device)
    start.wait()
    began = time.perf_counter()
    size = encoder.spec.encoder_batch_size
    for first in range(0, len(frames), size):
        encode_padded(encoder, frames[first : first + size])
    results.put((began, time.perf_counter()))  # one clock for all processes of a machine


def bare_speed(pack: Path, parts: list[range], device: str) -> float:
    """Rows per second of as many processes as there are parts, side by side."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(len(parts)), context.Queue()
    processes = [context.Process(target=_bare, args=(pack, part, device, start, results)) for part in parts]
    for process in processes:
        process.start()
    times = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(map(len, parts)) / (max(end for _, end in times) - min(began for began, _ in times))


def extract(pack: Path, out: Path, workers: int, device: str, encoder: str, config: dict[str, Any]) -> dict[str, Any]:
    """The command itself; its JSON."""
    command = [sys.executable, "-m", "geomcache.stages.cli.app", "extract", "--json", "--pack", str(pack)]
    command += ["--out", str(out), "--workers", str(workers), "--encoder", encoder, "--set", f"device={device}"]
    for name, value in config.items():
        command += ["--set", f"encoder_config.{name}={json.dumps(value)}"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def measure_speed(packs: dict[str, Path], folder: Path, rows: int, rounds: int, device: str) -> dict[str, float]:
    one, two = [range(rows)], [range(rows), range(rows, 2 * rows)]
    bare, ours, pair_bare, pair_ours, starts = ([] for _ in range(5))
    for number in range(rounds):
        bare.append(bare_speed(packs["small"], one, device))
        found = extract(packs["small"], folder / f"one{number}", 1, device, "depth_anything3", SMALL)
        ours.append(found["rows_per_second"])
        starts.append(found["start_seconds"])
        pair_bare.append(bare_speed(packs["pair"], two, device))
        found = extract(packs["pair"], folder / f"two{number}", 2, device, "depth_anything3", SMALL)
        pair_ours.append(found["rows_per_second"])
    free = extract(packs["large"], folder / "free", 1, device, "oracle_pointmap", {})
    return {
        "extract_over_bare": _median_ratio(ours, bare),
        "two_workers_over_bare_pair": _median_ratio(pair_ours, pair_bare),
        "overhead_ms_per_row": 1000 / free["rows_per_second"],
        "start_seconds": float(np.median(starts)),
        "bare_rows_per_second": float(np.median(bare)),
        "extract_rows_per_second": float(np.median(ours)),
    }


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    return float(np.median([mine / other for mine, other in zip(ours, theirs, strict=True)]))


class Idle:
    """A worker without work, for Ray's own cost; called by Ray Data, run by our actors."""

    def start(self) -> dict[str, Any]:
        return self.state()

    def state(self) -> dict[str, Any]:
        return {}

    def run(self, task: int) -> int:
        return task

    def close(self) -> None:
        pass

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


def measure_ray() -> dict[str, float]:
    """Seconds until the first task is back, and milliseconds for each further one; ours, then Ray Data's."""
    pool = Pool(count=1, what="an idle worker", advice="", always_ray=True, at_once=2, watch=_nothing)
    began = time.perf_counter()
    times = [time.perf_counter() for _ in run_tasks(Idle, (), list(range(EMPTY_TASKS)), pool)]
    figures = _ray_figures("actors", began, times)
    if importlib.util.find_spec("pandas") is None:  # Ray Data imports it; nothing else here does
        return figures
    began = time.perf_counter()
    with ray_session(None, 2):
        import ray.data

        context: Any = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        shards = ray.data.range(EMPTY_TASKS, override_num_blocks=EMPTY_TASKS)
        mapped = shards.map_batches(Idle, batch_size=1, compute=ray.data.ActorPoolStrategy(size=1))
        times = [time.perf_counter() for _ in mapped.iter_rows()]
    return figures | _ray_figures("ray_data", began, times)


def _ray_figures(name: str, began: float, times: list[float]) -> dict[str, float]:
    each = (times[-1] - times[0]) / (len(times) - 1)
    return {f"{name}_start_seconds": times[0] - began, f"{name}_ms_per_shard": 1000 * each}


def peak_megabytes(pack: Path, out: Path, device: str) -> float:
    """Of a process of its own that is nothing but one worker."""
    command = [sys.executable, __file__, "--worker-alone", str(pack), str(out), "--device", device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def worker_alone(pack: Path, out: Path, device: str) -> None:
    torch.set_num_threads(1)
    config = ExtractConfig(
        pack=pack, out=out, encoder="depth_anything3", encoder_config=SMALL | {"process_size": [126, 126]}
    )
    plan = begin(make_plan(config))
    worker = ShardWorker(pack, out, plan.manifest, device)
    for shard in plan.remaining:
        worker.run(shard)
    worker.close()
    status = Path("/proc/self/status").read_text()
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024)


def measure_flops(pack: Path, encoders: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, float]:
    """Floating point operations of one picture (a multiplication and an addition are two)."""
    figures = {}
    with PackReader(pack) as reader:
        frames = reader.frames([0])
        for name, (encoder_name, config) in encoders.items():
            encoder = build_encoder(encoder_name, {**config, "batch_size": 1}, reader.info.contract, "cpu")
            figures[f"gflop_per_frame_{name}"] = gflop_per_row(encoder, frames) / encoder.spec.views
            del encoder
    return figures


def encoders_to_count(every: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {"xfeat": ("xfeat", {})}
    for model in MODELS if every else MODELS[:1]:
        for tap in ("features.global", "ray"):
            for side in (224, 252) if every else (252,):
                config = {"model": model, "weights": "random", "process_size": [side, side], "tap": tap}
                found[f"{model}_{tap.split('.')[0]}_{side}"] = "depth_anything3", config
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=24, help="of a run of one worker")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smallest", action="store_true", help="everything once, at a size for CI")
    parser.add_argument("--flops", action="store_true", help="only the operations, of every model")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--worker-alone", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker_alone:
        worker_alone(*arguments.worker_alone, arguments.device)
        return 0
    rows, rounds = (8, 1) if arguments.smallest else (arguments.rows, arguments.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        packs = make_packs(folder, rows)
        parts = [arguments.only] if arguments.only else ["flops"] if arguments.flops else PARTS
        figures: dict[str, float] = {}
        if "flops" in parts:
            figures |= measure_flops(packs["small"], encoders_to_count(arguments.flops))
        if "speed" in parts:
            figures |= measure_speed(packs, folder, rows, rounds, arguments.device)
        if "ray" in parts:
            figures |= measure_ray()
        if "memory" in parts:
            figures["worker_peak_mb"] = peak_megabytes(packs["small"], folder / "peak", arguments.device)
            figures["worker_peak_mb_8x"] = peak_megabytes(packs["large"], folder / "peak8", arguments.device)
    text = json.dumps({name: round(value, 4) for name, value in figures.items()})
    print(text)
    if arguments.json:
        arguments.json.write_text(text)
    missed = [name for name, limit in AT_LEAST.items() if figures.get(name, limit) < limit]
    if missed and not arguments.smallest:  # a few rows say nothing about speed
        print(f"limit missed: {', '.join(missed)}", file=sys.stderr)
    return int(arguments.strict and bool(missed) and not arguments.smallest)


if __name__ == "__main__":
    sys.exit(main())
