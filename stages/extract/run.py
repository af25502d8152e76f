"""Stage one: Ray actors work through the shards that are not committed yet."""

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.cache_schemas.layout import shard_rows
from geomcache.pipeline.files import write_config
from geomcache.stages.extract.plan import ExtractConfig, ExtractPlan, make_plan
from geomcache.stages.extract.worker import ShardWorker

_log = logging.getLogger(__name__)
_SHARDS_IN_FLIGHT = 2  # per worker: one running, one waiting, so that no worker idles
_WORKER_RESTARTS = 5  # in all; a worker that the system kills at every start must end the run
_START_SECONDS = 900.0  # for loading weights on every machine
_CONNECT_SECONDS = 5.0
_TASK_RETRIES = 3  # a shard whose worker died is redone this often; commits make that harmless


class ExtractResult(Schema):
    """What one run of ``geomcache extract`` did."""

    cache: str
    cache_id: str
    rows: int
    shards: int
    shards_done_before: int
    rows_encoded: int
    seconds: float
    rows_per_second: float


def run(config: ExtractConfig, progress: Callable[[int, int], None]) -> ExtractResult:
    """Extract; ``progress(rows done, rows in all)``. Finished shards of an earlier run are kept.

    Raises:
        GeomcacheError: see ``make_plan``; or what a worker met, by name.
    """
    started = time.perf_counter()
    plan = make_plan(config)
    write_config(config.out, config)
    manifest = plan.manifest
    done_before = manifest.shards - len(plan.remaining)
    rows_before = manifest.rows - sum(
        len(shard_rows(shard, manifest.rows, manifest.rows_per_shard)) for shard in plan.remaining
    )
    progress(rows_before, manifest.rows)
    encoded = 0
    if plan.remaining:
        with ray_session(config.ray_address, plan.config.workers) as ray:
            for rows in _commits(ray, plan):
                encoded += rows
                progress(rows_before + encoded, manifest.rows)
    seconds = time.perf_counter() - started
    return ExtractResult(
        cache=str(config.out),
        cache_id=manifest.recipe.fingerprint.cache_id,
        rows=manifest.rows,
        shards=manifest.shards,
        shards_done_before=done_before,
        rows_encoded=encoded,
        seconds=round(seconds, 3),
        rows_per_second=round(encoded / seconds, 2),
    )


@contextmanager
def ray_session(address: str | None, workers: int) -> Iterator[Any]:
    """Ray for the length of a block: an existing cluster by address, or a local one on loopback."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    if address is not None:
        _require_reachable(address)
    local: dict[str, Any] = {"num_cpus": max(workers, 1), "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    with redirect_stdout(sys.stderr):  # Ray prints its notices; standard output belongs to --json
        yield from _connected(ray, address, local)


def _connected(ray: Any, address: str | None, local: dict[str, Any]) -> Iterator[Any]:
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **({} if address else local))
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Ray tries an address for minutes; ask once whether anything listens there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as problem:
        raise InputError(
            f"there is no Ray cluster at {address}",
            expected="HOST:PORT of a running cluster's head",
            found=str(problem),
            fix="ray start --head on that host, or leave ray_address out for a local one",
        ) from problem


def _start(ray: Any, workers: list[Any]) -> None:
    """Wait until every worker is ready; a busy cluster must not look like a slow one."""
    ready = [worker.start.remote() for worker in workers]
    done, late = ray.wait(ready, num_returns=len(ready), timeout=_START_SECONDS)
    for reference in done:
        _get(ray, reference)
    if late:
        raise InputError(
            f"{len(late)} of {len(workers)} workers did not start within {_START_SECONDS:.0f} s",
            expected="free CPUs (and GPUs) for every worker",
            found=f"free now: {ray.available_resources()}",
            fix="wait until the cluster is free (ray status), or use fewer --workers",
        )


def _get(ray: Any, reference: Any) -> Any:
    """A worker's result, or its error as it was raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as problem:
        if isinstance(problem.cause, GeomcacheError | OSError):
            raise problem.cause from problem
        raise
    except ray.exceptions.RayError as problem:
        raise InputError(
            "an extraction worker died again and again",
            expected=f"at most {_WORKER_RESTARTS} deaths",
            found=str(problem).splitlines()[0],
            fix="give it more memory: fewer --workers, a smaller encoder_config.batch_size; finished shards are kept",
        ) from problem


def _require_resources(ray: Any, workers: int, *, cuda: bool) -> None:
    """Ray waits for ever for what a cluster does not have; say so instead."""
    for resource, needed in (("CPU", workers), ("GPU", workers if cuda else 0)):
        found = int(ray.cluster_resources().get(resource, 0))
        if found < needed:
            raise InputError(
                f"the Ray cluster has too few {resource}s for {workers} workers",
                expected=f"{needed} {resource}s",
                found=str(found),
                fix=f"--workers {found}" if found else "use a machine or a cluster that has one, or --set device=cpu",
            )


def _commits(ray: Any, plan: ExtractPlan) -> Iterator[int]:
    """Yield the number of rows of each shard as it is committed."""
    cuda = plan.device.startswith("cuda")
    count = min(plan.config.workers, len(plan.remaining))
    _require_resources(ray, count, cuda=cuda)
    actor_class = ray.remote(
        num_cpus=1, num_gpus=1 if cuda else 0, max_restarts=_WORKER_RESTARTS, max_task_retries=_TASK_RETRIES
    )(ShardWorker)
    workers = [actor_class.remote(plan.config, plan.manifest, plan.device) for _ in range(count)]
    waiting = list(reversed(plan.remaining))
    running: dict[Any, Any] = {}
    try:
        _start(ray, workers)
        for worker in workers * _SHARDS_IN_FLIGHT:
            if waiting:
                running[worker.run.remote(waiting.pop())] = worker
        while running:
            (finished,), _ = ray.wait(list(running), num_returns=1)
            worker = running.pop(finished)
            if waiting:
                running[worker.run.remote(waiting.pop())] = worker
            commit = _get(ray, finished)
            _log.info("shard %d committed: %s", commit.shard, commit.seconds)
            yield commit.rows
    finally:
        for worker in workers:
            ray.kill(worker)
