"""Episodes -> WebDataset tar shards of a fixed number of rows + a columnar index.

Deterministic: the same sources and settings give byte-identical files. The pack is finished when ``pack.json``
stands; what a killed run left is written again.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError, PackDamaged
from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.cache_schemas.pack_info import (
    EPISODES_NAME,
    PACK_NAME,
    ROWS_NAME,
    PackFile,
    PackInfo,
    PackRequest,
    SourceRecord,
)
from geomcache.pipeline.files import atomic_writer, remove_leftovers, require_own_folder, write_atomic
from geomcache.pipeline.frames import Episode
from geomcache.pipeline.interfaces import FrameSource
from geomcache.pipeline.pack.card import data_card
from geomcache.pipeline.pack.format import EPISODE_SCHEMA, member_suffixes, row_schema, shard_name

_TAR_HEADER = 512  # bytes of a USTAR header; the member's data follow it
_REQUEST_NAME = "pack.request.json"

Progress = Callable[[int, int], None]  # (episodes done, episodes in all)


def build_pack(
    sources: list[tuple[str, FrameSource, str]], out: Path, *, rows_per_shard: int, progress: Progress
) -> tuple[PackInfo, bool]:
    """Write a pack of (plug-in name, source, location) triples; returns (card, True when it already stood).

    Raises:
        InputError: ``out`` holds something else, or a pack of other sources.
        ContractMismatch: the sources follow different conventions.
        SourceDamaged: see the source.
    """
    require_own_folder(out, lambda folder: (folder / _REQUEST_NAME).exists(), "a pack")
    contract = _common_contract(sources)
    request = PackRequest(
        sources=tuple(
            SourceRecord(kind=kind, location=location, revision=source.revision) for kind, source, location in sources
        ),
        contract=contract,
        rows_per_shard=rows_per_shard,
    )
    _require_same_request(out, request)
    if (out / PACK_NAME).exists():
        return PackInfo.read(out / PACK_NAME, PackDamaged), True
    write_atomic(out / _REQUEST_NAME, request.model_dump_json(indent=2))
    remove_leftovers(out)

    total = sum(source.episode_count for _, source, _ in sources)
    index = _Index(contract)
    shards: list[PackFile] = []
    rows = _numbered_rows(
        (episode for _, source, _ in sources for episode in source.episodes()), index, total, progress
    )
    while batch := _take(rows, rows_per_shard):
        shards.append(_write_shard(out, len(shards), batch, contract, index))
    if not shards:
        raise InputError("the sources hold no rows", expected="at least one episode of two steps", found="none")
    info = PackInfo(
        request=request,
        rows=index.rows,
        episodes=index.episodes,
        shards=tuple(shards),
        index=index.write(out),
    )
    write_atomic(out / "README.md", data_card(info))
    write_atomic(out / PACK_NAME, info.model_dump_json(indent=2))
    return info, False


def _common_contract(sources: list[tuple[str, FrameSource, str]]) -> Contract:
    (_, first, first_location), *others = sources
    for _, source, location in others:
        first.contract.require_same(
            source.contract, mine=first_location, theirs=location, fix="build one pack per convention"
        )
    return first.contract


def _require_same_request(out: Path, request: PackRequest) -> None:
    path = out / _REQUEST_NAME
    if path.exists() and (out / PACK_NAME).exists():  # an unfinished pack may be started anew
        standing = PackRequest.parse(path.read_bytes(), str(path), InputError)
        if differences := standing.describe_difference(request):
            raise InputError(
                f"{out} holds a pack of other sources or settings",
                expected="the same sources, cameras and rows per shard",
                found="; ".join(differences),
                fix="choose another --out",
            )


class _Index:
    """Collects the columns of rows.arrow and episodes.arrow."""

    def __init__(self, contract: Contract) -> None:
        self._schema = row_schema(contract)
        self._row_columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._episode_columns: dict[str, list[Any]] = {name: [] for name in EPISODE_SCHEMA.names}
        self.rows = 0  # of the episodes seen so far
        self.episodes = 0

    @property
    def packed_rows(self) -> int:
        return len(self._row_columns["step"])

    def add_episode(self, episode: Episode) -> int:
        values = (
            self.episodes,
            episode.suite,
            episode.task,
            episode.episode,
            episode.instruction,
            self.rows,
            len(episode),
            json.dumps(episode.metadata, sort_keys=True),
        )
        for name, value in zip(EPISODE_SCHEMA.names, values, strict=True):
            self._episode_columns[name].append(value)
        self.rows += len(episode)
        self.episodes += 1
        return self.episodes - 1

    def add_row(self, **values: Any) -> None:
        for name, column in self._row_columns.items():
            column.append(np.ravel(values[name]).tolist() if isinstance(values[name], np.ndarray) else values[name])

    def write(self, out: Path) -> tuple[PackFile, ...]:
        tables = {
            ROWS_NAME: pa.table(self._row_columns, schema=self._schema),
            EPISODES_NAME: pa.table(self._episode_columns, schema=EPISODE_SCHEMA),
        }
        written = []
        for name, table in tables.items():
            with atomic_writer(out / name) as file, pa.ipc.new_file(file, table.schema) as sink:
                sink.write_table(table.combine_chunks())
            written.append(PackFile(name=name, bytes=(out / name).stat().st_size, sha256=digest_file(out / name)))
        return tuple(written)


_Row = tuple[int, int, Episode]  # (episode index, step, episode)


def _numbered_rows(episodes: Iterator[Episode], index: _Index, total: int, progress: Progress) -> Iterator[_Row]:
    for episode in episodes:
        number = index.add_episode(episode)
        for step in range(len(episode)):
            yield number, step, episode
        progress(number + 1, total)


def _take(rows: Iterator[_Row], count: int) -> list[_Row]:
    return [row for _, row in zip(range(count), rows, strict=False)]


def _write_shard(out: Path, shard: int, rows: list[_Row], contract: Contract, index: _Index) -> PackFile:
    name = shard_name(shard)
    suffixes = member_suffixes(contract)
    with atomic_writer(out / name) as file:
        hashing = _HashingWriter(file)
        stream = cast(BinaryIO, hashing)  # tarfile's stream mode only calls write
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT, bufsize=1 << 20) as tar:
            for row, (number, step, episode) in enumerate(rows, start=index.packed_rows):
                members = _members(episode, step, contract)
                placed = [
                    _add(tar, f"{row:08d}.{suffix}", data) for suffix, data in zip(suffixes, members, strict=True)
                ]
                _add(tar, f"{row:08d}.json", _sample_json(episode, number, step))
                frames = episode.frames
                matrices = (
                    {"intrinsics": frames.intrinsics_BV33[step], "extrinsics": frames.extrinsics_BV44[step]}
                    if frames.intrinsics_BV33 is not None and frames.extrinsics_BV44 is not None
                    else {}
                )
                index.add_row(
                    episode=number,
                    step=step,
                    state=episode.states_TS[step],
                    action=episode.actions_TA[step],
                    offset=[offset for offset, _ in placed],
                    size=[size for _, size in placed],
                    **matrices,
                )
    return PackFile(name=name, bytes=hashing.bytes, sha256=hashing.digest.hexdigest())


class _HashingWriter:
    """Counts and digests what passes through, so that a shard is not read again."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        self._file.write(data)
        return len(data)


def _members(episode: Episode, step: int, contract: Contract) -> list[bytes]:
    frames = episode.frames
    members = [_png(frames.images_BVHWC[step, view]) for view in range(len(contract.cameras))]
    if contract.has_depth and frames.depth_BVHW is not None:
        members += [_npy(frames.depth_BVHW[step, view]) for view in range(len(contract.cameras))]
    return members


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _sample_json(episode: Episode, number: int, step: int) -> bytes:
    sample = {
        "suite": episode.suite,
        "task": episode.task,
        "instruction": episode.instruction,
        "episode": number,
        "step": step,
        "state": episode.states_TS[step].tolist(),
        "action": episode.actions_TA[step].tolist(),
    }
    return json.dumps(sample).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Append one member; returns (offset of its data in the tar, size)."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    header.mode = 0o644  # mtime, uid and gid stay 0: the bytes depend on the data alone
    offset = tar.offset + _TAR_HEADER
    tar.addfile(header, io.BytesIO(data))
    return offset, len(data)
