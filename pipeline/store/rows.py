"""Stored rows by number: every shard's index once, then rows into the caller's buffers by threads, each row checked.

A row's crc32c is compared with the one in its shard's commit record, so a whole row that lies in the wrong place, shard
or cache is damage too. With ``check="never"`` bytes are handed out as they are; with ``"first"`` each row is checked
the first time it is read.
"""

import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import CacheDamaged, CacheIncomplete, InputError
from geomcache.cache_schemas.layout import CRC_BYTES, DTYPE_BYTES, EMPTY, shard_path
from geomcache.cache_schemas.manifest import ArraySpec, Manifest, ShardCommit
from geomcache.pipeline.store.local_files import LocalFiles
from geomcache.pipeline.store.objects import ObjectStore
from geomcache.pipeline.store.shard_file import REDO, crc32c, decompress, index_length, parse_index

Check = Literal["every", "first", "never"]
_REQUESTS_AT_ONCE = 32  # to a store behind a network, whose latency is what a batch waits for
_TOGETHER_BYTES = 4 << 20  # rows of one shard that one thread takes at a time
_CHECKED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Where the rows of one array's shard lie, and what their checksums must be."""

    path: str
    first_row: int
    offsets: NDArray[np.uint64]
    payloads: NDArray[np.uint32]  # bytes of each row without its checksum
    crcs: bytes | None  # 4 bytes a row, as committed
    seen: bytearray  # rows that were checked before

    @property
    def own_bytes(self) -> int:
        """Memory it takes, less what full uncompressed shards share."""
        shared = self.offsets.base is None
        arrays = 0 if shared else self.offsets.nbytes + self.payloads.nbytes
        return arrays + len(self.crcs or b"") + len(self.seen)


def load_index(
    files: LocalFiles | ObjectStore, manifest: Manifest, commit: ShardCommit, name: str, array: ArraySpec
) -> ShardIndex:
    """Read and check a shard's index against its commit record.

    Raises:
        CacheDamaged: the file is missing, has another size, or its index is not one of these rows.
    """
    path = shard_path(name, commit.shard, len(array.row_shape))
    where = f"{files.location}/{path}"
    try:
        tail, size = files.tail(path, index_length(manifest.rows_per_shard))
    except FileNotFoundError as problem:
        raise CacheDamaged(f"{where} is missing", expected="a committed shard", found="no file", fix=REDO) from problem
    if size != commit.sizes[name]:
        raise CacheDamaged(
            f"{where} has another size than was committed", expected=f"{commit.sizes[name]}", found=f"{size}", fix=REDO
        )
    try:  # no pattern in the schema: matching a thousand long strings costs more than all the rest of opening
        crcs = bytes.fromhex(commit.row_crc32c[name]) if commit.row_crc32c else None
    except ValueError as problem:
        raise CacheDamaged(f"{where}: its commit record holds no checksums of rows", fix=REDO) from problem
    usual, offsets, payloads = _usual_index(commit.rows, manifest.rows_per_shard, row_bytes(array))
    if tail != usual or array.compression is not None:  # compressed, or written by somebody else in another order
        index = parse_index(tail, size, manifest.rows_per_shard, where)[: commit.rows]
        if (index[:, 0] == EMPTY).any() or (array.compression is None and (index[:, 1] != payloads + CRC_BYTES).any()):
            raise CacheDamaged(f"{where}: its index lacks rows or names rows of another size", fix=REDO)
        offsets, payloads = index[:, 0], (index[:, 1] - CRC_BYTES).astype(np.uint32)
    return ShardIndex(path, commit.first_row, offsets, payloads, crcs, bytearray(commit.rows))


@lru_cache(maxsize=8)
def _usual_index(rows: int, slots: int, length: int) -> tuple[bytes, NDArray[np.uint64], NDArray[np.uint32]]:
    """The index our writer gives every uncompressed shard of ``rows`` rows: its bytes, offsets and payload sizes."""
    index = np.full((slots, 2), EMPTY, dtype="<u8")
    index[:rows, 0] = np.arange(rows) * (length + CRC_BYTES)
    index[:rows, 1] = length + CRC_BYTES
    return index.tobytes() + crc32c(index.tobytes()), index[:rows, 0].copy(), np.full(rows, length, dtype=np.uint32)


