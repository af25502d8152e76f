"""Random access to the rows of a pack: the index is memory-mapped, images are read by byte offset."""

import io
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from crc32c import crc32c
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from geomcache.cache_schemas.contract import ACTION_DIM
from geomcache.cache_schemas.errors import InputError, PackDamaged
from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.cache_schemas.layout import shard_count, shard_of, shard_rows
from geomcache.cache_schemas.pack_info import EPISODES_NAME, PACK_NAME, ROWS_NAME, PackInfo
from geomcache.pipeline.files import allow_many_open_files
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.pack.format import member_suffixes, row_schema, shard_name

_OPEN_SHARDS = 64


@dataclass(frozen=True)
class EpisodeRecord:
    """One line of episodes.arrow."""

    episode: int
    suite: str
    task: str
    number: int
    instruction: str
    first_row: int
    rows: int
    metadata: str
    steps: int  # control steps; more than rows where rows lie several apart


class PackReader:
    """A finished pack. Threads may read from it side by side, as long as they keep to fewer than 64 shards at a time.

    Raises:
        InputError: there is no finished pack at ``path``.
        PackDamaged: a file's size is not the recorded one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        card = path / PACK_NAME
        if not card.exists():
            raise InputError(
                f"{path} is not a finished pack",
                expected=f"a folder with {PACK_NAME}",
                found="no such folder" if not path.exists() else "a folder without it (unfinished or something else)",
                fix=f"geomcache pack build SOURCE --out {path}",
            )
        self.info = PackInfo.read(card, PackDamaged)
        if {file.name for file in self.info.index} != {ROWS_NAME, EPISODES_NAME}:
            raise _damaged(card, f"index files {ROWS_NAME} and {EPISODES_NAME}", str(self.info.index))
        names = [shard_name(shard) for shard in range(len(self.info.shards))]
        if [file.name for file in self.info.shards] != names:  # another path would be verified in their place
            raise _damaged(card, "shards named " + ", ".join(names[:2]) + ", ...", str(self.info.shards))
        for file in (*self.info.shards, *self.info.index):
            found = (path / file.name).stat().st_size if (path / file.name).exists() else -1
            if found != file.bytes:
                raise _damaged(path / file.name, f"{file.bytes} bytes", "no file" if found < 0 else f"{found} bytes")
        for file in self.info.index:  # small beside the shards, and everything is joined by it
            if digest_file(path / file.name) != file.sha256:
                raise _damaged(path / file.name, "the bytes that were packed", "other bytes")
        self._rows = _open_table(path / ROWS_NAME)
        lines = _open_table(path / EPISODES_NAME).to_pylist()
        self.episodes = [EpisodeRecord(**{"steps": line["rows"], **line}) for line in lines]
        self._require_consistent()
        self.states_NS = self._column("state")  # [N, 8] float32
        self.actions_NA = self._column("action")  # [N, 7] float32
        self.episode_of_row = self._column("episode")  # [N] int32
        self.step_of_row = self._column("step")  # [N] int32, control step of the episode
        # [N * k, 7]: k control steps for each row, so that an episode's steps lie one behind the other
        every_step = "action" if self.info.steps_per_row == 1 else "actions"
        self._labels_SA = self._column(every_step).reshape(-1, ACTION_DIM)
        self._end_N = self._ends()
        self.counted_N = self._counted()  # [N] how many actions from the row's on count in a chunk; see action_chunk
        self._offsets = self._column("offset")
        self._sizes = self._column("size")
        self._checksums = self._column("crc32c")  # neither PIL nor .npy notices a flipped bit
        self._files: OrderedDict[int, int] = OrderedDict()
        self._files_lock = threading.Lock()  # frames may be decoded by several threads
        allow_many_open_files()

    def __len__(self) -> int:
        return self.info.rows

    def _column(self, name: str) -> NDArray[Any]:
        """One column as a view of the mapped file; lists become the second axis."""
        column = self._rows.column(name).chunk(0)
        if pa.types.is_fixed_size_list(column.type):
            width = column.type.list_size
            return np.asarray(column.values.to_numpy(zero_copy_only=True)).reshape(-1, width)
        return np.asarray(column.to_numpy(zero_copy_only=True))

    def _require_consistent(self) -> None:
        """pack.json against the index it names."""
        info = self.info
        claimed = (info.rows, info.episodes, len(info.shards), sum(episode.rows for episode in self.episodes))
        found = (
            len(self._rows),
            len(self.episodes),
            shard_count(len(self._rows), info.request.rows_per_shard),
            len(self._rows),
        )
        steps = sum(episode.steps for episode in self.episodes)
        steps_fit = info.steps is None or info.steps.total == steps
        steps_fit &= all(-(-episode.steps // info.steps_per_row) == episode.rows for episode in self.episodes)
        if claimed != found or not steps_fit or self._rows.schema != row_schema(info.contract, info.steps):
            raise _damaged(
                self.path / PACK_NAME,
                f"{found[0]} rows, {found[1]} episodes, {found[2]} shards, {steps} steps and columns, as indexed",
                f"{claimed[0]} rows, {claimed[1]} episodes, {claimed[2]} shards, steps {info.steps}",
            )

    def verify_shard(self, shard: int) -> None:
        """Raise ``PackDamaged`` unless the shard's bytes are those that were packed and its members the known ones.

        ``tar -x`` and webdataset trust member names: one that leaves the folder is refused here, whoever made the pack.
        """
        file = self.info.shards[shard]
        path = self.path / file.name
        if digest_file(path) != file.sha256:
            raise _damaged(path, "the bytes that were packed", "other bytes")
        rows = shard_rows(shard, len(self), self.info.request.rows_per_shard)
        suffixes = [*member_suffixes(self.info.contract), "json"]
        expected = [f"{row:08d}.{suffix}" for row in rows for suffix in suffixes]
        try:
            with tarfile.open(path, "r:") as tar:
                for member, name in zip_longest(tar, expected):
                    if member is None or name is None or member.name != name or not member.isreg():
                        raise _damaged(path, f"member {name}", f"member {member.name if member else None!r}")
        except tarfile.TarError as problem:
            raise _damaged(path, "a whole tar file", str(problem)) from problem

    def frames(self, rows: Sequence[int]) -> FrameBatch:
        """Decode the frames of ``rows``, in the order asked for; any order, repeats allowed."""
        contract = self.info.contract
        images = self.images(rows)
        if not contract.has_depth:
            return FrameBatch(images)
        views, take = len(contract.cameras), np.asarray(rows)
        depth = np.empty(images.shape[:-1], dtype=np.float32)
        for place, row in enumerate(rows):
            for view in range(views):
                depth[place, view] = self._depth(row, views + view)
        return FrameBatch(
            images,
            depth,
            self._column("intrinsics")[take].reshape(-1, views, 3, 3),
            self._column("extrinsics")[take].reshape(-1, views, 4, 4),
        )

    def images(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """Only the images of ``rows``: [B, V, H, W, 3]."""
        cameras = self.info.contract.cameras
        images = np.empty((len(rows), len(cameras), cameras[0].height, cameras[0].width, 3), dtype=np.uint8)
        for place, row in enumerate(rows):
            for view in range(len(cameras)):
                self._decode(row, view, images[place, view])
        return images

    def action_chunk(self, row: int, horizon: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The next T = ``horizon`` control steps' actions from the row's own on, and which of them count.

        Behind the episode's end the last action is repeated. What counts is one run from the row's step to the
        episode's end, or to the step at which the first push was executed: what the expert answered after that, it
        answered in a state to which only the push leads.

        Returns:
            actions float32 [T, 7], counts bool [T]; the sum of counts is min(T, ``counted_N[row]``) and at least 1.
        """
        first, wanted = row * self.info.steps_per_row, np.arange(horizon)
        return self._labels_SA[np.minimum(first + wanted, self._end_N[row] - 1)], wanted < self.counted_N[row]

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """[S, 7] of every control step that belongs to one of ``rows``, in their order; S = rows where k is 1."""
        per_row = self.info.steps_per_row
        steps_NK = np.asarray(rows)[:, None] * per_row + np.arange(per_row)
        return np.asarray(self._labels_SA[steps_NK[steps_NK < self._end_N[rows, None]]])

    def _ends(self) -> NDArray[np.int64]:
        """[N] where in ``_labels_SA`` the row's episode ends."""
        ends = [episode.first_row * self.info.steps_per_row + episode.steps for episode in self.episodes]
        return np.repeat(np.array(ends, dtype=np.int64), [episode.rows for episode in self.episodes])

    def _counted(self) -> NDArray[np.int64]:
        """[N] control steps from the row's own to the episode's end or, if that is nearer, to the next push."""
        firsts_N, end_N = np.arange(len(self)) * self.info.steps_per_row, self._end_N
        if "perturbed" in self._rows.schema.names:
            perturbed = self._column("perturbed").ravel()
            steps = np.where(perturbed, np.arange(len(perturbed)), len(perturbed))
            next_push = np.minimum.accumulate(steps[::-1])[::-1]  # of each step, itself included
            end_N = np.minimum(end_N, next_push[firsts_N] + 1)
        return np.asarray(end_N - firsts_N, dtype=np.int64)

    def instruction(self, row: int) -> str:
        """The instruction of the row's episode."""
        return self.episodes[int(self.episode_of_row[row])].instruction

    def verify(self, progress: Callable[[int, int], None]) -> list[str]:
        """Digest every shard (the index is checked whenever a pack is opened); returns one line per damaged file."""
        known = {self.path / file.name for file in self.info.shards}
        strangers = sorted(path for path in (self.path / "shards").iterdir() if path not in known)
        problems = [f"{path} does not belong to the pack" for path in strangers]
        for shard in range(len(self.info.shards)):
            try:
                self.verify_shard(shard)
            except PackDamaged as problem:
                problems.append(f"{problem.what}: expected {problem.expected}, found {problem.found}")
            progress(shard + 1, len(self.info.shards))
        return problems

    def _member(self, row: int, member: int) -> bytes:
        if not 0 <= row < len(self):
            raise InputError(
                f"row {row} is not in {self.path}",
                expected=f"0 to {len(self) - 1}",
                found=str(row),
                fix=f"geomcache pack info {self.path} says how many rows there are",
            )
        shard, _ = shard_of(row, self.info.request.rows_per_shard)
        size = int(self._sizes[row, member])
        data = os.pread(self._file(shard), size, int(self._offsets[row, member]))
        if len(data) != size:
            raise self._damaged_row(row, f"{size} bytes", f"{len(data)} bytes")
        if crc32c(data) != int(self._checksums[row, member]):
            raise self._damaged_row(row, "the bytes that were packed", "other bytes")
        return data

    def _decode(self, row: int, member: int, out_HWC: NDArray[np.uint8]) -> None:
        data = self._member(row, member)
        try:
            image = np.asarray(PngImageFile(io.BytesIO(data)))
        except (OSError, SyntaxError, ValueError) as problem:  # PIL calls a PNG without its signature a SyntaxError
            raise self._damaged_row(row, "a PNG", str(problem)) from problem
        if image.shape != out_HWC.shape:
            raise self._damaged_row(row, f"an image of shape {out_HWC.shape}", f"shape {image.shape}")
        out_HWC[...] = image

    def _depth(self, row: int, member: int) -> NDArray[np.float32]:
        data = self._member(row, member)
        try:
            return np.asarray(np.load(io.BytesIO(data), allow_pickle=False), dtype=np.float32)
        except ValueError as problem:
            raise self._damaged_row(row, "a .npy", str(problem)) from problem

    def _damaged_row(self, row: int, expected: str, found: str) -> PackDamaged:
        shard, _ = shard_of(row, self.info.request.rows_per_shard)
        return _damaged(self.path / shard_name(shard), f"{expected} for row {row}", found)

    def _file(self, shard: int) -> int:
        with self._files_lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
            while len(self._files) >= _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.path / shard_name(shard), os.O_RDONLY)
            return self._files[shard]

    def close(self) -> None:
        """Close the shard files."""
        with self._files_lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __enter__(self) -> "PackReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["PackReader"], tuple[Path]]:
        return PackReader, (self.path,)  # another process opens its own files


def _open_table(path: Path) -> Any:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as problem:
        raise _damaged(path, "an Arrow IPC file", str(problem)) from problem


def _damaged(path: Path, expected: str, found: str) -> PackDamaged:
    return PackDamaged(
        f"{path} is damaged", expected=expected, found=found, fix="build the pack again into a new folder"
    )
