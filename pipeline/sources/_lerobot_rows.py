"""Rows of one episode out of LeRobot's parquet files: small columns as arrays, pictures decoded.

Non-obvious:
- An image column is ``struct<bytes, path>``; ``bytes`` is null where the pictures stand in files of their own.
- Files of one data set come with one row group an episode (LeRobot's recorder), one for 100 rows (the datasets library)
  or one for all (the v2.1 to v3.0 converter, 100 MB). Row groups are skipped; but Arrow's writer ends a page only every
  1024 rows, so all pictures of one camera in a row group may be one page, which is decompressed whole. So one camera
  is read at a time, and files are mapped, not loaded.
- Rows are found by their ``episode_index``; ``dataset_from_index`` counts over all files, wrongly after some merges.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from geomcache.cache_schemas.errors import SourceDamaged
from geomcache.pipeline.sources._lerobot_layout import CHANNELS, EpisodeFiles, below, damaged

_ROWS_AT_ONCE = 16  # of pictures
INDEX_COLUMNS = ("episode_index", "frame_index", "task_index")

_LFS = b"version https://git-lfs"


class EpisodeTable:
    """The small columns of one episode, its rows checked to be all there and in order."""

    def __init__(self, files: EpisodeFiles, first: int, table: Any) -> None:
        self.files = files
        self.first = first  # row of the episode in its file
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def vectors(self, key: str, width: int) -> NDArray[Any]:
        """A list column as floats [T, width].

        Raises:
            SourceDamaged: another type or width, null, NaN or infinite.
        """
        column = self.column(key)
        kind = column.type
        is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
        if not is_list or not pa.types.is_floating(kind.value_type):
            raise self._damaged(key, f"lists of {width} floats", str(kind))
        lists = column.combine_chunks()
        flat = lists.flatten()
        if lists.null_count or flat.null_count:
            raise self._damaged(key, f"{width} numbers a row", f"{lists.null_count + flat.null_count} nulls")
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        if (lengths != width).any():
            raise self._damaged(key, f"{width} numbers a row", f"{lengths[lengths != width][0]}")
        values = flat.to_numpy(zero_copy_only=False).reshape(len(self), width)
        if not np.isfinite(values).all():
            row, dim = np.argwhere(~np.isfinite(values))[0]
            raise self._damaged(key, "finite numbers", f"{values[row, dim]} at row {row}, number {dim}")
        return np.asarray(values)

    def scalars(self, key: str) -> NDArray[Any]:
        """A column of numbers or booleans [T]; lists of one are taken for their number."""
        column = self.column(key).combine_chunks()
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            column = column.flatten()
        if column.null_count or len(column) != len(self) or not _is_number(column.type):
            raise self._damaged(key, "one number a row", f"{column.type}, {column.null_count} nulls")
        return np.asarray(column.to_numpy(zero_copy_only=False))

    def column(self, key: str) -> Any:
        """The column as it is; missing ones are named."""
        if key not in self._table.column_names:
            raise self._damaged(key, "a column of that name", ", ".join(self._table.column_names))
        return self._table[key]

    def require_order(self) -> None:
        """Raise ``SourceDamaged`` unless ``frame_index`` counts 0, 1, 2, ..."""
        frames = self.scalars("frame_index")
        wrong = np.flatnonzero(frames != np.arange(len(self)))
        if len(wrong):
            raise self._damaged("frame_index", f"{wrong[0]} at row {wrong[0]}", str(frames[wrong[0]]))

    def _damaged(self, key: str, expected: str, found: str) -> SourceDamaged:
        return damaged(self.files.data, self.files.number, key, expected=expected, found=found)


class DataFiles:
    """The data set's parquet files; the small columns of the file used last are kept."""

    def __init__(self, root: Path, columns: Sequence[str]) -> None:
        self._root = root
        self._columns = [*INDEX_COLUMNS, *columns]
        self._kept: tuple[Path, Any, Any] | None = None

    def episode(self, files: EpisodeFiles, image_keys: Sequence[str]) -> EpisodeTable:
        """The rows of one episode; ``image_keys`` are looked for, not read.

        Raises:
            SourceDamaged: the file cannot be read, or does not hold exactly these rows.
        """
        schema, table = self._small_columns(files)
        for key in image_keys:
            kind = schema.field(key).type if key in schema.names else None
            if kind is None or not pa.types.is_struct(kind) or {field.name for field in kind} != {"bytes", "path"}:
                raise damaged(files.data, files.number, key, expected="struct<bytes, path>", found=str(kind or "none"))
        whole = EpisodeTable(files, 0, table)
        rows = np.flatnonzero(whole.scalars("episode_index") == files.number)
        if len(rows) != files.length or files.length < 1:
            told = f"{files.length} rows, as meta says"
            raise damaged(files.data, files.number, "rows", expected=told, found=str(len(rows)))
        first = int(rows[0])
        if rows[-1] != first + files.length - 1:
            raise damaged(files.data, files.number, "rows", expected="one after another", found="others between them")
        episode = EpisodeTable(files, first, table.slice(first, files.length))
        episode.require_order()
        return episode

    def lowest(self, path: Path, key: str, dim: int, width: int) -> float | None:
        """The lowest finite value of one number of a list column in a whole file; None where it cannot be read."""
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                flat = file.read(columns=[key], use_threads=False)[key].combine_chunks().flatten()
            values = flat.to_numpy(zero_copy_only=False).reshape(-1, width)[:, dim]
        except (OSError, ValueError, KeyError, AttributeError, pa.ArrowException):
            return None  # told by episode when it is read
        values = values[np.isfinite(values)]
        return float(values.min()) if len(values) else None

    def images(
        self, episode: EpisodeTable, keys: Mapping[str, tuple[int, int]], start: int, stop: int
    ) -> dict[str, NDArray[np.uint8]]:
        """Pictures as stored, by key [rows, H, W, 3]; ``keys`` gives their (height, width).

        Raises:
            SourceDamaged: a picture is missing, corrupt, of another size or no RGB picture.
        """
        found = {key: np.empty((stop - start, *size, CHANNELS), np.uint8) for key, size in keys.items()}
        for key, size in keys.items():
            for row, picture in enumerate(self._stored(episode, key, start, stop), start):
                found[key][row - start] = self._decoded(episode.files, key, row, picture, size)
        return found

    def describe(self, episode: EpisodeTable, key: str) -> str:
        """The format of the first picture in words."""
        picture = next(self._stored(episode, key, 0, 1))
        with _naming(episode.files, key, 0):
            kind = str(Image.open(io.BytesIO(self._bytes(episode.files, key, 0, picture))).format).lower()
        lossy = "" if kind == "png" else ", lossy" if kind == "jpeg" else ""
        return f"{kind} in parquet{lossy}" if picture and picture["bytes"] is not None else f"{kind} files{lossy}"

    def _small_columns(self, files: EpisodeFiles) -> tuple[Any, Any]:
        if self._kept is None or self._kept[0] != files.data:
            self._kept = None
            with _reading(files) as file:
                columns = [name for name in self._columns if name in file.schema_arrow.names]
                self._kept = (files.data, file.schema_arrow, file.read(columns=columns, use_threads=False))
        return self._kept[1], self._kept[2]

    def _stored(self, episode: EpisodeTable, key: str, start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        """The image structs of rows ``start`` to ``stop`` - 1, one row and one camera at a time."""
        if start >= stop:
            return
        with _reading(episode.files) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            starts = np.concatenate([[0], np.cumsum(sizes)])
            first, end = episode.first + start, episode.first + stop
            groups = [g for g in range(len(sizes)) if starts[g] < end and starts[g + 1] > first]
            at = int(starts[groups[0]])
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[key], use_threads=False):
                low, high = max(first - at, 0), min(end - at, batch.num_rows)
                at += batch.num_rows
                yield from (batch.column(key)[i].as_py() for i in range(low, high))
                if at >= end:
                    return

    def _decoded(
        self, files: EpisodeFiles, key: str, row: int, picture: dict[str, Any] | None, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        raw = self._bytes(files, key, row, picture)
        with _naming(files, key, row):
            with Image.open(io.BytesIO(raw)) as checked:
                found = f"{checked.height} x {checked.width} {checked.mode} at row {row}"
                if checked.mode != "RGB" or (checked.height, checked.width) != size:
                    expected = f"{size[0]} x {size[1]} RGB, as info.json says"
                    raise damaged(files.data, files.number, key, expected=expected, found=found)
                checked.verify()  # a PNG's checksums, which loading skips
            with Image.open(io.BytesIO(raw)) as image:
                return np.asarray(image)

    def _bytes(self, files: EpisodeFiles, key: str, row: int, picture: dict[str, Any] | None) -> bytes:
        picture = picture or {"bytes": None, "path": None}
        if picture["bytes"] is not None:
            return bytes(picture["bytes"])
        text = picture["path"] or ""
        expected = "the picture's bytes, or a path below the data set"
        path = below(
            self._root,
            text,
            damaged(files.data, files.number, key, expected=expected, found=f"{text or 'neither'} at row {row}"),
        )
        with _naming(files, key, row):
            return path.read_bytes()


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


@contextmanager
def _reading(files: EpisodeFiles) -> Iterator[Any]:
    """The open parquet file; Arrow's own errors are named by file and episode."""
    if not files.data.is_file():
        raise damaged(files.data, files.number, "file", expected="a parquet file", found="no such file")
    try:
        with pq.ParquetFile(files.data, memory_map=True, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException) as problem:
        found = "a Git LFS pointer: run `git lfs pull` in the data set" if _is_lfs_pointer(files.data) else str(problem)
        raise damaged(files.data, files.number, "file", expected="a whole parquet file", found=found) from problem


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


@contextmanager
def _naming(files: EpisodeFiles, key: str, row: int) -> Iterator[None]:
    """Pillow's and the file system's errors are named by file, episode, camera and row."""
    try:
        yield
    except SourceDamaged:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:  # a broken PNG: SyntaxError
        said = "no picture" if isinstance(problem, UnidentifiedImageError) else str(problem)  # it names an address
        raise damaged(
            files.data, files.number, key, expected="a whole picture", found=f"{said} at row {row}"
        ) from problem
