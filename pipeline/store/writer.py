"""Creates a cache folder and commits whole shards into it.

Order of a commit: every array's shard file (temporary name, fsync, rename, fsync of the folder), then the commit
record the same way. A shard without a record does not exist; writing a shard twice gives the same bytes.
"""

import contextlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.base import seal
from geomcache.cache_schemas.errors import CacheDamaged, CacheStale, InputError
from geomcache.cache_schemas.layout import commit_path, group_metadata, shard_path, shard_rows
from geomcache.cache_schemas.manifest import MANIFEST_NAME, Manifest, ShardCommit, ShardStatistics
from geomcache.pipeline.files import TEMPORARY_SUFFIX, remove_leftovers, require_own_folder, write_atomic
from geomcache.pipeline.store.commits import GROUP_ATTRIBUTES, zarr_metadata
from geomcache.pipeline.store.lock import LOCK_NAME
from geomcache.pipeline.store.shard_file import ShardFile

CARD_NAME = "README.md"


def standing_manifest(path: Path) -> Manifest | None:
    """The manifest of the cache at ``path``; None when the folder is new or empty.

    Raises:
        InputError: the folder holds something else. CacheDamaged, SchemaTooNew: the manifest cannot be read.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)) and not path.exists():
        raise InputError(
            f"{path} looks like a URL", expected="a folder", found="a URL", fix="write to a folder, then copy it there"
        )
    require_own_folder(path, _is_a_cache, "a token cache")
    return Manifest.read(path / MANIFEST_NAME, CacheDamaged) if (path / MANIFEST_NAME).exists() else None


def create_or_open(path: Path, manifest: Manifest, card: str) -> Manifest:
    """Make an empty cache at ``path``, or accept the one that stands there if it is the same; returns what stands.

    Raises:
        InputError: the folder holds something else.
        CacheStale: a cache of another pack, encoder, weights or codec stands there; every difference is named.
    """
    standing = require_same(path, manifest)
    remove_leftovers(path)
    if standing is None:
        _remove_stopped_creation(path)
    for name, text in zarr_metadata(manifest).items():  # before the manifest: with it, the cache can be opened
        if not (path / name).exists():
            write_atomic(inside(path, name), text)
    if standing is None:
        write_atomic(path / MANIFEST_NAME, seal(manifest))
    if not (path / CARD_NAME).exists():  # also when an earlier run was stopped right here
        write_atomic(path / CARD_NAME, card)
    return standing or manifest


def require_same(path: Path, manifest: Manifest) -> Manifest | None:
    """The standing manifest if there is one and it is the same cache; raises as ``create_or_open``, writes nothing."""
    standing = standing_manifest(path)
    if standing is not None and (differences := standing.describe_difference(manifest)):
        raise CacheStale(
            f"{path} holds a cache of something else",
            expected="the same pack, encoder, weights, codec and shard size",
            found="; ".join(differences),
            fix="choose another --out, or delete this folder if it is not needed",
        )
    return standing


class ShardSink:
    """One shard on its way into a cache; use as a context manager: blocks of rows in order, then ``commit``.

    Args:
        path: the cache's folder.
        manifest: of the cache.
        shard: its number.
    """

    def __init__(self, path: Path, manifest: Manifest, shard: int) -> None:
        self._path, self._manifest, self._shard = path, manifest, shard
        self._rows = shard_rows(shard, manifest.rows, manifest.rows_per_shard)
        self._taken, self._seconds = 0, 0.0

    def __enter__(self) -> "ShardSink":
        with ExitStack() as stack:
            self._files = {}
            for name, spec in self._manifest.arrays.items():
                file = inside(self._path, shard_path(name, self._shard, len(spec.row_shape)))
                compressed = spec.compression is not None
                self._files[name] = stack.enter_context(
                    ShardFile(file, self._manifest.rows_per_shard, compressed=compressed)
                )
            self._open = stack.pop_all()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._open.__exit__(*problem)  # empty after a commit

    def append(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take the next rows of every array; they must not change before the commit."""
        started = time.perf_counter()
        taken = {len(arrays[name]) for name in self._files}
        assert len(taken) == 1, {name: array.shape for name, array in arrays.items()}
        for name, spec in self._manifest.arrays.items():
            assert arrays[name].shape[1:] == spec.row_shape, (arrays[name].shape, spec)
            assert arrays[name].dtype == np.dtype(spec.dtype), (arrays[name].dtype, spec)
            self._files[name].append(arrays[name])
        self._taken += taken.pop()
        self._seconds += time.perf_counter() - started

    def commit(self, statistics: ShardStatistics, seconds: Mapping[str, float]) -> ShardCommit:
        """Publish the shard's files, then its record; ``seconds`` are of the other stages, writing is added."""
        started = time.perf_counter()
        assert self._taken == len(self._rows), (self._taken, self._rows)
        for file in self._files.values():
            file.finish()
        self._open.close()
        written = {name: file.written for name, file in self._files.items()}
        commit = ShardCommit(
            shard=self._shard,
            first_row=self._rows.start,
            rows=len(self._rows),
            cache_id=self._manifest.recipe.fingerprint.cache_id,
            digests={name: file.sha256 for name, file in written.items()},
            sizes={name: file.bytes for name, file in written.items()},
            row_crc32c={name: file.row_crc32c for name, file in written.items()},
            statistics=statistics,
            seconds={**seconds, "write": self._seconds + time.perf_counter() - started},
        )
        write_atomic(inside(self._path, commit_path(self._shard)), seal(commit))
        return commit


def commit_shard(
    path: Path,
    manifest: Manifest,
    shard: int,
    arrays: Mapping[str, NDArray[Any]],
    *,
    statistics: ShardStatistics,
    seconds: Mapping[str, float],
) -> ShardCommit:
    """Write every array of one shard, then its commit record."""
    with ShardSink(path, manifest, shard) as sink:
        sink.append(arrays)
        return sink.commit(statistics, seconds)


def inside(cache: Path, name: str) -> Path:
    """``cache/name``, to be written or removed; ``CacheDamaged`` when a link on the way leads out of the cache."""
    path = cache / name
    if not path.parent.resolve().is_relative_to(cache.resolve()):
        raise CacheDamaged(
            f"{path} would lie outside the cache",
            expected="folders",
            found=f"a link that leads to {path.parent.resolve()}",
            fix="remove the link; to keep a cache on another disk, link its whole folder",
        )
    return path


def _remove_stopped_creation(path: Path) -> None:
    """What a run that was stopped before its manifest left, perhaps with another codec: metadata and nothing else."""
    for metadata in path.glob("*/zarr.json"):
        inside(path, f"{metadata.parent.name}/{metadata.name}").unlink()
        with contextlib.suppress(OSError):  # the new run may use the folder as well
            metadata.parent.rmdir()


def _is_a_cache(folder: Path) -> bool:
    if (folder / MANIFEST_NAME).exists():
        return True
    if (folder / "zarr.json").is_file() and not (folder / "commits").exists():  # a creation that was stopped early
        return (folder / "zarr.json").read_bytes() == json.dumps(group_metadata(GROUP_ATTRIBUTES), indent=2).encode()
    return all(entry.name == LOCK_NAME or entry.name.endswith(TEMPORARY_SUFFIX) for entry in folder.iterdir())
