"""``geomcache pack build``: plan, write the shards that are missing, join the index.

The pack is finished when ``pack.json`` stands. What a killed run left is kept shard by shard: a shard whose part of the
index was made by the same plan is not made again.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from geomcache.cache_schemas.errors import InputError, PackDamaged
from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.cache_schemas.layout import shard_rows
from geomcache.cache_schemas.pack_info import (
    EPISODES_NAME,
    PACK_NAME,
    ROWS_NAME,
    NoOpFilter,
    PackFile,
    PackInfo,
    PackRequest,
    SourceRecord,
)
from geomcache.pipeline.files import atomic_writer, remove_leftovers, require_own_folder, write_atomic
from geomcache.pipeline.interfaces import FrameSource
from geomcache.pipeline.open_source import SourceRequest, open_source, resolve
from geomcache.pipeline.pack.card import data_card
from geomcache.pipeline.pack.format import EPISODE_SCHEMA, PARTS_FOLDER, part_name, row_schema
from geomcache.pipeline.pack.plan import PackPlan, Progress, make_plan, require_common_contract
from geomcache.pipeline.pack.shard_writer import PackWorker, ShardTask, Undecodable, finished_part
from geomcache.pipeline.ray_workers import Pool, run_tasks
from geomcache.pipeline.sources._hub import commit_of

_REQUEST_NAME = "pack.request.json"
_ADVICE = "give it more memory: fewer --workers; finished shards are kept"


def build_pack(
    requests: Sequence[SourceRequest],
    out: Path,
    *,
    rows_per_shard: int,
    no_ops: NoOpFilter | None,
    skip_damaged: bool,
    workers: int,
    progress: Progress,
) -> tuple[PackInfo, bool]:
    """Write a pack; returns (card, True when it already stood). ``progress`` is told (done, in all, of what).

    Raises:
        InputError: ``out`` holds something else, or a pack of other sources.
        ContractMismatch: the sources follow different conventions.
        SourceDamaged: see the source; not with ``skip_damaged``.
    """
    require_own_folder(out, lambda folder: (folder / _REQUEST_NAME).exists(), "a pack")
    resolved = [resolve(request) for request in requests]
    sources = [open_source(request) for request in resolved]
    progress(0, 0, "digesting the sources")
    require_common_contract(sources)
    request = PackRequest(
        sources=tuple(_record(*pair) for pair in zip(resolved, sources, strict=True)),
        contract=sources[0].contract,
        rows_per_shard=rows_per_shard,
        no_ops=no_ops,
        skip_damaged=skip_damaged,
    )
    _require_same_request(out, request)
    if (out / PACK_NAME).exists():
        return PackInfo.read(out / PACK_NAME, PackDamaged), True
    undecodable: dict[tuple[int, int], str] = {}
    while True:
        plan = make_plan(request, sources, undecodable, progress)
        write_atomic(out / _REQUEST_NAME, request.model_dump_json(indent=2))
        remove_leftovers(out)
        damage = _write_shards(plan, resolved, out, workers, progress)
        if damage is None:
            return _finish(plan, out), False
        if not skip_damaged:
            raise damage.problem
        undecodable[damage.source, damage.episode] = damage.problem.found


def _record(request: SourceRequest, source: FrameSource) -> SourceRecord:
    assert request.kind is not None
    commit = commit_of(Path(request.path))
    return SourceRecord(
        kind=request.kind,
        location=source.location,
        revision=source.revision,
        settings=request.settings,
        details={**source.details, **({"hub commit": commit} if commit else {})},
    )


def _require_same_request(out: Path, request: PackRequest) -> None:
    path = out / _REQUEST_NAME
    if path.exists() and (out / PACK_NAME).exists():  # an unfinished pack may be started anew
        standing = PackRequest.parse(path.read_bytes(), str(path), InputError)
        if differences := standing.describe_difference(request):
            raise InputError(
                f"{out} holds a pack of other sources or settings",
                expected="the same sources, cameras and rows per shard",
                found="; ".join(differences),
                fix="choose another --out",
            )


def _write_shards(
    plan: PackPlan, sources: Sequence[SourceRequest], out: Path, workers: int, progress: Progress
) -> Undecodable | None:
    """Write what is missing; stops at the first episode that cannot be decoded."""
    tasks = [_task(plan, shard) for shard in range(plan.shards)]
    missing = [task for task in tasks if finished_part(out, task) is None]
    rows = {task.shard: len(shard_rows(task.shard, plan.rows, plan.request.rows_per_shard)) for task in tasks}
    done = plan.rows - sum(rows[task.shard] for task in missing)
    progress(done, plan.rows, "rows")
    pool = Pool(count=min(workers, len(missing)), what="a packing worker", advice=_ADVICE)
    for task, result in run_tasks(PackWorker, (sources, out, plan.request.contract), missing, pool):
        if isinstance(result, Undecodable):
            return result
        done += rows[task.shard]
        progress(done, plan.rows, "rows")
    return None


def _task(plan: PackPlan, shard: int) -> ShardTask:
    first = shard * plan.request.rows_per_shard
    return ShardTask(shard, first, tuple(plan.pieces(shard)), plan.shard_digest(shard))


def _finish(plan: PackPlan, out: Path) -> PackInfo:
    """Join the index, write the card, and last pack.json."""
    shards = [finished_part(out, _task(plan, shard)) for shard in range(plan.shards)]
    parts = [pa.ipc.open_file(pa.memory_map(str(out / part_name(k)))).read_all() for k in range(plan.shards)]
    schema = row_schema(plan.request.contract)
    rows = pa.concat_tables([part.cast(schema) for part in parts])
    info = PackInfo(
        request=plan.request,
        rows=plan.rows,
        episodes=len(plan.episodes),
        shards=tuple(shard for shard in shards if shard is not None),
        index=(_write_table(out, ROWS_NAME, rows), _write_table(out, EPISODES_NAME, _episodes(plan))),
        left_out=plan.left_out,
        no_op_rows=plan.no_op_rows,
    )
    assert len(info.shards) == plan.shards, "every shard was written"
    write_atomic(out / "README.md", data_card(info))
    write_atomic(out / PACK_NAME, info.model_dump_json(indent=2))
    shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)
    _remove_shards_beyond(out, plan.shards)
    return info


def _remove_shards_beyond(out: Path, shards: int) -> None:
    """A plan of more rows may have stood here before; its last shards belong to nobody."""
    for path in (out / "shards").glob("*.tar"):
        if path.stem.isdigit() and int(path.stem) >= shards:
            path.unlink()


def _episodes(plan: PackPlan) -> pa.Table:
    lines = [
        (
            number,
            episode.head.suite,
            episode.head.task,
            episode.head.number,
            episode.head.instruction,
            episode.first_row,
            len(episode),
            json.dumps(episode.head.metadata, sort_keys=True),
        )
        for number, episode in enumerate(plan.episodes)
    ]
    columns = [list(column) for column in zip(*lines, strict=True)]
    return pa.table(dict(zip(EPISODE_SCHEMA.names, columns, strict=True)), schema=EPISODE_SCHEMA)


def _write_table(out: Path, name: str, table: pa.Table) -> PackFile:
    with atomic_writer(out / name) as file, pa.ipc.new_file(file, table.schema) as sink:
        sink.write_table(table.combine_chunks())
    return PackFile(name=name, bytes=(out / name).stat().st_size, sha256=digest_file(out / name))
