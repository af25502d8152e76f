"""What an extraction will take, before it begins: bytes from the plan, time from a few batches on this machine."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.layout import CRC_BYTES, INDEX_ENTRY_BYTES, shard_rows
from geomcache.cache_schemas.manifest import Manifest
from geomcache.pipeline.encoding import gflop_per_row, one_thread, pad_rows
from geomcache.pipeline.interfaces import GeometryEncoder
from geomcache.pipeline.store.shard_file import ShardFile, compress
from geomcache.pipeline.store.statistics import TokenSums, even_rows
from geomcache.pipeline.tokens import StoredForm, build_encoder
from geomcache.stages.extract.cluster import worker_shape
from geomcache.stages.extract.frames_to_tokens import Block, FramesToTokens
from geomcache.stages.extract.plan import ExtractPlan
from geomcache.stages.extract.worker import open_encoder

WORKERS = (1, 8, 64)  # of the table
_PROBE_BATCHES = 3  # the first warms up
_WRITTEN_BYTES = 64 << 20
_LEAST_COMPRESSED = 0.3  # of the plain bytes; what cannot fit even then is refused


class Estimate(Schema):
    """``geomcache extract --dry-run``."""

    encoder: str
    license: str
    codec: str
    row_shape: tuple[int, ...]
    rows: int  # of the cache, or as many as were asked about
    shards: int
    shards_done: int
    frame_bytes: int  # pictures as the encoder is given them, uint8
    token_bytes: int  # tokens as float32
    stored_bytes: int  # of the cache when it is complete
    bytes_to_write: int
    free_bytes: int
    fits: bool
    device: str  # of the probe
    probe_rows: int
    decode_ms: float  # a row, one thread
    encode_ms: float  # a row, on the device
    store_ms: float  # a row, one thread: codec, statistics
    write_ms: float  # a row, to the disk of the cache
    gflop_per_row: float
    workers: int
    cpus_per_worker: int
    assumed_tflops: float | None  # instead of the measured time of the encoder
    rows_per_second: float  # of one worker
    hours: dict[int, float]  # by number of workers
    device_hours: float


def estimate(
    plan: ExtractPlan,
    rows: int | None = None,
    tflops: float | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Estimate:
    """Run a few batches and reckon.

    One CPU worker does everything on its core, one after the other; beside a GPU the stages overlap, and the slowest
    one counts (decoding and storing divided by the worker's CPUs). A shard is done by one worker.

    Args:
        plan: see ``make_plan(rough=True)``.
        rows: to reckon with instead of the pack's, e.g. 273465 for the four suites of LIBERO.
        tflops: what a device sustains, in TFLOP/s, to reckon with instead of the measured encoder.
        progress: called with (batches done, batches in all).
    """
    config, manifest = plan.config, plan.manifest
    probe = _probe(plan, progress)
    all_rows = rows if rows is not None else manifest.rows
    left = all_rows if rows is not None else _rows_left(plan)
    shards_left = -(-left // manifest.rows_per_shard)
    workers, cpus = worker_shape(
        config.workers, config.cpus_per_worker, config.gpus_per_worker, plan.device, local=config.ray_address is None
    )
    overlapped = plan.device.startswith("cuda") or tflops is not None
    encode = probe["encode"] if tflops is None else probe["gflop"] / tflops / 1000
    if overlapped:
        row_seconds = max(encode, (probe["decode"] + probe["store"]) / cpus, probe["write"])
    else:
        row_seconds = encode + probe["decode"] + probe["store"] + probe["write"]
    spec, contract = manifest.recipe.spec, manifest.recipe.contract
    return Estimate(
        encoder=spec.encoder,
        license=manifest.recipe.encoder.license,
        codec=spec.codec,
        row_shape=spec.row_shape,
        rows=all_rows,
        shards=-(-all_rows // manifest.rows_per_shard),
        shards_done=manifest.shards - len(plan.remaining) if rows is None else 0,
        frame_bytes=all_rows * sum(camera.height * camera.width * 3 for camera in contract.cameras),
        token_bytes=all_rows * 4 * spec.views * spec.tokens_per_view * spec.dim,
        stored_bytes=round(all_rows * probe["bytes"]),
        bytes_to_write=round(left * probe["bytes"]),
        free_bytes=free_bytes(config.out),
        fits=round(left * probe["bytes"]) <= free_bytes(config.out),
        device=_device_name(plan.device),
        probe_rows=round(probe["rows"]),
        decode_ms=round(1e3 * probe["decode"], 3),
        encode_ms=round(1e3 * probe["encode"], 3),
        store_ms=round(1e3 * probe["store"], 3),
        write_ms=round(1e3 * probe["write"], 3),
        gflop_per_row=round(probe["gflop"], 5),
        workers=workers,
        cpus_per_worker=cpus,
        assumed_tflops=tflops,
        rows_per_second=round(1 / row_seconds, 3),
        hours={
            count: round(min(left, -(-shards_left // count) * manifest.rows_per_shard) * row_seconds / 3600, 4)
            for count in sorted({*WORKERS, workers})
        },
        device_hours=round(left * row_seconds / 3600, 4),
    )


def require_room(plan: ExtractPlan) -> None:
    """``InputError`` when what is left to write cannot fit on the disk of the cache."""
    require_bytes(plan.config.out, round(_rows_left(plan) * _least_row_bytes(plan.manifest)))


def _rows_left(plan: ExtractPlan) -> int:
    rows, per_shard = plan.manifest.rows, plan.manifest.rows_per_shard
    return sum(len(shard_rows(shard, rows, per_shard)) for shard in plan.remaining)


def require_bytes(out: Path, needed: int) -> None:
    """``InputError`` unless the disk of ``out`` has room for so many bytes."""
    free = free_bytes(out)
    if needed > free:
        raise InputError(
            f"the cache cannot fit on the disk of {out}",
            expected=f"{size(needed)} free",
            found=f"{size(free)}",
            fix="--codec int8 or --pool 16 (docs/cache.md says what for), or an --out on another disk",
        )


def free_bytes(out: Path) -> int:
    """What may still be written below ``out``, which need not exist yet."""
    return shutil.disk_usage(_standing(out)).free


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _standing(path: Path) -> Path:
    path = path.resolve()
    while not path.is_dir():
        path = path.parent
    return path


def _least_row_bytes(manifest: Manifest) -> float:
    total = 0.0
    for name, array in manifest.arrays.items():
        plain = _row_bytes(manifest, name)
        total += plain * (_LEAST_COMPRESSED if array.compression else 1.0) + CRC_BYTES + INDEX_ENTRY_BYTES
    return total


def _row_bytes(manifest: Manifest, name: str) -> int:
    array = manifest.arrays[name]
    return int(np.dtype(array.dtype).itemsize * np.prod(array.row_shape))


def _probe(plan: ExtractPlan, progress: Callable[[int, int], None]) -> dict[str, float]:
    """Seconds of each stage and bytes, a row; GFLOP of the encoder, a row."""
    manifest = plan.manifest
    pack, encoder = open_encoder(plan.config.pack, manifest.recipe, plan.device)
    tokens, form = FramesToTokens(pack, encoder, plan.config.on_error), StoredForm(manifest.recipe.spec)
    batch = encoder.spec.encoder_batch_size
    numbers = even_rows(manifest.rows, batch * _PROBE_BATCHES).tolist()
    seconds: dict[str, float] = dict.fromkeys(("decode", "encode", "store"), 0.0)
    rows, stored_bytes, flops = 0, 0.0, 0.0
    samples: list[dict[str, Any]] = []
    batches = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
    beside = _standing(plan.config.out.parent)
    with pack, one_thread(), tempfile.TemporaryDirectory(prefix=".probe-", dir=beside) as folder:
        if len(batches) == 1:
            batches *= 2
        for number, part in enumerate(batches):
            progress(number, len(batches))
            times = [time.perf_counter()]
            block = tokens.decode(part)
            times.append(time.perf_counter())
            if number == 0:  # warms up; its time does not count
                flops = _gflop(plan, encoder, block)
                continue
            given = tokens.encode(block)
            times.append(time.perf_counter())
            given = form.prepare(given)
            stored = form.codec.encode(given)
            TokenSums.of(form.codec, given, stored)
            times.append(time.perf_counter())
            for stage, before, after in zip(seconds, times, times[1:], strict=False):
                seconds[stage] += after - before
            rows += len(part)
            samples.append(stored)
            stored_bytes += sum(
                sum(len(compress(row)) if manifest.arrays[name].compression else row.nbytes for row in array)
                + len(array) * (CRC_BYTES + INDEX_ENTRY_BYTES)
                for name, array in stored.items()
            )
        write = _write(Path(folder), manifest, samples)
    per_row = {stage: spent / rows for stage, spent in seconds.items()}
    return {**per_row, "write": write, "rows": rows, "bytes": stored_bytes / rows, "gflop": flops}


def _gflop(plan: ExtractPlan, encoder: GeometryEncoder, block: Block) -> float:
    """A row's; 0 where the first batch holds a bad row."""
    record, spec = plan.manifest.recipe.encoder, encoder.spec
    if len(block.parts) != 1:
        return 0.0
    if record.config.get("compile"):  # what is compiled cannot be counted
        uncompiled = {**record.config, "compile": False}
        encoder = build_encoder(spec.encoder, uncompiled, plan.manifest.recipe.contract, plan.device)
    return gflop_per_row(encoder, pad_rows(block.parts[0], spec.encoder_batch_size))


def _write(folder: Path, manifest: Manifest, samples: list[dict[str, Any]]) -> float:
    """Seconds a row: files as shards are, written and flushed, of the sampled rows over and over."""
    sampled = sum(len(next(iter(sample.values()))) for sample in samples)
    row_bytes = sum(_row_bytes(manifest, name) for name in manifest.arrays)
    room = min(_WRITTEN_BYTES, free_bytes(folder) // 4)
    rounds = min(manifest.rows_per_shard, room // row_bytes) // sampled
    if room < _WRITTEN_BYTES and rounds == 0:
        return 0.0  # the disk is nearly full: nothing is measured, and it will not fit
    rounds = max(1, rounds)
    started = time.perf_counter()
    for name, array in manifest.arrays.items():
        with ShardFile(folder / name, rounds * sampled, compressed=array.compression is not None) as file:
            for sample in samples * rounds:
                file.append(sample[name])
            file.finish()
    return (time.perf_counter() - started) / (rounds * sampled)


def _device_name(device: str) -> str:
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device
