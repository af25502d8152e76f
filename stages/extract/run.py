"""Stage one: Ray actors work through the shards that are not committed yet."""

import logging
import time
from collections.abc import Callable, Iterator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.layout import shard_rows
from geomcache.pipeline.files import remove_leftovers, write_config
from geomcache.pipeline.ray_workers import Pool, run_tasks
from geomcache.pipeline.store.lock import write_lock
from geomcache.stages.extract.plan import ExtractConfig, ExtractPlan, begin, make_plan
from geomcache.stages.extract.worker import ShardWorker

_log = logging.getLogger(__name__)


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


def run(config: ExtractConfig, progress: Callable[[int, int], None], *, unlock: bool = False) -> ExtractResult:
    """Extract; ``progress(rows done, rows in all)``. Finished shards of an earlier run are kept.

    Args:
        config: what to do.
        progress: called after each shard.
        unlock: take over the write lock that a dead run on another machine left.

    Raises:
        CacheLocked: another run is writing this cache.
        GeomcacheError: see ``make_plan``; or what a worker met, by name.
    """
    started = time.perf_counter()
    plan = make_plan(config)
    if not plan.remaining:  # also on a disk that cannot be written
        return _work(plan, progress, started)
    with write_lock(config.out, "geomcache extract", unlock=unlock):
        plan = begin(plan)
        write_config(config.out, config)
        result = _work(plan, progress, started)
        remove_leftovers(config.out)  # of workers that died; nothing writes into a complete cache again
        return result


def _work(plan: ExtractPlan, progress: Callable[[int, int], None], started: float) -> ExtractResult:
    manifest = plan.manifest
    done_before = manifest.shards - len(plan.remaining)
    rows_before = manifest.rows - sum(
        len(shard_rows(shard, manifest.rows, manifest.rows_per_shard)) for shard in plan.remaining
    )
    progress(rows_before, manifest.rows)
    encoded = 0
    for rows in _commits(plan):
        encoded += rows
        progress(rows_before + encoded, manifest.rows)
    seconds = time.perf_counter() - started
    return ExtractResult(
        cache=str(plan.config.out),
        cache_id=manifest.recipe.fingerprint.cache_id,
        rows=manifest.rows,
        shards=manifest.shards,
        shards_done_before=done_before,
        rows_encoded=encoded,
        seconds=round(seconds, 3),
        rows_per_second=round(encoded / seconds, 2),
    )


def _commits(plan: ExtractPlan) -> Iterator[int]:
    """Yield the number of rows of each shard as it is committed."""
    pool = Pool(
        count=min(plan.config.workers, len(plan.remaining)),
        what="an extraction worker",
        advice="give it more memory: fewer --workers, a smaller encoder_config.batch_size; finished shards are kept",
        gpus=plan.device.startswith("cuda"),
        address=plan.config.ray_address,
        always_ray=True,
    )
    for shard, commit in run_tasks(
        ShardWorker, (plan.config.pack, plan.config.out, plan.manifest, plan.device), list(plan.remaining), pool
    ):
        _log.info("shard %d committed: %s", shard, commit.seconds)
        yield commit.rows
