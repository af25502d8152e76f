"""Whole-store check: structure, commit records, digests, checksums of every row; optional repair."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geomcache.cache_schemas.errors import CacheDamaged, GeomcacheError
from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.cache_schemas.layout import commit_path, shard_path, shard_rows
from geomcache.cache_schemas.manifest import Manifest, ShardCommit
from geomcache.pipeline.files import write_atomic
from geomcache.pipeline.store.reader import open_manifest
from geomcache.pipeline.store.shard_file import read_index, read_rows
from geomcache.pipeline.store.writer import committed_shards, zarr_metadata


@dataclass(frozen=True)
class VerifyResult:
    """What was found; ``damaged`` maps a shard to its problem."""

    shards: int
    committed: int
    damaged: dict[int, str]
    metadata: tuple[str, ...]  # zarr.json files that are missing or not those of the manifest
    repaired: bool

    @property
    def complete(self) -> bool:
        """Every shard is there and whole."""
        return self.committed == self.shards and not self.damaged and not self.metadata


def verify_cache(path: Path, *, repair: bool, progress: Callable[[int, int], None]) -> VerifyResult:
    """Check every byte of the cache; with ``repair`` drop damaged shards so that extract redoes just those."""
    manifest = open_manifest(path)
    wrong = [name for name, text in zarr_metadata(manifest).items() if not _holds(path / name, text)]
    if repair:
        for name in wrong:
            write_atomic(path / name, zarr_metadata(manifest)[name])
    committed, damaged = 0, {}
    shards = committed_shards(path, manifest)
    for shard in shards:
        record = path / commit_path(shard)
        committed += 1
        try:
            _check_shard(path, manifest, shard, ShardCommit.parse(record.read_bytes(), str(record), CacheDamaged))
        except GeomcacheError as problem:
            damaged[shard] = problem.what
            if repair:
                record.unlink(missing_ok=True)
        progress(committed, len(shards))
    return VerifyResult(manifest.shards, committed, damaged, tuple(wrong), repair and bool(damaged or wrong))


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_bytes() == text.encode()


def _check_shard(path: Path, manifest: Manifest, shard: int, commit: ShardCommit) -> None:
    rows = shard_rows(shard, manifest.rows, manifest.rows_per_shard)
    if commit.cache_id != manifest.recipe.fingerprint.cache_id or (commit.shard, commit.rows) != (
        shard,
        len(rows),
    ):
        raise CacheDamaged(f"shard {shard}: its commit record belongs to another cache or shard")
    if set(commit.digests) != set(manifest.arrays) or set(commit.sizes) != set(manifest.arrays):
        raise CacheDamaged(f"shard {shard}: its commit record names other arrays than the manifest")
    for name, array in manifest.arrays.items():
        file = path / shard_path(name, shard, len(array.row_shape))
        index = read_index(file, manifest.rows_per_shard)
        buffer = bytearray(math.prod(array.row_shape) * np.dtype(array.dtype).itemsize)
        view = memoryview(buffer)
        with file.open("rb") as handle:
            for slot in range(len(rows)):
                read_rows(handle.fileno(), file, index, [slot], [view])
        if file.stat().st_size != commit.sizes[name] or digest_file(file) != commit.digests[name]:
            raise CacheDamaged(f"{file}: its digest is not the committed one")
