"""Reads a cache: every shard's index once, then single rows by ``preadv``, each checked against its crc32c."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import CacheDamaged, CacheIncomplete, CacheMissing, InputError
from geomcache.cache_schemas.layout import shard_path
from geomcache.cache_schemas.manifest import MANIFEST_NAME, Manifest, TokenRecipe
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.files import allow_many_open_files
from geomcache.pipeline.store.shard_file import read_index, read_rows
from geomcache.pipeline.store.writer import read_commits
from geomcache.pipeline.tokens import build_codec

_OPEN_FILES = 256


def open_manifest(path: Path) -> Manifest:
    """The manifest of the cache at ``path``.

    Raises:
        CacheMissing: no cache stands there. CacheDamaged, SchemaTooNew: it cannot be read.
    """
    manifest = path / MANIFEST_NAME
    if not manifest.exists():
        raise CacheMissing(
            f"there is no token cache at {path}",
            expected=f"a folder with {MANIFEST_NAME}",
            found="no such folder" if not path.exists() else "a folder without it",
            fix=f"geomcache extract --pack PACK --encoder NAME --out {path}",
        )
    found = Manifest.read(manifest, CacheDamaged)
    expected = build_codec(found.recipe.spec.codec).arrays(found.recipe.spec)
    if found.arrays != expected:
        raise CacheDamaged(
            f"{manifest} contradicts itself",
            expected=f"the arrays of codec {found.recipe.spec.codec}: {expected}",
            found=str(found.arrays),
            fix="restore the file, or extract into a new folder",
        )
    return found


class CachedTokens:
    """TokenProvider over a complete cache: rows -> tokens, the same bits the live path makes.

    Raises:
        CacheMissing, CacheIncomplete, CacheDamaged, CacheStale, SchemaTooNew: see ``open_manifest`` and the reader.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = open_manifest(path)
        missing = self.manifest.shards - len(read_commits(path, self.manifest))
        if missing:
            raise CacheIncomplete(
                f"the cache {path} is not finished",
                expected=f"{self.manifest.shards} committed shards",
                found=f"{self.manifest.shards - missing}",
                fix="run the same geomcache extract again; it continues with the missing shards",
            )
        self._codec = build_codec(self.spec.codec)
        self._indices: dict[tuple[str, int], NDArray[np.uint64]] = {}
        self._files: OrderedDict[Path, int] = OrderedDict()
        allow_many_open_files()

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

    def arrays(self, rows: Sequence[int]) -> dict[str, NDArray[Any]]:
        """The stored (encoded) arrays of ``rows``, in the order asked for."""
        if len(rows) and not 0 <= min(rows) <= max(rows) < len(self):
            raise InputError(
                f"rows outside the cache {self.path}", expected=f"0 to {len(self) - 1}", found=str(max(rows))
            )
        out = {}
        for name, array in self.manifest.arrays.items():
            batch = np.empty((len(rows), *array.row_shape), dtype=array.dtype)
            for position, row in enumerate(rows):
                shard, slot = divmod(int(row), self.manifest.rows_per_shard)
                path = self.path / shard_path(name, shard, len(array.row_shape))
                view = memoryview(batch[position]).cast("B")
                index = self._index(name, shard, path)  # first: it names a missing file as damage
                read_rows(self._file(path), path, index, [slot], [view])
            out[name] = batch
        return out

    def tokens(self, what: Sequence[int]) -> torch.Tensor:
        """Decoded tokens of rows ``what``: float32 [B, V, G, D]."""
        return self._codec.decode(self.arrays(what))

    def _index(self, name: str, shard: int, path: Path) -> NDArray[np.uint64]:
        if (name, shard) not in self._indices:
            self._indices[name, shard] = read_index(path, self.manifest.rows_per_shard)
        return self._indices[name, shard]

    def _file(self, path: Path) -> int:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        while len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def close(self) -> None:
        """Close the shard files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> "CachedTokens":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["CachedTokens"], tuple[Path]]:
        return CachedTokens, (self.path,)  # another process opens its own files
