"""``geomcache pack build``: plan, write the shards that are missing, join the index.

The pack is finished when ``pack.json`` stands. What a killed run left is kept shard by shard: a shard whose part of the
index was made by the same plan is not made again.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.fingerprint import digest_file, digest_json
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
from geomcache.pipeline.files import atomic_writer, locked_folder, remove_leftovers, require_own_folder, write_atomic
from geomcache.pipeline.interfaces import FrameSource
from geomcache.pipeline.open_source import SourceRequest, open_source, resolve
from geomcache.pipeline.pack.card import data_card
from geomcache.pipeline.pack.format import PARTS_FOLDER, episode_schema, part_name
from geomcache.pipeline.pack.plan import PackPlan, Planner, Progress, one_line, require_common_contract
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.pack.shard_writer import PackWorker, ShardTask, Undecodable, finished_part
from geomcache.pipeline.ray_workers import Pool, run_tasks
from geomcache.pipeline.sources._hub import commit_of

_REQUEST_NAME = "pack.request.json"
_DAMAGED_NAME = f"{PARTS_FOLDER}/damaged.json"
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
        InputError: ``out`` holds something else, or a pack of other sources; another process is writing there.
        ContractMismatch: the sources follow different conventions.
        SourceDamaged: see the source; not with ``skip_damaged``.
    """
    require_own_folder(out, lambda folder: (folder / _REQUEST_NAME).exists(), "a pack")
    resolved = [resolve(request) for request in requests]
    sources = [open_source(request) for request in resolved]
    require_common_contract(sources)
    progress(0, 0, "digesting the sources")
    request = PackRequest(
        sources=tuple(_record(*pair) for pair in zip(resolved, sources, strict=True)),
        contract=sources[0].contract,
        rows_per_shard=rows_per_shard,
        no_ops=no_ops,
        skip_damaged=skip_damaged,
    )
    if (standing := _standing(out, request)) is not None:
        return standing, True
    folders = [str(path) for one in resolved for path in (Path(one.path).resolve().parent, Path(one.path).parent)]
    planner = Planner(request, sources, folders)
    planner.plan({}, progress)  # a build that is refused claims no folder
    with locked_folder(out):
        if (standing := _standing(out, request)) is not None:  # made while we waited to plan
            return standing, True
        write_atomic(out / _REQUEST_NAME, request.model_dump_json(indent=2))
        remove_leftovers(out)
        return _finish(_write_shards(planner, resolved, request, out, workers, progress), out), False


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


def _standing(out: Path, request: PackRequest) -> PackInfo | None:
    """The finished pack in ``out``, if there is one; ``InputError`` if it is another, ``PackDamaged`` if files lack."""
    _require_same_request(out, request)
    if not (out / PACK_NAME).exists():
        return None
    shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)  # of a build that was killed at its very end
    with PackReader(out) as standing:
        return standing.info


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
    planner: Planner,
    sources: Sequence[SourceRequest],
    request: PackRequest,
    out: Path,
    workers: int,
    progress: Progress,
) -> PackPlan:
    """Write what is missing; returns the plan that was carried out.

    An episode whose pictures cannot be decoded changes the rows of all later shards. Shards under way are waited for,
    then the rest is planned anew without it.
    """
    undecodable = _remembered(out, request)
    plan = planner.plan(undecodable, progress)
    tasks = _missing(plan, out)
    issued, received = {task.shard for task in tasks}, set[int]()
    under_way: set[int] | None = None  # shards that are waited for before planning anew
    done = plan.rows - sum(_rows_in(plan, shard) for shard in issued)
    progress(done, plan.rows, "rows")
    pool = Pool(count=min(workers, max(1, len(tasks))), what="a packing worker", advice=_ADVICE)
    for task, result in run_tasks(PackWorker, (sources, out, request.contract), tasks, pool):
        received.add(task.shard)
        if isinstance(result, Undecodable):
            if not request.skip_damaged:
                raise result.problem
            undecodable[result.source, result.episode] = one_line(result.problem)
            _remember(out, request, undecodable)
            if under_way is None:
                under_way = issued - {task.shard for task in tasks}
                tasks.clear()
        else:
            done += _rows_in(plan, task.shard)
        if under_way is not None and under_way <= received:
            plan = planner.plan(undecodable, progress)
            tasks.extend(_missing(plan, out))
            issued, received, under_way = {task.shard for task in tasks}, set(), None
            done = plan.rows - sum(_rows_in(plan, shard) for shard in issued)
        progress(done, plan.rows, "rows")
    return plan


