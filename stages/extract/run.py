"""Stage one: Ray actors work through the shards that are not committed yet."""

import time
from collections.abc import Callable

from geomcache.cache_schemas.layout import shard_rows
from geomcache.cache_schemas.manifest import ExtractionRecord
from geomcache.pipeline.files import remove_leftovers, write_config
from geomcache.pipeline.ray_workers import Pool, run_tasks
from geomcache.pipeline.store.lock import write_lock
from geomcache.stages.extract.cluster import cluster, require_shared_folders, worker_shape
from geomcache.stages.extract.estimate import require_room
from geomcache.stages.extract.plan import ExtractConfig, ExtractPlan, begin, make_plan
from geomcache.stages.extract.report import RunLog, write_record
from geomcache.stages.extract.worker import SHARDS_AT_ONCE, ShardWorker


def run(
    config: ExtractConfig,
    progress: Callable[..., None],
    *,
    tell: Callable[[str], None] = lambda _: None,
    unlock: bool = False,
) -> ExtractionRecord:
    """Extract; ``progress(rows done, rows in all, text)``. Finished shards of an earlier run are kept.

    Args:
        config: what to do.
        progress: called about every second.
        tell: called with what a user should know before work begins: a non-commercial licence.
        unlock: take over the write lock that a dead run on another machine left.

    Raises:
        CacheLocked: another run is writing this cache.
        InputError: it cannot fit on the disk; a machine of the cluster does not share the folders.
        GeomcacheError: see ``make_plan``; or what a worker met, by name.
    """
    started = time.perf_counter()
    with cluster(config.ray_address):
        plan = make_plan(config)
        if not plan.remaining:  # also on a disk that cannot be written
            return _work(plan, RunLog(None, progress, plan.manifest.rows, plan.manifest.rows), started)
        require_room(plan)
        if plan.non_commercial:
            tell(f"NOTE: not for commercial use, by the licence of the weights: {plan.manifest.recipe.encoder.license}")
        if config.ray_address is not None:
            require_shared_folders(config.out, config.pack)
        with write_lock(config.out, "geomcache extract", unlock=unlock):
            plan = begin(plan)
            write_config(config.out, config)
            to_do = (shard_rows(shard, plan.manifest.rows, plan.manifest.rows_per_shard) for shard in plan.remaining)
            done = plan.manifest.rows - sum(len(rows) for rows in to_do)
            result = _work(plan, RunLog(config.out, progress, plan.manifest.rows, done), started)
            if result.rows_encoded:
                write_record(config.out, result)
            remove_leftovers(config.out)  # of workers that died; nothing writes into a complete cache again
            return result


def _work(plan: ExtractPlan, log: RunLog, started: float) -> ExtractionRecord:
    config, manifest = plan.config, plan.manifest
    workers, cpus = worker_shape(
        config.workers, config.cpus_per_worker, config.gpus_per_worker, plan.device, local=config.ray_address is None
    )
    pool = Pool(
        count=min(workers, max(1, len(plan.remaining))),
        what="an extraction worker",
        advice="give it more memory: fewer --workers, a smaller encoder_config.batch_size; finished shards are kept",
        cpus_each=cpus,
        gpus_each=config.gpus_per_worker if plan.device.startswith("cuda") else 0.0,
        address=config.ray_address,
        always_ray=True,
        at_once=SHARDS_AT_ONCE,
        watch=log.watch,
    )
    log.begin(pool.count, plan.device, len(plan.remaining))
    arguments = (config.pack, config.out, manifest, plan.device, config.on_error, cpus)
    for _, report in run_tasks(ShardWorker, arguments, list(plan.remaining), pool):
        log.shard(report.commit, report.masked, report.worker)
    result = ExtractionRecord(
        cache=str(config.out),
        cache_id=manifest.recipe.fingerprint.cache_id,
        rows=manifest.rows,
        shards=manifest.shards,
        shards_done_before=manifest.shards - len(plan.remaining),
        rows_encoded=log.encoded,
        masked_rows=log.masked,
        rows_not_finite=log.rows_not_finite,
        workers=pool.count,
        device=plan.device,
        seconds=round(time.perf_counter() - started, 3),
        start_seconds=round(log.start_seconds, 3),
        rows_per_second=round(log.rows_per_second, 3),
        busy_seconds=log.busy_seconds,
        slot_deviation=log.slot_deviation,
    )
    log.event("end", **result.model_dump(mode="json"))
    return result
