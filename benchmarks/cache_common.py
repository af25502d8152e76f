"""What the cache's benchmarks share: made rows and caches, eviction from the page cache, ways that take turns."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import CameraContract, Contract
from geomcache.cache_schemas.fingerprint import Fingerprint
from geomcache.cache_schemas.layout import shard_rows
from geomcache.cache_schemas.manifest import EncoderRecord, Manifest, ShardStatistics, TokenRecipe
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.codecs.bf16 import bfloat16_bits
from geomcache.pipeline.store.bench import evict, resident_share
from geomcache.pipeline.store.writer import commit_shard, create_or_open
from geomcache.pipeline.tokens import build_codec

ROW = (2, 256, 1024)  # V, G, D
ROW_BYTES = 2 * 256 * 1024 * 2
PER_SHARD, BATCH, PIECE = 256, 64, 8 << 20
Rows = NDArray[np.int64]


def spec_of(dim: int = ROW[2], **storage: Any) -> TokenSpec:
    return TokenSpec(
        encoder="synthetic", tap="none", cameras=("a", "b"), grid=(16, 16), dim=dim,
        image_size=(224, 224), encoder_batch_size=1, **storage,
    )  # fmt: skip


def new_cache(folder: Path, rows: int, per_shard: int = PER_SHARD) -> Manifest:
    """An empty cache of 1 MiB rows."""
    spec = spec_of()
    recipe = TokenRecipe(
        spec=spec,
        contract=Contract(
            image_orientation="upright",
            cameras=tuple(CameraContract(name=name, height=224, width=224) for name in spec.cameras),
            has_depth=False,
        ),
        fingerprint=Fingerprint(encoder_config="0" * 64, weights="none", image_path="1", pack="0" * 64),
        encoder=EncoderRecord(name="synthetic", config={}, license="none"),
    )
    arrays = build_codec(spec).arrays()
    manifest = Manifest(recipe=recipe, rows=rows, rows_per_shard=per_shard, arrays=arrays, geomcache_version="bench")
    return create_or_open(folder, manifest, "made by benchmarks/cache.py\n")


def made_rows(rows: range) -> NDArray[np.uint16]:
    """[n, V, G, D] bfloat16 bits that do not compress; the first value is the row's number."""
    generator = torch.Generator().manual_seed(0)
    base = bfloat16_bits(torch.randn(32, *ROW, generator=generator))
    made = np.stack([np.roll(base[row % 32].reshape(-1), row).reshape(ROW) for row in rows])
    made[:, 0, 0, 0] = rows
    return made


def statistics_record() -> ShardStatistics:
    return ShardStatistics(min=-5, max=5, mean_norm=32, non_finite=0, mean=0, std=1, valid_rows="ff" * (PER_SHARD // 8))


def fill(folder: Path, manifest: Manifest) -> None:
    for shard in range(manifest.shards):
        rows = made_rows(shard_rows(shard, manifest.rows, manifest.rows_per_shard))
        commit_shard(folder, manifest, shard, {"tokens": rows}, statistics=statistics_record(), seconds={})


def evict_files(paths: Sequence[Path]) -> None:
    """Drop whole files from the page cache, and see that they are gone."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            evict(handle)
            size = os.fstat(handle).st_size
            assert size < PIECE or resident_share(handle, 0, size) < 0.01, f"{path} stays in the page cache"
        finally:
            os.close(handle)


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def take_turns(ways: dict[str, Callable[[Rows], float]], lists: Sequence[Rows]) -> dict[str, list[float]]:
    """Seconds of every way on every list; another one begins each time."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for rows in lists:
        for name in order:
            times[name].append(ways[name](rows))
        order.append(order.pop(0))
    return times


def over(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    return float(np.median(np.array(times[theirs]) / np.array(times[ours])))


def gigabytes(times: Sequence[float], rows: int) -> float:
    return rows * ROW_BYTES / float(np.median(times)) / 1e9


def batch_lists(rows: int, count: int, size: int) -> list[Rows]:
    generator = np.random.default_rng(1)
    return [generator.choice(rows, size, replace=False) for _ in range(count)]
