"""One Zarr v3 shard file: rows, each followed by its crc32c, then the index with its own crc32c.

Specification: zarr-specs sharding-indexed 1.0 (index: chunks x (offset, nbytes), uint64 little-endian, at the end)
and crc32c 1.0. Why our own writer: zarr-python writes shards without fsync and leaves no record that a shard is
whole; see docs/design.md.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c as crc32c_package
import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import CacheDamaged
from geomcache.cache_schemas.layout import CRC_BYTES, EMPTY, INDEX_ENTRY_BYTES
from geomcache.pipeline.files import atomic_writer

_REDO = "geomcache cache verify CACHE --repair, then run the same geomcache extract again"


@dataclass(frozen=True)
class WrittenFile:
    """What a shard file's bytes are."""

    bytes: int
    sha256: str


def crc32c(data: bytes | memoryview) -> bytes:
    """Castagnoli CRC-32, little-endian."""
    return int(crc32c_package.crc32c(data)).to_bytes(CRC_BYTES, "little")


def write_shard(path: Path, rows: NDArray[Any], slots: int) -> WrittenFile:
    """Write ``rows`` [n <= slots, ...] as one shard of ``slots`` inner chunks; slots beyond n are empty."""
    digest, size = hashlib.sha256(), 0
    index = np.full((slots, 2), EMPTY, dtype="<u8")
    contiguous = np.ascontiguousarray(rows)
    with atomic_writer(path) as file:
        for number in range(len(contiguous)):
            data = contiguous[number].tobytes()
            index[number] = size, len(data) + CRC_BYTES
            for part in (data, crc32c(data)):
                file.write(part)
                digest.update(part)
            size += len(data) + CRC_BYTES
        for part in (index.tobytes(), crc32c(index.tobytes())):
            file.write(part)
            digest.update(part)
            size += len(part)
    return WrittenFile(size, digest.hexdigest())


def read_index(path: Path, slots: int) -> NDArray[np.uint64]:
    """The shard's index [slots, 2] of (offset, nbytes), checked.

    Raises:
        CacheDamaged: the file is missing, too short, or its index fails its checksum.
    """
    length = slots * INDEX_ENTRY_BYTES + CRC_BYTES
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < length:
                raise CacheDamaged(f"{path} is cut short", expected=f">= {length} bytes", found=f"{size}", fix=_REDO)
            file.seek(size - length)
            data = file.read(length)
    except FileNotFoundError as problem:
        raise CacheDamaged(f"{path} is missing", expected="a committed shard", found="no file", fix=_REDO) from problem
    if crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise CacheDamaged(f"{path}: the shard index fails its checksum", found="other bytes than written", fix=_REDO)
    return np.frombuffer(data[:-CRC_BYTES], dtype="<u8").reshape(slots, 2)


def read_rows(
    handle: int, path: Path, index: NDArray[np.uint64], slots: Sequence[int], out: Sequence[memoryview]
) -> None:
    """Read the rows in ``slots`` of an open shard into ``out`` (one writable byte view per row), checked.

    Raises:
        CacheDamaged: a row was never written, is cut short, or fails its checksum.
    """
    for slot, view in zip(slots, out, strict=True):
        offset, stored = int(index[slot, 0]), int(index[slot, 1])
        if offset == EMPTY or stored != view.nbytes + CRC_BYTES:
            raise CacheDamaged(
                f"{path}: row {slot} of the shard",
                expected=f"{view.nbytes + CRC_BYTES} bytes",
                found="none",
                fix=_REDO,
            )
        checksum = bytearray(CRC_BYTES)
        got = os.preadv(handle, [view, checksum], offset)
        if got != stored or crc32c(view) != bytes(checksum):
            raise CacheDamaged(
                f"{path}: row {slot} of the shard fails its checksum",
                found="other bytes than written",
                fix=_REDO,
            )
