"""One Zarr v3 shard file: rows, each followed by its crc32c, then the index with its own crc32c.

Specification: zarr-specs sharding-indexed 1.0 (index: chunks x (offset, nbytes), uint64 little-endian, at the end)
and crc32c 1.0. Why our own writer: zarr-python writes shards without fsync and leaves no record that a shard is
whole; see docs/design.md.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c as crc32c_package
import numpy as np
from numcodecs import blosc  # here and not where it is used: a fork during an import would leave its lock held
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import CacheDamaged
from geomcache.cache_schemas.layout import BLOSC, CRC_BYTES, EMPTY, INDEX_ENTRY_BYTES
from geomcache.pipeline.files import atomic_writer, write_all

REDO = "geomcache cache verify CACHE --repair, then run the same geomcache extract again"
_GROUP_BYTES = 8 << 20  # written by one system call; small enough that the first checksums are ready at once
_GROUP_ROWS = 256  # a system call takes 1,024 buffers, two a row
_GROUPS_AHEAD = 4  # packed, or being packed, while earlier ones are written
_DIGESTS_AHEAD = 32  # written, but not in the file's digest yet: most of it is made while the disk flushes


@dataclass(frozen=True)
class WrittenFile:
    """What a shard file's bytes are."""

    bytes: int
    sha256: str
    row_crc32c: str  # hex, 8 characters a row


@dataclass(frozen=True)
class _Packed:
    """Rows ready to be written: payload, checksum, payload, checksum, ..."""

    parts: list[memoryview | bytes]
    sizes: list[int]  # of each payload


def crc32c(data: bytes | memoryview) -> bytes:
    """Castagnoli CRC-32, little-endian."""
    return int(crc32c_package.crc32c(data)).to_bytes(CRC_BYTES, "little")


class ShardFile:
    """One shard file of ``slots`` inner chunks while it is written; use as a context manager.

    Rows are appended in order; slots that no row was given for are empty. Checksums (and compression) of later rows
    are computed by threads while earlier rows are being written, and the file's digest while the disk is still busy.
    The file appears under its name, whole, when the block ends; after an error it does not.
    """

    def __init__(self, path: Path, slots: int, *, compressed: bool = False) -> None:
        self._path, self._compressed = path, compressed
        self._index = np.full((slots, 2), EMPTY, dtype="<u8")
        self._digest, self._crcs = hashlib.sha256(), bytearray()
        self._rows, self._size, self._not_synced = 0, 0, 0
        self._packing: deque[Future[_Packed]] = deque()
        self._digesting: deque[Future[None]] = deque()
        self._syncing: Future[None] | None = None

    def __enter__(self) -> "ShardFile":
        with ExitStack() as stack:
            packers = os.cpu_count() if self._compressed else 1
            self._packers = stack.enter_context(ThreadPoolExecutor(packers, "pack-rows"))
            self._digester = stack.enter_context(ThreadPoolExecutor(1, "digest"))
            self._file = stack.enter_context(atomic_writer(self._path))
            # innermost: ends before the file is closed
            self._syncer = stack.enter_context(ThreadPoolExecutor(1, "sync"))
            self._parts = stack.pop_all()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._parts.__exit__(*problem)

    def append(self, rows: NDArray[Any]) -> None:
        """Take ``rows`` [n, ...]; they must not change before the file is finished."""
        contiguous = np.ascontiguousarray(rows)
        for group in _groups(len(contiguous), contiguous[:1].nbytes):
            self._packing.append(self._packers.submit(_pack, contiguous, group, self._compressed))
        while len(self._packing) > _GROUPS_AHEAD:
            self._write_group()

    def finish(self) -> None:
        """Write what is left, and the index; call it as the last thing inside the block."""
        while self._packing:
            self._write_group()
        if self._syncing is not None:
            self._syncing.result()
        tail = [self._index.tobytes(), crc32c(self._index.tobytes())]
        write_all(self._file.fileno(), tail)
        self._digester.submit(self._take, tail)
        self._size += sum(map(len, tail))

    @property
    def written(self) -> WrittenFile:
        """What the file's bytes are; once the block has ended."""
        return WrittenFile(self._size, self._digest.hexdigest(), self._crcs.hex())

    def _write_group(self) -> None:
        ready = self._packing.popleft().result()
        for payload in ready.sizes:
            self._index[self._rows] = self._size, payload + CRC_BYTES
            self._size += payload + CRC_BYTES
            self._not_synced += payload + CRC_BYTES
            self._rows += 1
        self._crcs += b"".join(bytes(crc) for crc in ready.parts[1::2])
        write_all(self._file.fileno(), ready.parts)
        self._digesting.append(self._digester.submit(self._take, ready.parts))
        if len(self._digesting) > _DIGESTS_AHEAD:
            self._digesting.popleft().result()
        # The disk works while checksums are made, or the next tokens.
        if self._not_synced >= _GROUP_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()  # an error of the disk is reported once per descriptor
            self._not_synced = 0
            self._syncing = self._syncer.submit(os.fdatasync, self._file.fileno())

    def _take(self, parts: Sequence[memoryview | bytes]) -> None:
        for part in parts:
            self._digest.update(part)


