"""kill -9 of Ray workers and of the driver of the real ``geomcache extract``; its orphans must not outlive it."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from geomcache.cache_schemas.errors import GeomcacheError
from tests.faults.conftest import Tally
from tests.faults.jobs import HANG_SECONDS, ROOT, differences, extract, unsound

ORPHANS_SECONDS = 40


def _start(pack: Path, out: Path) -> psutil.Popen:
    command = [sys.executable, "-m", "geomcache.stages.cli.app", "extract", "--pack", str(pack), "--out", str(out)]
    command += ["--codec", "bf16", "--workers", "2", "--set", "encoder_config.grid=[4, 4]", "--set", "device=cpu"]
    command += ["--set", "encoder_config.batch_size=3"]
    return psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _committed(out: Path) -> int:
    return len(list(out.glob("commits/*.json")))


def _workers(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that may be writing."""
    found = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::ShardWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _wait(condition: Callable[[], bool], driver: psutil.Popen) -> None:
    until = time.monotonic() + HANG_SECONDS
    while driver.poll() is None and not condition():
        assert time.monotonic() < until, "the extraction hangs"
        time.sleep(0.002)


@pytest.mark.slow
def test_kills_of_ray_workers_and_of_the_driver(
    size: Callable[[int, int], int],
    rng: np.random.Generator,
    tally: Tally,
    pack: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    truth, every, deaths = undisturbed["bf16"], [], {"worker": 0, "driver": 0}
    for number in range(size(1, 15)):
        out = tmp_path / f"cache {number}"
        driver, wrong = _start(pack, out), []
        shards = rng.permutation(7)[:2]  # committed when a worker, and when the driver is killed
        _wait(lambda out=out, shards=shards: _committed(out) >= min(shards), driver)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.02))
        victims = _workers(driver.children(recursive=True))[:1] if driver.poll() is None else []
        _kill(victims)
        _wait(lambda out=out, shards=shards: _committed(out) >= max(shards), driver)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.02))
        family = driver.children(recursive=True) if driver.poll() is None else []
        driver.kill()
        killed = driver.wait(HANG_SECONDS) != 0
        assert driver.stderr is not None
        driver.stderr.close()
        _, orphans = psutil.wait_procs(_workers(family), timeout=ORPHANS_SECONDS)
        wrong += [f"{orphan} outlives its driver" for orphan in orphans]
        _kill(family)  # Ray's own agents take minutes to notice
        try:
            wrong += unsound(out, truth)
            extract(pack, out, "bf16")  # what resumes need not be Ray
        except GeomcacheError as problem:
            wrong.append(problem.what)
        wrong += [f"not as undisturbed: {name}" for name in differences(out, truth)]
        lost = [f"Ray run {number}, shards {shards.tolist()}: {each}" for each in wrong]
        tally.add("kill -9 of a Ray worker", tried=len(victims), detected=len(victims) * (not lost), lost=[])
        tally.add("kill -9 of a Ray driver", tried=int(killed), detected=int(killed and not lost), lost=lost)
        deaths["worker"] += len(victims)
        deaths["driver"] += killed
        every += lost
    assert every == []
    assert deaths["worker"] + deaths["driver"] > 0
