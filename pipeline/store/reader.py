"""A cache opened for reading: its manifest, its commit records, and tokens by row number."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import CacheDamaged, CacheIncomplete, CacheMissing, CacheStale
from geomcache.cache_schemas.manifest import MANIFEST_NAME, Manifest, TokenRecipe
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.commits import read_commits, require_metadata
from geomcache.pipeline.store.local_files import LocalFiles
from geomcache.pipeline.store.objects import ObjectStore, is_remote, open_objects
from geomcache.pipeline.store.rows import Check, StoredRows
from geomcache.pipeline.tokens import as_tensors, build_codec

READ_THREADS = 8  # 8 to 16 reach a local disk's sequential rate with random rows (shared measurement)


def open_files(location: Path | str) -> LocalFiles | ObjectStore:
    """Where a cache's bytes lie: a folder, or a URL such as s3://bucket/cache."""
    if is_remote(location):
        return open_objects(str(location))
    return LocalFiles(Path(str(location).removeprefix("file://")))


def open_manifest(location: Path | str) -> Manifest:
    """The manifest of the cache at ``location``.

    Raises:
        CacheMissing: no cache stands there. CacheDamaged, SchemaTooNew: it cannot be read.
    """
    if is_remote(location):
        return read_manifest(open_files(location))
    path = Path(str(location).removeprefix("file://"))
    try:
        return _consistent(Manifest.read(path / MANIFEST_NAME, CacheDamaged), str(path / MANIFEST_NAME))
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(str(path), "no such folder" if not path.exists() else "a folder without it") from None


def read_manifest(files: LocalFiles | ObjectStore) -> Manifest:
    """``open_manifest`` of files that are open already."""
    if isinstance(files, LocalFiles):
        return open_manifest(files.folder)
    where = f"{files.location}/{MANIFEST_NAME}"
    try:
        return _consistent(Manifest.parse_versioned(files.read(MANIFEST_NAME), where, CacheDamaged), where)
    except FileNotFoundError:
        raise _missing(files.location, "no such object") from None


class CachedTokens:
    """TokenProvider over a cache: rows -> tokens, the same bits the live path makes.

    May be used by several threads, after a fork, and pickled (another process opens its own files).

    Args:
        location: folder, or URL.
        check: compare rows with their checksums at "every" read, at the "first" read of a row, or "never".
        threads: reading side by side.
        partial: accept a cache that is not finished; a row that is missing is then an error when it is read.

    Raises:
        CacheMissing, CacheIncomplete, CacheDamaged, CacheStale, SchemaTooNew: by name.
    """

    def __init__(
        self, location: Path | str, *, check: Check = "every", threads: int = READ_THREADS, partial: bool = False
    ) -> None:
        self.location = location
        self._arguments = {"check": check, "threads": threads, "partial": partial}
        files = open_files(location)
        self.manifest = read_manifest(files)
        require_metadata(files, self.manifest)
        self.commits = read_commits(files, self.manifest)
        missing = self.manifest.shards - len(self.commits)
        if missing and not partial:
            raise CacheIncomplete(
                f"the cache {location} is not finished",
                expected=f"{self.manifest.shards} committed shards",
                found=f"{self.manifest.shards - missing}",
                fix=f"run the same {'cache derive' if self.manifest.derived_from else 'geomcache extract'} again; "
                "it continues with the missing shards",
            )
        self.codec = build_codec(self.spec)
        self._process = os.getpid()
        self._rows = StoredRows(files, self.manifest, self.commits, check, threads)

    @property
    def recipe(self) -> TokenRecipe:
        """What made these tokens."""
        return self.manifest.recipe

    @property
    def spec(self) -> TokenSpec:
        """Shape and meaning of a row."""
        return self.manifest.recipe.spec

    def __len__(self) -> int:
        return self.manifest.rows

    def load_indices(self) -> int:
        """Read every shard's index now, not at its first row; returns their memory in bytes."""
        return self._rows.load_indices()

    def buffers(self, rows: int) -> dict[str, NDArray[Any]]:
        """Room for ``rows`` stored rows, to be filled by ``read_into`` again and again."""
        return {
            name: np.empty((rows, *array.row_shape), dtype=array.dtype) for name, array in self.manifest.arrays.items()
        }

    def read_into(self, rows: Sequence[int], out: Mapping[str, NDArray[Any]]) -> None:
        """Fill ``out`` with the stored (encoded) arrays of ``rows``, in the order asked for.

        Raises:
            InputError: a row outside the cache. CacheIncomplete: one that is not committed.
            CacheDamaged: bytes that are not those that were committed; ``out`` is then not to be used.
        """
        self._rows.read_into(rows, out)

    def arrays(self, rows: Sequence[int]) -> dict[str, NDArray[Any]]:
        """The stored arrays of ``rows`` in memory of their own; errors as ``read_into``."""
        return self._rows.read(rows)

    def tokens(self, what: Sequence[int]) -> torch.Tensor:
        """Decoded tokens of rows ``what``: float32 [B, *spec.row_shape]; errors as ``read_into``."""
        if os.getpid() != self._process:
            # Forked: torch's OpenMP threads are not in the child, and GNU's OpenMP would wait for them for ever. One
            # thread from now on, as torch's own DataLoader gives its workers.
            torch.set_num_threads(1)
            self._process = os.getpid()
        return self.codec.decode(as_tensors(self.arrays(what)))

    def close(self) -> None:
        """Close files, end threads."""
        self._rows.close()

    def __enter__(self) -> "CachedTokens":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.location, self._arguments)


def require_pack_of(cache: CachedTokens, pack: PackReader) -> None:
    """Raise ``CacheStale`` unless the cache was made from exactly this pack."""
    if cache.recipe.fingerprint.pack != pack.info.digest:
        raise CacheStale(
            f"the cache {cache.location} was made from another pack",
            expected=f"pack digest {pack.info.digest[:16]} ({pack.path})",
            found=f"pack digest {cache.recipe.fingerprint.pack[:16]}",
            fix=f"--pack PACK of this cache, or geomcache extract --pack {pack.path} --encoder {cache.spec.encoder} "
            "--out NEW_CACHE",
        )


def _open_again(location: Path | str, arguments: dict[str, Any]) -> CachedTokens:
    return CachedTokens(location, **arguments)


def _missing(location: str, found: str) -> CacheMissing:
    return CacheMissing(
        f"there is no token cache at {location}",
        expected=f"a folder with {MANIFEST_NAME}",
        found=found,
        fix="geomcache extract --pack PACK --encoder NAME --out FOLDER, then copy it there"
        if is_remote(location)
        else f"geomcache extract --pack PACK --encoder NAME --out {location}",
    )


def _consistent(manifest: Manifest, where: str) -> Manifest:
    expected = build_codec(manifest.recipe.spec).arrays()
    if manifest.arrays != expected:
        raise CacheDamaged(
            f"{where} contradicts itself",
            expected=f"the arrays of codec {manifest.recipe.spec.codec}: {expected}",
            found=str(manifest.arrays),
            fix="restore the file, or extract into a new folder",
        )
    return manifest