def _groups(rows: int, row_bytes: int) -> Iterator[range]:
    count = max(1, min(_GROUP_ROWS, _GROUP_BYTES // max(row_bytes, 1)))
    for start in range(0, rows, count):
        yield range(start, min(start + count, rows))


def _pack(rows: NDArray[Any], group: range, compressed: bool) -> _Packed:
    parts: list[memoryview | bytes] = []
    sizes = []
    for number in group:
        payload = compress(rows[number]) if compressed else memoryview(rows[number : number + 1].data).cast("B")
        parts += [payload, crc32c(payload)]
        sizes.append(len(payload))
    return _Packed(parts, sizes)


def compress(row: NDArray[Any]) -> bytes:
    """A row as Zarr's blosc codec stores it."""
    shuffle = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}[BLOSC["shuffle"]]
    packed = blosc.compress(
        np.ascontiguousarray(row), BLOSC["cname"].encode(), BLOSC["clevel"], shuffle, BLOSC["blocksize"]
    )
    return bytes(packed)


def decompress(data: memoryview | bytes, out: memoryview, where: str) -> None:
    """Unpack a blosc chunk into ``out``; ``CacheDamaged`` when it is not exactly a row."""
    header = bytes(data[:16])  # c-blosc's: byte 4 on: uint32 nbytes, blocksize, cbytes
    if len(header) < 16 or int.from_bytes(header[4:8], "little") != out.nbytes:
        raise CacheDamaged(f"{where}: a compressed row has another size than the manifest says", fix=REDO)
    try:
        blosc.decompress(data, out)
    except RuntimeError as problem:
        raise CacheDamaged(f"{where}: a compressed row cannot be unpacked", found=str(problem), fix=REDO) from problem


def index_length(slots: int) -> int:
    """Bytes of the index at a shard's end, checksum included."""
    return slots * INDEX_ENTRY_BYTES + CRC_BYTES


def parse_index(tail: bytes, file_size: int, slots: int, path: str) -> NDArray[np.uint64]:
    """The shard's index [slots, 2] of (offset, nbytes) from the file's last bytes, checked.

    Raises:
        CacheDamaged: the file is too short, its index fails its checksum or points outside the file.
    """
    length = index_length(slots)
    if file_size < length or len(tail) != length:
        raise CacheDamaged(f"{path} is cut short", expected=f">= {length} bytes", found=f"{file_size}", fix=REDO)
    if crc32c(tail[:-CRC_BYTES]) != tail[-CRC_BYTES:]:
        raise CacheDamaged(f"{path}: the shard index fails its checksum", found="other bytes than written", fix=REDO)
    index: NDArray[np.uint64] = np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(slots, 2)
    offset, nbytes = index[index[:, 0] != EMPTY].T
    payload_end = file_size - length  # no sums: a foreign index may overflow them
    if ((offset > payload_end) | (nbytes < CRC_BYTES) | (nbytes > payload_end - np.minimum(offset, payload_end))).any():
        raise CacheDamaged(f"{path}: the shard index points outside the file", fix=REDO)
    return index
