"""Where a LeRobot data set keeps what: its ``meta`` folder, read into files and lengths of every episode.

Non-obvious:
- v2.0 and v2.1 keep one parquet and one MP4 file an episode, named by number; ``meta/*.jsonl`` lists them.
- v3.0 keeps many episodes a file; ``meta/episodes/**.parquet`` says which file and, for videos, which seconds of it.
- ``meta/tasks.parquet`` was a pandas frame whose INDEX is the instruction: a column ``task`` or ``__index_level_0__``.
- One broken or missing episode is a value of the table, not an error of the data set: others must stay readable.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field, JsonValue

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError, SourceDamaged

S = TypeVar("S", bound=Schema)

VERSIONS = ("v2.0", "v2.1", "v3.0")
INFO = "meta/info.json"
CHANNELS = 3  # RGB
_RE_DOWNLOAD = "download the data set again (hf download --repo-type dataset), or go on without it: --on-error skip"


class Feature(Schema):
    """One column or camera, as ``info.json`` describes it."""

    model_config = ConfigDict(extra="ignore")

    dtype: str
    shape: tuple[int, ...]
    names: JsonValue = None
    info: dict[str, JsonValue] | None = None  # of videos
    video_info: dict[str, JsonValue] | None = None  # the same, as older writers named it

    @property
    def is_camera(self) -> bool:
        """Pictures, in parquet or MP4."""
        return self.dtype in ("image", "video")

    @property
    def is_depth(self) -> bool:
        """A depth map stored as pictures."""
        told = {**(self.video_info or {}), **(self.info or {})}
        return bool(told.get("video.is_depth_map") or told.get("is_depth_map"))

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of an RGB camera; None for anything else. Some cards write channels first."""
        if len(self.shape) != 3:
            return None
        first = str(self.names[0]) if isinstance(self.names, list) and self.names else ""
        if self.shape[0] == CHANNELS and (first.startswith("channel") or self.shape[2] != CHANNELS):
            return self.shape[1], self.shape[2]
        return (self.shape[0], self.shape[1]) if self.shape[2] == CHANNELS else None


class Info(Schema):
    """What this reader needs of ``meta/info.json``; other keys are free."""

    model_config = ConfigDict(extra="ignore")

    codebase_version: str
    fps: float = Field(gt=0)  # where a video's frames lie in its file; never the robot's control rate
    total_episodes: int = Field(ge=0)
    chunks_size: int = Field(default=1000, gt=0)
    data_path: str
    video_path: str | None = None
    features: dict[str, Feature]


class _OnlyVersion(Schema):
    model_config = ConfigDict(extra="ignore")

    codebase_version: str


class _EpisodeLine(Schema):
    model_config = ConfigDict(extra="ignore")

    episode_index: int
    length: int


class _TaskLine(Schema):
    model_config = ConfigDict(extra="ignore")

    task_index: int
    task: str


@dataclass(frozen=True)
class VideoSpan:
    """The part of an MP4 file that is one episode's."""

    path: Path
    from_s: float
    to_s: float | None  # None: to the end of the file


@dataclass(frozen=True)
class EpisodeFiles:
    """Where one episode is."""

    number: int
    length: int  # rows
    data: Path
    videos: Mapping[str, VideoSpan]  # by feature key


def damaged(path: Path, episode: int | None, field: str, *, found: str, expected: str = "") -> SourceDamaged:
    """The error that names file, episode and field."""
    whom = "" if episode is None else f": episode {episode}"
    return SourceDamaged(f"{path}{whom}: {field} cannot be used", expected=expected, found=found, fix=_RE_DOWNLOAD)


def read_info(root: Path) -> Info:
    """``meta/info.json`` of a supported version.

    Raises:
        InputError: no data set there, or one of another version.
        SourceDamaged: the file cannot be read; the field is named.
    """
    path = root / INFO
    if not path.is_file():
        there = ", ".join(sorted(entry.name for entry in root.iterdir())[:6]) if root.is_dir() else "no such folder"
        raise InputError(
            f"{root} is no LeRobot data set",
            expected=f"a folder with {INFO}",
            found=there or "an empty folder",
            fix="give the data set's folder, or its name on the hub: owner/name",
        )
    text = path.read_bytes()
    version = _OnlyVersion.parse(text, str(path), SourceDamaged).codebase_version
    if version not in VERSIONS:
        raise InputError(
            f"{path}: LeRobot format {version} is not supported",
            expected=f"one of {', '.join(VERSIONS)}",
            found=version,
            fix="convert the data set with LeRobot's own converters (lerobot.scripts.convert_dataset_v21_to_v30)",
        )
    return Info.parse(text, str(path), SourceDamaged)


def is_v3(info: Info) -> bool:
    """Many episodes a file, tables in parquet."""
    return info.codebase_version == "v3.0"


def meta_files(root: Path, info: Info) -> list[Path]:
    """The files of ``meta`` that are read."""
    if is_v3(info):
        return [root / INFO, root / "meta/tasks.parquet", *sorted((root / "meta/episodes").rglob("[!.]*.parquet"))]
    return [root / INFO, root / "meta/tasks.jsonl", root / "meta/episodes.jsonl"]


def read_tasks(root: Path, info: Info) -> dict[int, str]:
    """task_index -> instruction."""
    if not is_v3(info):
        path = root / "meta/tasks.jsonl"
        return {line.task_index: line.task for line in _lines(path, _TaskLine)}
    path = root / "meta/tasks.parquet"
    table = _table(path, None)
    texts = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not texts or "task_index" not in table.column_names:
        found = ", ".join(table.column_names)
        raise damaged(path, None, "columns", expected="task_index and task", found=found)
    tasks = zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True)
    return {index: text for index, text in tasks if isinstance(index, int) and isinstance(text, str)}


