"""Commit records and Zarr metadata of a cache, read and compared with its manifest."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from geomcache.cache_schemas.errors import CacheDamaged, CacheStale, GeomcacheError
from geomcache.cache_schemas.layout import array_metadata, commit_path, group_metadata, shard_path, shard_rows
from geomcache.cache_schemas.manifest import MANIFEST_NAME, Manifest, ShardCommit
from geomcache.pipeline.store.local_files import LocalFiles
from geomcache.pipeline.store.objects import ObjectStore
from geomcache.pipeline.store.shard_file import REDO

GROUP_ATTRIBUTES = {"geomcache": MANIFEST_NAME}


def read_commits(
    files: LocalFiles | ObjectStore,
    manifest: Manifest,
    on_error: Callable[[int, GeomcacheError], None] | None = None,
) -> dict[int, ShardCommit]:
    """Commit records by shard number; ``on_error(shard, problem)`` takes what is wrong, without it it is raised.

    Raises:
        CacheDamaged: a record is not what was written or contradicts the manifest.
        CacheStale: a record belongs to another cache.
    """
    # A folder is listed; behind a URL there may be no listing, so every record is asked for.
    shards = _committed(files.folder, manifest) if isinstance(files, LocalFiles) else list(range(manifest.shards))
    commits, cache_id = {}, manifest.recipe.fingerprint.cache_id
    found: Sequence[bytes | CacheDamaged | None] = files.read_many([commit_path(shard) for shard in shards])
    for shard, data in zip(shards, found, strict=True):
        if data is None:
            continue
        try:
            if isinstance(data, CacheDamaged):
                raise data
            commits[shard] = _parse(data, f"{files.location}/{commit_path(shard)}", manifest, cache_id, shard)
        except GeomcacheError as problem:
            if on_error is None:
                raise
            on_error(shard, problem)
    return commits


def _parse(data: bytes, where: str, manifest: Manifest, cache_id: str, shard: int) -> ShardCommit:
    commit = ShardCommit.read(data, where, manifest)
    rows = shard_rows(shard, manifest.rows, manifest.rows_per_shard)
    if commit.cache_id != cache_id:
        raise CacheStale(
            f"{where} belongs to another cache",
            expected=cache_id,
            found=commit.cache_id,
            fix=REDO,
        )
    if (commit.shard, commit.first_row, commit.rows) != (shard, rows.start, len(rows)):
        raise CacheDamaged(f"{where} is the record of another shard", found=f"shard {commit.shard}", fix=REDO)
    named = [commit.digests.keys(), commit.sizes.keys()]
    if manifest.schema_version >= 2 or commit.row_crc32c:
        named.append(commit.row_crc32c.keys())
    if any(names != manifest.arrays.keys() for names in named):
        raise CacheDamaged(f"{where} names other arrays than the manifest", fix=REDO)
    if any(len(each) != 8 * commit.rows for each in commit.row_crc32c.values()):
        raise CacheDamaged(f"{where} does not have one checksum a row", fix=REDO)
    return commit


def _committed(folder: Path, manifest: Manifest) -> list[int]:
    try:
        names = [entry.name for entry in os.scandir(folder / "commits")]
    except FileNotFoundError:
        return []
    numbers = (int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal())
    return sorted(number for number in numbers if number < manifest.shards)


def whole_shards(folder: Path, manifest: Manifest, commits: Mapping[int, ShardCommit]) -> set[int]:
    """The committed shards whose files stand with the committed sizes; ``cache verify`` reads their bytes too."""
    whole = set()
    for shard, commit in commits.items():
        paths = {name: shard_path(name, shard, len(array.row_shape)) for name, array in manifest.arrays.items()}
        try:
            if all(os.stat(folder / path).st_size == commit.sizes[name] for name, path in paths.items()):
                whole.add(shard)
        except OSError:
            continue
    return whole


def zarr_metadata(manifest: Manifest) -> dict[str, str]:
    """Path inside the store -> content of every zarr.json."""
    documents = {"zarr.json": group_metadata(GROUP_ATTRIBUTES)}
    for name, array in manifest.arrays.items():
        documents[f"{name}/zarr.json"] = array_metadata(
            rows=manifest.rows,
            rows_per_shard=manifest.rows_per_shard,
            row_shape=array.row_shape,
            dtype=array.dtype,
            compressed=array.compression is not None,
            attributes={"logical_dtype": array.logical_dtype},
        )
    return {path: json.dumps(document, indent=2) for path, document in documents.items()}


def wrong_metadata(files: LocalFiles | ObjectStore, manifest: Manifest) -> list[str]:
    """The zarr.json files that are missing or do not say what the manifest says."""
    documents = zarr_metadata(manifest)
    found: Sequence[bytes | CacheDamaged | None] = files.read_many(list(documents))
    return [name for (name, text), data in zip(documents.items(), found, strict=True) if not _same_json(data, text)]


def require_metadata(files: LocalFiles | ObjectStore, manifest: Manifest) -> None:
    """``CacheDamaged`` when another Zarr reader would see something else than this one."""
    if wrong := wrong_metadata(files, manifest):
        raise CacheDamaged(
            f"{files.location}/{wrong[0]} is missing or does not say what the manifest says",
            expected="the Zarr metadata that was written with the cache",
            found=f"{len(wrong)} other file(s)",
            fix="geomcache cache verify CACHE --repair",
        )


def _same_json(data: bytes | CacheDamaged | None, text: str) -> bool:
    if not isinstance(data, bytes):
        return False
    if data == text.encode():
        return True
    try:  # another Zarr writer may have spelled the same document in its own way
        found: object = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return bool(found == json.loads(text))
