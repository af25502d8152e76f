"""One tar shard of a pack and its part of the index; the unit of work of ``pack build``.

Deterministic: the same rows give the same bytes. The tar is renamed into place first, the part of the index after it;
so a part that stands vouches for its tar, and carries the digest of the plan it was made by.
"""

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from crc32c import crc32c
from numpy.typing import NDArray
from PIL import Image

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import PackDamaged, SourceDamaged
from geomcache.cache_schemas.pack_info import PackFile
from geomcache.pipeline.files import atomic_writer
from geomcache.pipeline.frames import EpisodeRows
from geomcache.pipeline.interfaces import FrameSource
from geomcache.pipeline.open_source import SourceRequest, open_source
from geomcache.pipeline.pack.format import member_suffixes, part_name, shard_name
from geomcache.pipeline.pack.plan import Piece

_ROWS_AT_ONCE = 64  # decoded together; bounds the memory of a worker
_PNG_LEVEL = 3  # of zlib: a third of the time of the default 6, 5 % larger on LIBERO's frames
_WRITE_BYTES = 1 << 20  # written at once
_COMMIT = b"geomcache.shard"


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    shard: int
    first_row: int
    pieces: tuple[Piece, ...]
    schema: pa.Schema  # of rows.arrow
    plan_digest: str


@dataclass(frozen=True)
class Undecodable:
    """An episode whose pictures turned out to be damaged."""

    source: int
    episode: int
    problem: SourceDamaged


class PackWorker:
    """Writes shards; Ray runs it as an actor, ``pack build --workers 1`` in the command's own process."""

    def __init__(self, sources: Sequence[SourceRequest], out: Path, contract: Contract) -> None:
        self._requests, self._out, self._contract = sources, out, contract
        self._sources: list[FrameSource] = []

    def start(self) -> None:
        """Open the sources."""
        self._sources = [open_source(request) for request in self._requests]

    def run(self, task: ShardTask) -> PackFile | Undecodable:
        """Write one shard; damage found on the way is the result, so that the caller can plan without it."""
        try:
            return self._write(task)
        except _PieceDamaged as damage:
            return Undecodable(damage.piece.planned.source, damage.piece.planned.episode, damage.problem)

    def close(self) -> None:
        """Let go of the sources."""
        self._sources = []

    def _write(self, task: ShardTask) -> PackFile:
        columns: dict[str, list[Any]] = {name: [] for name in task.schema.names}
        name = shard_name(task.shard)
        (self._out / part_name(task.shard)).unlink(missing_ok=True)  # it vouches for the tar that is replaced now
        with atomic_writer(self._out / name) as file:
            tar, row = _TarWriter(file), task.first_row
            for piece in task.pieces:
                for numbers, rows in self._decoded(piece):
                    for i, number in enumerate(numbers):
                        _add_row(tar, row, piece, number, rows, i, self._contract, columns)
                        row += 1
            tar.close()
        written = PackFile(name=name, bytes=tar.bytes, sha256=tar.digest.hexdigest())
        _write_part(self._out, task, columns, written)
        return written

    def _decoded(self, piece: Piece) -> Iterator[tuple[range, EpisodeRows]]:
        """The piece's rows, some at a time, with their numbers in the packed episode."""
        source = self._sources[piece.planned.source]
        for first in range(0, len(piece.rows), _ROWS_AT_ONCE):
            wanted = piece.source_rows[first : first + _ROWS_AT_ONCE]
            start, stop = int(wanted[0]), int(wanted[-1]) + 1
            try:
                rows = source.read(piece.planned.episode, start, stop)
            except SourceDamaged as problem:
                raise _PieceDamaged(piece, problem) from problem
            if len(wanted) < stop - start:
                rows = rows.take(wanted - start)
            yield piece.rows[first : first + _ROWS_AT_ONCE], rows


class _PieceDamaged(Exception):
    def __init__(self, piece: Piece, problem: SourceDamaged) -> None:
        super().__init__(str(problem))
        self.piece, self.problem = piece, problem


def finished_part(out: Path, task: ShardTask) -> PackFile | None:
    """The shard's record if it stands, made by this very plan."""
    part, tar = out / part_name(task.shard), out / shard_name(task.shard)
    if not part.exists() or not tar.exists():
        return None
    try:
        schema = pa.ipc.open_file(pa.memory_map(str(part))).schema
    except (pa.ArrowInvalid, OSError):
        return None
    commit = json.loads((schema.metadata or {}).get(_COMMIT, b"{}"))
    if commit.get("plan") != task.plan_digest:
        return None
    record = PackFile.parse(json.dumps(commit["file"]), str(part), PackDamaged)
    return record if tar.stat().st_size == record.bytes else None