def read_episodes(root: Path, info: Info, video_keys: tuple[str, ...]) -> dict[int, EpisodeFiles | SourceDamaged]:
    """episode_index -> where it is, or what is wrong with it; every number that ``meta`` names is there.

    Raises:
        SourceDamaged: a whole table of ``meta`` is missing or cannot be read.
    """
    named_in = root / ("meta/episodes" if is_v3(info) else "meta/episodes.jsonl")
    found = _episodes_v3(root, info, video_keys) if is_v3(info) else _episodes_v2(root, info, video_keys)
    episodes: dict[int, EpisodeFiles | SourceDamaged] = {}
    for number, entry in found:
        if number in episodes:
            entry = damaged(named_in, number, "episode_index", expected="every number once", found="it stands twice")
        elif not 0 <= number < info.total_episodes:
            told = f"total_episodes {info.total_episodes} in info.json"
            entry = damaged(named_in, number, "episode_index", expected=told, found=f"an episode {number}")
        episodes[number] = entry
    for number in set(range(info.total_episodes)) - set(episodes):
        told = f"total_episodes {info.total_episodes} in info.json"
        episodes[number] = damaged(named_in, number, "episode_index", expected=told, found="no such episode")
    return dict(sorted(episodes.items()))


def _episodes_v2(root: Path, info: Info, video_keys: tuple[str, ...]) -> list[tuple[int, EpisodeFiles | SourceDamaged]]:
    episodes: list[tuple[int, EpisodeFiles | SourceDamaged]] = []
    for line in _lines(root / "meta/episodes.jsonl", _EpisodeLine):
        number = line.episode_index
        place = {"episode_chunk": number // info.chunks_size, "episode_index": number}
        videos = {key: VideoSpan(_video(root, info, video_key=key, **place), 0.0, None) for key in video_keys}
        data = _inside(root, info.data_path, "data_path", place)
        episodes.append((number, EpisodeFiles(number, line.length, data, videos)))
    return episodes


def _episodes_v3(root: Path, info: Info, video_keys: tuple[str, ...]) -> list[tuple[int, EpisodeFiles | SourceDamaged]]:
    where = ("chunk_index", "file_index")
    columns = ["episode_index", "length", *(f"data/{name}" for name in where)]
    columns += [f"videos/{key}/{name}" for key in video_keys for name in (*where, "from_timestamp", "to_timestamp")]
    paths = meta_files(root, info)[2:]
    if not paths:
        raise damaged(root / "meta/episodes", None, "table of episodes", expected="parquet files", found="none")
    episodes: list[tuple[int, EpisodeFiles | SourceDamaged]] = []
    for path in paths:
        table = _table(path, columns)
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise damaged(path, None, missing[0], expected="a column of that name", found="none")
        for row in table.to_pylist():
            number = row["episode_index"]
            if not isinstance(number, int):
                raise damaged(path, None, "episode_index", expected="integers", found=repr(number))
            wrong = [name for name in columns if isinstance(row[name], bool) or not isinstance(row[name], int | float)]
            if wrong:
                problem = damaged(path, number, wrong[0], expected="a number", found=repr(row[wrong[0]]))
                episodes.append((number, problem))
                continue
            place = {name: int(row[f"data/{name}"]) for name in where}
            data = _inside(root, info.data_path, "data_path", place)
            videos = {
                key: VideoSpan(
                    _video(root, info, video_key=key, **{name: int(row[f"videos/{key}/{name}"]) for name in where}),
                    float(row[f"videos/{key}/from_timestamp"]),
                    float(row[f"videos/{key}/to_timestamp"]),
                )
                for key in video_keys
            }
            episodes.append((number, EpisodeFiles(number, int(row["length"]), data, videos)))
    return episodes


def _video(root: Path, info: Info, **place: Any) -> Path:
    if info.video_path is None:
        raise damaged(root / INFO, None, "video_path", expected="a path, as there are video features", found="null")
    return _inside(root, info.video_path, "video_path", place)


def _inside(root: Path, template: str, field: str, place: Mapping[str, Any]) -> Path:
    """A path of ``info.json`` with its numbers filled in; never one outside of the data set."""
    try:
        text = template.format(**place)
    except (KeyError, IndexError, ValueError, AttributeError) as problem:
        expected = f"a path with {', '.join(place)}"
        raise damaged(root / INFO, None, field, expected=expected, found=template) from problem
    return below(root, text, damaged(root / INFO, None, field, expected="a path below the data set", found=text))


def below(root: Path, text: str, problem: SourceDamaged) -> Path:
    """``root / text``, or ``problem`` where that would leave ``root``."""
    path = PurePosixPath(text)
    if not text or path.is_absolute() or ".." in path.parts:
        raise problem
    return root / path


def _table(path: Path, columns: list[str] | None) -> Any:
    if not path.is_file():
        raise damaged(path, None, "file", expected="a parquet file", found="no such file")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as problem:
        raise damaged(path, None, "file", expected="a whole parquet file", found=str(problem)) from problem


def _lines(path: Path, cls: type[S]) -> list[S]:
    if not path.is_file():
        raise damaged(path, None, "file", expected="one JSON object a line", found="no such file")
    lines = path.read_bytes().splitlines()
    return [
        cls.parse(line, f"{path}: line {number}", SourceDamaged) for number, line in enumerate(lines, 1) if line.strip()
    ]