def row_bytes(array: ArraySpec) -> int:
    """Bytes of a decoded row."""
    return math.prod(array.row_shape) * DTYPE_BYTES[array.dtype]


class StoredRows:
    """All rows of a cache.

    Args:
        files: where the bytes lie.
        manifest: the cache's.
        commits: the finished shards.
        check: when rows are compared with their checksums.
        threads: reading side by side; results do not depend on it.
    """

    def __init__(
        self,
        files: LocalFiles | ObjectStore,
        manifest: Manifest,
        commits: Mapping[int, ShardCommit],
        check: Check,
        threads: int,
    ) -> None:
        if check not in get_args(Check):
            raise InputError(
                "there is no such way to check rows", expected=", ".join(get_args(Check)), found=str(check)
            )
        self._files, self._manifest, self._commits = files, manifest, commits
        self._check = check
        self._threads = threads if isinstance(files, LocalFiles) else max(threads, _REQUESTS_AT_ONCE)
        self._indices: dict[tuple[str, int], ShardIndex] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._lock = threading.Lock()

    def load_indices(self) -> int:
        """Read every index now (each is read at its first row otherwise); returns their memory in bytes."""
        self._load({(name, shard) for name in self._manifest.arrays for shard in self._commits})
        return sum(index.own_bytes for index in self._indices.values())

    def read(self, rows: Sequence[int]) -> dict[str, NDArray[Any]]:
        """``read_into`` memory of its own."""
        out = {
            name: np.empty((len(rows), *array.row_shape), dtype=array.dtype)
            for name, array in self._manifest.arrays.items()
        }
        self.read_into(rows, out)
        return out

    def read_into(self, rows: Sequence[int], out: Mapping[str, NDArray[Any]]) -> None:
        """Fill ``out`` (array name -> [len(rows), *row shape], C-contiguous) in the order asked for.

        Raises:
            InputError: a row outside the cache. CacheIncomplete: a row that is not committed yet.
            CacheDamaged: bytes that are not those that were committed; ``out`` is then not to be used.
        """
        self._require_rows(rows)
        shards = {int(row) // self._manifest.rows_per_shard for row in rows}
        self._load({(name, shard) for name in self._manifest.arrays for shard in shards})
        for name, array in self._manifest.arrays.items():
            batch, length = out[name], row_bytes(array)
            assert batch.shape == (len(rows), *array.row_shape), (batch.shape, len(rows), array.row_shape)
            assert batch.dtype == np.dtype(array.dtype), (batch.dtype, array.dtype)
            view = batch.data.cast("B") if batch.size else memoryview(b"")
            jobs = self._jobs(name, rows, [view[i * length : (i + 1) * length] for i in range(len(rows))], length)
            parts = min(self._threads, len(jobs))
            if parts <= 1:
                self._run(array, jobs)
            else:
                bounds = [len(jobs) * part // parts for part in range(parts + 1)]
                pool = self._workers()
                # A list, so that every part has ended before an error leaves: nobody writes into ``out`` afterwards.
                futures = [pool.submit(self._run, array, jobs[a:b]) for a, b in pairwise(bounds)]
                errors = [future.exception() for future in futures]
                for error in errors:
                    if error is not None:
                        raise error

    def close(self) -> None:
        """Let go of threads and files."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None
        if isinstance(self._files, LocalFiles):
            self._files.close()

    def _require_rows(self, rows: Sequence[int]) -> None:
        count = self._manifest.rows
        if len(rows) and not 0 <= min(rows) <= max(rows) < count:
            wrong = min(rows) if min(rows) < 0 else max(rows)
            raise InputError(
                f"rows outside the cache {self._files.location}", expected=f"0 to {count - 1}", found=str(wrong)
            )

    def _jobs(
        self, name: str, rows: Sequence[int], views: Sequence[memoryview], length: int
    ) -> list[tuple[ShardIndex, list[int], list[memoryview]]]:
        """Rows grouped by shard in file order, in pieces that a thread takes one by one."""
        most = max(1, _TOGETHER_BYTES // max(length, 1)) if isinstance(self._files, LocalFiles) else len(rows)
        jobs: list[tuple[ShardIndex, list[int], list[memoryview]]] = []
        last = -1
        order = range(len(rows)) if _ascending(rows) else sorted(range(len(rows)), key=rows.__getitem__)
        for position in order:
            shard, slot = divmod(int(rows[position]), self._manifest.rows_per_shard)
            if shard != last or len(jobs[-1][1]) >= most:
                jobs.append((self._indices[name, shard], [], []))
                last = shard
            jobs[-1][1].append(slot)
            jobs[-1][2].append(views[position])
        return jobs

    def _load(self, wanted: set[tuple[str, int]]) -> None:
        """Read the indices that are not known yet; side by side where each costs a request."""
        missing = sorted(key for key in wanted if key not in self._indices)
        if len(missing) > 1 and not isinstance(self._files, LocalFiles):
            found = self._workers().map(self._index, missing)
        else:
            found = map(self._index, missing)
        for key, index in zip(missing, found, strict=True):
            self._indices[key] = index

    def _index(self, key: tuple[str, int]) -> ShardIndex:
        name, shard = key
        if shard not in self._commits:
            raise CacheIncomplete(
                f"the cache {self._files.location} is not finished",
                expected=f"row {shard * self._manifest.rows_per_shard} in a committed shard",
                found=f"shard {shard} of {self._manifest.shards} is missing",
                fix="run the same geomcache extract again; it continues with the missing shards",
            )
        return load_index(self._files, self._manifest, self._commits[shard], name, self._manifest.arrays[name])

    def _run(self, array: ArraySpec, jobs: Iterable[tuple[ShardIndex, list[int], list[memoryview]]]) -> None:
        for index, slots, views in jobs:
            if array.compression is None:
                self._read(index, slots, views)
                continue
            packed = [memoryview(bytearray(int(index.payloads[slot]))) for slot in slots]
            self._read(index, slots, packed)
            for data, view in zip(packed, views, strict=True):
                decompress(data, view, f"{self._files.location}/{index.path}")

    def _read(self, index: ShardIndex, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        offsets = index.offsets[slots].tolist()
        unchecked = {n for n, slot in enumerate(slots) if self._check == "every" or not index.seen[slot]}
        if self._check == "never" or not unchecked:
            self._files.read_ranges(index.path, offsets, views)
            return
        stored = memoryview(bytearray(CRC_BYTES * len(slots)))
        places, buffers = [], []
        for number, (offset, view) in enumerate(zip(offsets, views, strict=True)):
            places += [offset, offset + len(view)]
            buffers += [view, stored[number * CRC_BYTES : (number + 1) * CRC_BYTES]]
        # A row is checked at once, while the core's own cache holds it; behind a network, requests go together.
        local = isinstance(self._files, LocalFiles)
        step = max(1, _CHECKED_BYTES // max(len(views[0]), 1)) if local else len(slots)
        for start in range(0, len(slots), step):
            piece = slice(2 * start, 2 * (start + step))
            self._files.read_ranges(index.path, places[piece], buffers[piece])
            for number in range(start, min(start + step, len(slots))):
                if number in unchecked:
                    self._compare(index, slots[number], views[number], bytes(buffers[2 * number + 1]))

    def _compare(self, index: ShardIndex, slot: int, view: memoryview, beside: bytes) -> None:
        found = crc32c(view)
        committed = beside if index.crcs is None else index.crcs[slot * CRC_BYTES : (slot + 1) * CRC_BYTES]
        if found != beside or found != committed:
            raise CacheDamaged(
                f"row {index.first_row + slot} of the cache {self._files.location} fails its checksum "
                f"({index.path}: row {slot} of the shard)",
                expected=f"crc32c {committed.hex()}, as committed",
                found=f"{found.hex()} (its bytes), {beside.hex()} (beside it)",
                fix=REDO.replace("CACHE", self._files.location),
            )
        index.seen[slot] = 1

    def _workers(self) -> ThreadPoolExecutor:
        with self._lock_of_this_process():
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, "read-rows")
            return self._pool

    def _lock_of_this_process(self) -> threading.Lock:
        if self._process != os.getpid():  # after a fork: threads are gone, a lock may be held for ever
            self._process, self._pool, self._lock = os.getpid(), None, threading.Lock()
        return self._lock


def _ascending(rows: Sequence[int]) -> bool:
    return all(rows[i] <= rows[i + 1] for i in range(len(rows) - 1))
