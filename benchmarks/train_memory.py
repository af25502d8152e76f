"""What a token cache takes of a trainer's memory: processes of their own, one after the other.

    python benchmarks/train_memory.py PACK CACHE|none WHAT STEPS BATCH     # one trainer; prints its figures as JSON

WHAT: ``cache`` trains on the cache; ``made`` on tokens of the same shape that come from nowhere, so that the two differ
by what reading costs and by nothing that computing costs. Only private memory counts: the page cache belongs to all.
Large buffers go back to the system when they are freed (MALLOC_MMAP_THRESHOLD_): what the allocator of libc happens to
keep of them differs by 50 MB from run to run, with a cache and without.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from cache_common import evict_files
from train_common import CACHED, Rows, Run, config_of, fill_cache

from geomcache.pipeline.store.reader import CachedTokens
from geomcache.stages.train.token_feed import _DEPTH

LIGHT = {"dit": {"width": 64, "blocks": 2, "heads": 2}, "repeated_diffusion_steps": 1}  # all time goes into reading
SKIP = 4


def memory_mb() -> dict[str, float]:
    """Of this process: private pages, and its share of all (Pss)."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        found[name.rstrip(":")] = int(value) * 1024 / 1e6
    return {"private_mb": found["Private_Clean"] + found["Private_Dirty"], "pss_mb": found["Pss"]}


def disk_mb() -> float:
    """What this process has made the disk deliver."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1]) / 1e6


def alone(pack: Path, cache: Path | None, what: str, steps: int, batch: int) -> None:
    """One trainer; prints its figures while it still holds everything, and waits until it may go."""
    torch.set_num_threads(1)
    before = disk_mb()  # the statistics of the tokens are read from the cache too
    run = Run(config_of(pack, cache, batch_size=batch, policy=LIGHT))
    seen: list[dict[str, float]] = []

    def look(done: int) -> None:
        if done > SKIP:
            seen.append(memory_mb())
        if done == SKIP + steps:
            most = {name: max(one[name] for one in seen) for name in seen[0]}
            print(json.dumps(most | {"disk_mb": disk_mb() - before}), flush=True)
            sys.stdin.read()

    def made(rows: Rows) -> torch.Tensor:
        recipe = run.data.recipe
        assert recipe is not None
        return torch.full((len(rows), *recipe.spec.row_shape), 0.5)

    run.train(steps, SKIP, CACHED if what == "cache" else made, look)


@contextmanager
def trainer(pack: Path, cache: Path | None, what: str, steps: int, batch: int) -> Iterator[dict[str, float]]:
    """Figures of a trainer that still stands while the context lasts."""
    command = [sys.executable, __file__, str(pack), str(cache or "none"), what, str(steps), str(batch)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield json.loads(line)
        process.communicate()


def measure_memory(packs: dict[str, Path], folder: Path, rounds: int, batch: int, steps: int) -> dict[str, float]:
    """For each pack a cache of its rows; two trainers read it at the same time."""
    figures: dict[str, float] = {}
    for name, pack in packs.items():
        cache = folder / f"memory_{name}"
        fill_cache(cache, pack)
        files = [path for path in cache.rglob("*") if path.is_file()]
        ring = _DEPTH * batch * row_megabytes(cache)
        evict_files(files)
        with (
            trainer(pack, cache, "cache", steps, batch) as first,
            trainer(pack, cache, "cache", steps, batch) as second,
        ):
            pass
        with trainer(pack, None, "cache", steps, batch) as none:
            pass
        growth = []
        for _ in range(rounds):
            with trainer(pack, cache, "cache", steps, batch) as cached:
                pass
            with trainer(pack, cache, "made", steps, batch) as made:
                growth.append(cached["private_mb"] - made["private_mb"])
        figures |= {
            f"cache_mb_{name}": sum(path.stat().st_size for path in files) / 1e6,
            f"cache_rss_over_ring_mb_{name}": float(np.median(growth)) - ring,
            f"trainer_private_mb_{name}": cached["private_mb"],
            f"trainer_private_mb_none_{name}": none["private_mb"],
            f"first_trainer_disk_mb_{name}": first["disk_mb"],
            f"second_trainer_disk_mb_{name}": second["disk_mb"],
            f"pair_pss_mb_{name}": second["pss_mb"],
            "ring_mb": ring,
        }
    return figures | {"cache_rss_over_ring_mb": max(figures[f"cache_rss_over_ring_mb_{name}"] for name in packs)}


def row_megabytes(cache: Path) -> float:
    """Of a stored row."""
    with CachedTokens(cache) as reader:
        return sum(array.nbytes for array in reader.buffers(1).values()) / 1e6


if __name__ == "__main__":
    pack, cache, what, steps, batch = sys.argv[1:]
    alone(Path(pack), None if cache == "none" else Path(cache), what, int(steps), int(batch))
