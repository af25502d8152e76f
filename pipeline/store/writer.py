"""Creates a cache folder and commits whole shards into it.

Order of a commit: every array's shard file (temporary name, fsync, rename, fsync of the folder), then the commit
record the same way. A shard without a record does not exist; writing a shard twice gives the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import CacheDamaged, CacheStale
from geomcache.cache_schemas.layout import array_metadata, commit_path, group_metadata, shard_path, shard_rows
from geomcache.cache_schemas.manifest import MANIFEST_NAME, Manifest, ShardCommit
from geomcache.pipeline.files import remove_leftovers, require_own_folder, write_atomic
from geomcache.pipeline.store.shard_file import write_shard


def create_or_open(path: Path, manifest: Manifest, card: str) -> None:
    """Make an empty cache at ``path``, or accept the one that stands there if it is the same.

    Raises:
        InputError: the folder holds something else.
        CacheStale: a cache of another pack, encoder, weights or codec stands there; every difference is named.
    """
    require_own_folder(path, lambda folder: (folder / MANIFEST_NAME).exists(), "a token cache")
    standing_path = path / MANIFEST_NAME
    if standing_path.exists():
        standing = Manifest.read(standing_path, CacheDamaged)
        if differences := standing.describe_difference(manifest):
            raise CacheStale(
                f"{path} holds a cache of something else",
                expected="the same pack, encoder, weights, codec and shard size",
                found="; ".join(differences),
                fix="choose another --out, or delete this folder if it is not needed",
            )
        remove_leftovers(path)
    else:
        write_atomic(standing_path, manifest.model_dump_json(indent=2))
        write_atomic(path / "README.md", card)
    for name, text in zarr_metadata(manifest).items():
        if not (path / name).exists():  # also when an earlier run was stopped right here
            write_atomic(path / name, text)


def zarr_metadata(manifest: Manifest) -> dict[str, str]:
    """Path inside the store -> content of every zarr.json."""
    documents = {"zarr.json": group_metadata({"geomcache": MANIFEST_NAME})}
    for name, array in manifest.arrays.items():
        documents[f"{name}/zarr.json"] = array_metadata(
            rows=manifest.rows,
            rows_per_shard=manifest.rows_per_shard,
            row_shape=array.row_shape,
            dtype=array.dtype,
            attributes={"logical_dtype": array.logical_dtype},
        )
    return {path: json.dumps(document, indent=2) for path, document in documents.items()}


def commit_shard(
    path: Path,
    manifest: Manifest,
    shard: int,
    arrays: Mapping[str, NDArray[Any]],
    *,
    statistics: dict[str, float],
    seconds: dict[str, float],
) -> ShardCommit:
    """Write every array of one shard, then its commit record."""
    rows = shard_rows(shard, manifest.rows, manifest.rows_per_shard)
    digests, sizes = {}, {}
    for name, spec in manifest.arrays.items():
        array = arrays[name]
        assert array.shape == (len(rows), *spec.row_shape), (array.shape, spec)
        assert array.dtype == np.dtype(spec.dtype), (array.dtype, spec)
        written = write_shard(path / shard_path(name, shard, len(spec.row_shape)), array, manifest.rows_per_shard)
        digests[name], sizes[name] = written.sha256, written.bytes
    commit = ShardCommit(
        shard=shard,
        first_row=rows.start,
        rows=len(rows),
        cache_id=manifest.recipe.fingerprint.cache_id,
        digests=digests,
        sizes=sizes,
        statistics=statistics,
        seconds=seconds,
    )
    write_atomic(path / commit_path(shard), commit.model_dump_json(indent=2))
    return commit


def read_commits(path: Path, manifest: Manifest) -> dict[int, ShardCommit]:
    """Commit records by shard number.

    Raises:
        CacheDamaged: a record cannot be read or contradicts the manifest.
        CacheStale: a record belongs to another cache.
    """
    commits = {}
    for shard in committed_shards(path, manifest):
        record = path / commit_path(shard)
        commit = ShardCommit.parse(record.read_bytes(), str(record), CacheDamaged)
        rows = shard_rows(shard, manifest.rows, manifest.rows_per_shard)
        if (commit.shard, commit.first_row, commit.rows) != (shard, rows.start, len(rows)):
            raise CacheDamaged(f"{record} is the record of another shard", found=f"shard {commit.shard}")
        if commit.cache_id != manifest.recipe.fingerprint.cache_id:
            raise CacheStale(
                f"{record} belongs to another cache",
                expected=manifest.recipe.fingerprint.cache_id,
                found=commit.cache_id,
                fix="geomcache cache verify CACHE --repair, then run the same geomcache extract again",
            )
        commits[shard] = commit
    return commits


def committed_shards(path: Path, manifest: Manifest) -> list[int]:
    """Shards of the manifest that have a commit record, in order."""
    numbers = (int(record.stem) for record in (path / "commits").glob("[0-9]*.json") if record.stem.isdigit())
    return sorted(number for number in numbers if number < manifest.shards)


def token_statistics(tokens_NVGD: torch.Tensor) -> dict[str, float]:
    """Summary of one shard's decoded tokens, over finite values."""
    finite = torch.isfinite(tokens_NVGD)
    values = tokens_NVGD[finite]
    norms = torch.where(finite, tokens_NVGD, 0.0).norm(dim=-1)
    empty = values.numel() == 0
    return {
        "min": 0.0 if empty else float(values.min()),
        "max": 0.0 if empty else float(values.max()),
        "mean_norm": float(norms.mean()),
        "non_finite": float((~finite).sum()),
    }