def _missing(plan: PackPlan, out: Path) -> list[ShardTask]:
    tasks = (_task(plan, shard) for shard in range(plan.shards))
    return [task for task in tasks if finished_part(out, task) is None]


def _rows_in(plan: PackPlan, shard: int) -> int:
    return len(shard_rows(shard, plan.rows, plan.request.rows_per_shard))


def _remember(out: Path, request: PackRequest, undecodable: Mapping[tuple[int, int], str]) -> None:
    """Keep what was found damaged, so that a stopped build need not find it again."""
    found = [[source, episode, why] for (source, episode), why in sorted(undecodable.items())]
    write_atomic(
        out / _DAMAGED_NAME, json.dumps({"request": digest_json(request.model_dump(mode="json")), "found": found})
    )


def _remembered(out: Path, request: PackRequest) -> dict[tuple[int, int], str]:
    """What an earlier build of the same request found damaged."""
    try:
        kept = json.loads((out / _DAMAGED_NAME).read_bytes())
        if kept["request"] != digest_json(request.model_dump(mode="json")):
            return {}
        return {(int(source), int(episode)): str(why) for source, episode, why in kept["found"]}
    except (OSError, ValueError, KeyError, TypeError):  # none, or cut by a crash: it is found again
        return {}


def _task(plan: PackPlan, shard: int) -> ShardTask:
    first = shard * plan.request.rows_per_shard
    return ShardTask(shard, first, tuple(plan.pieces(shard)), plan.row_schema, plan.shard_digest(shard))


def _finish(plan: PackPlan, out: Path) -> PackInfo:
    """Join the index, write the card, and last pack.json."""
    shards = [finished_part(out, _task(plan, shard)) for shard in range(plan.shards)]
    parts = [pa.ipc.open_file(pa.memory_map(str(out / part_name(k)))).read_all() for k in range(plan.shards)]
    rows = pa.concat_tables([part.cast(plan.row_schema) for part in parts])
    info = PackInfo(
        schema_version=2 if plan.steps is None else 3,
        request=plan.request,
        rows=plan.rows,
        episodes=len(plan.episodes),
        shards=tuple(shard for shard in shards if shard is not None),
        index=(_write_table(out, ROWS_NAME, rows), _write_table(out, EPISODES_NAME, _episodes(plan))),
        left_out=plan.left_out,
        no_op_rows=plan.no_op_rows,
        steps=plan.steps,
    )
    assert len(info.shards) == plan.shards, "every shard was written"
    _remove_shards_beyond(out, plan.shards)
    write_atomic(out / "README.md", data_card(info))
    write_atomic(out / PACK_NAME, info.model_dump_json(indent=2))
    shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)
    return info


def _remove_shards_beyond(out: Path, shards: int) -> None:
    """A plan of more rows may have stood here before; its last shards belong to nobody."""
    for path in (out / "shards").glob("*.tar"):
        if path.stem.isdigit() and int(path.stem) >= shards:
            path.unlink()


def _episodes(plan: PackPlan) -> pa.Table:
    schema = episode_schema(plan.steps)
    lines = [
        {
            "episode": number,
            "suite": episode.head.suite,
            "task": episode.head.task,
            "number": episode.head.number,
            "instruction": episode.head.instruction,
            "first_row": episode.first_row,
            "rows": len(episode),
            "metadata": json.dumps(episode.head.metadata, sort_keys=True),
            "steps": len(episode.head.actions_TA),
        }
        for number, episode in enumerate(plan.episodes)
    ]
    return pa.table({name: [line[name] for line in lines] for name in schema.names}, schema=schema)


def _write_table(out: Path, name: str, table: pa.Table) -> PackFile:
    with atomic_writer(out / name) as file, pa.ipc.new_file(file, table.schema) as sink:
        sink.write_table(table.combine_chunks())
    return PackFile(name=name, bytes=(out / name).stat().st_size, sha256=digest_file(out / name))