def _write_part(out: Path, task: ShardTask, columns: dict[str, list[Any]], file: PackFile) -> None:
    commit = json.dumps({"plan": task.plan_digest, "file": file.model_dump(mode="json")}).encode()
    table = pa.table(columns, schema=task.schema.with_metadata({_COMMIT: commit}))
    with atomic_writer(out / part_name(task.shard)) as part, pa.ipc.new_file(part, table.schema) as sink:
        sink.write_table(table.combine_chunks())


class _TarWriter:
    """Appends members to a tar file, counting and digesting what passes, so that a shard is not read again.

    Python's tarfile costs as much as a tenth of encoding the pictures; what is written is the same (a test compares).
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._waiting: list[bytes] = []  # few large writes: members are small
        self._waiting_bytes = 0
        self.digest = hashlib.sha256()
        self.bytes = 0

    def add(self, name: str, data: bytes) -> int:
        """Append one member; returns the offset of its data in the tar."""
        offset = self.bytes + tarfile.BLOCKSIZE
        self._append(_tar_header(name, len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> None:
        """Append the end of the archive and write what waits."""
        self._append(bytes(2 * tarfile.BLOCKSIZE))
        self._flush()

    def _append(self, *parts: bytes) -> None:
        self._waiting += parts
        size = sum(len(part) for part in parts)
        self.bytes += size
        self._waiting_bytes += size
        if self._waiting_bytes >= _WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        joined = b"".join(self._waiting)
        self.digest.update(joined)
        self._file.write(joined)
        self._waiting, self._waiting_bytes = [], 0


def _tar_header(name: str, size: int) -> bytes:
    """USTAR header of a plain file (POSIX.1-1988); no time, no owner: the bytes depend on the data alone."""
    assert len(name) <= 100, f"no USTAR name: {name}"
    fields = struct.pack(
        "100s8s8s8s12s12s8sc100s8s32s32s8s8s167x",
        name.encode("ascii"),
        b"0000644",
        b"0000000",
        b"0000000",
        b"%011o" % size,
        b"%011o" % 0,
        b" " * 8,
        b"0",
        b"",
        b"ustar\x0000",
        b"",  # names of user and group
        b"",
        b"",  # device numbers
        b"",
    )
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def _add_row(
    tar: _TarWriter,
    row: int,
    piece: Piece,
    number: int,
    rows: EpisodeRows,
    i: int,
    contract: Contract,
    columns: dict[str, list[Any]],
) -> None:
    """Append row ``i`` of ``rows``, row ``number`` of the packed episode, to the tar and to the columns."""
    frames = rows.frames
    members = [_png(image) for image in frames.images_BVHWC[i]]
    if frames.depth_BVHW is not None:
        members += [_npy(depth) for depth in frames.depth_BVHW[i]]
    placed = [
        tar.add(f"{row:08d}.{suffix}", data) for suffix, data in zip(member_suffixes(contract), members, strict=True)
    ]
    head = piece.planned.head
    actions_KA, perturbed_K = _own_steps(piece, number)
    sample = {
        "suite": head.suite,
        "task": head.task,
        "instruction": head.instruction,
        "episode": piece.number,
        "step": number * head.steps_per_row,
        "state": rows.states_TS[i].tolist(),
        "action": actions_KA[0].tolist(),
    }
    if "actions" in columns:
        sample["actions"] = actions_KA.tolist()
    if "perturbed" in columns:
        sample["perturbed"] = perturbed_K.tolist()
    missing = head.steps_per_row - len(actions_KA)  # of an episode's last row
    tar.add(f"{row:08d}.json", json.dumps(sample).encode())
    values: dict[str, Any] = {
        "episode": piece.number,
        "step": sample["step"],
        "state": sample["state"],
        "action": sample["action"],
        "actions": np.pad(actions_KA, ((0, missing), (0, 0)), mode="edge").ravel().tolist(),
        "perturbed": np.pad(perturbed_K, (0, missing)).tolist(),
        "offset": placed,
        "size": [len(data) for data in members],
        "crc32c": [crc32c(data) for data in members],
    }
    if frames.intrinsics_BV33 is not None and frames.extrinsics_BV44 is not None:
        values |= {
            "intrinsics": frames.intrinsics_BV33[i].ravel().tolist(),
            "extrinsics": frames.extrinsics_BV44[i].ravel().tolist(),
        }
    for name, column in columns.items():
        column.append(values[name])


def _own_steps(piece: Piece, number: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """(actions [K, 7], whether each carried a push [K]) of the control steps that are the row's own; K = 1 mostly."""
    head = piece.planned.head
    first = int(piece.planned.kept[number]) * head.steps_per_row
    own = slice(first, first + head.steps_per_row)
    actions_KA = head.actions_TA[own]
    if head.perturbed_T is None:
        return actions_KA, np.zeros(len(actions_KA), dtype=np.uint8)
    return actions_KA, head.perturbed_T[own].astype(np.uint8)


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
