"""Stage one: Ray actors work through the shards that are not committed yet."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.cache_schemas.layout import shard_rows
from geomcache.pipeline.files import write_config
from geomcache.stages.extract.plan import ExtractConfig, ExtractPlan, make_plan
from geomcache.stages.extract.worker import ShardWorker

_log = logging.getLogger(__name__)
_SHARDS_IN_FLIGHT = 2  # per worker: one running, one waiting, so that no worker idles
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
    import os

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    local: dict[str, Any] = {"num_cpus": max(workers, 1), "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **({} if address else local))
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_resources(ray: Any, workers: int, *, cuda: bool) -> None:
    """Ray waits for ever for what a cluster does not have; say so instead."""
    for resource, needed in (("CPU", workers), ("GPU", workers if cuda else 0)):
        found = int(ray.cluster_resources().get(resource, 0))
        if found < needed:
            raise InputError(
                f"the Ray cluster has too few {resource}s for {workers} workers",
                expected=f"{needed} {resource}s",
                found=str(found),
                fix=f"--workers {max(1, found)}",
            )


def _commits(ray: Any, plan: ExtractPlan) -> Iterator[int]:
    """Yield the number of rows of each shard as it is committed."""
    cuda = plan.device.startswith("cuda")
    _require_resources(ray, plan.config.workers, cuda=cuda)
    actor_class = ray.remote(num_cpus=1, num_gpus=1 if cuda else 0, max_restarts=-1, max_task_retries=_TASK_RETRIES)(
        ShardWorker
    )
    count = min(plan.config.workers, len(plan.remaining))
    workers = [actor_class.remote(plan.config, plan.manifest, plan.device) for _ in range(count)]
    waiting = list(reversed(plan.remaining))
    running: dict[Any, Any] = {}
    try:
        for worker in workers * _SHARDS_IN_FLIGHT:
            if waiting:
                running[worker.run.remote(waiting.pop())] = worker
        while running:
            (finished,), _ = ray.wait(list(running), num_returns=1)
            worker = running.pop(finished)
            if waiting:
                running[worker.run.remote(waiting.pop())] = worker
            try:
                commit = ray.get(finished)
            except ray.exceptions.RayTaskError as problem:
                if isinstance(problem.cause, GeomcacheError | OSError):
                    raise problem.cause from problem
                raise
            _log.info("shard %d committed: %s", commit.shard, commit.seconds)
            yield commit.rows
    finally:
        for worker in workers:
            ray.kill(worker)
