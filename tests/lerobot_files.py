"""LeRobot data sets of LIBERO written with plain pyarrow, Pillow and PyAV: the files and keys of the published ones.

v2.1 as openpi's converter writes it, v3.0 as ``lerobot/libero`` and ``HuggingFaceVLA/libero`` are published. Nothing of
geomcache is used, so the reader is compared with an independent writer.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

SIDE = 32  # pixels; MP4 wants even sides
BLOCK = 8  # pixels of one colour, so that a lossy codec keeps frames apart
LENGTHS = (9, 6, 11)  # rows per episode
KEYS = ("observation.images.image", "observation.images.image2")
TASKS = ("pick up the milk and place it in the basket", "open the top drawer")
FPS = 10  # what cards say of a 20 Hz robot


@dataclass(frozen=True)
class Recorded:
    """What was written, as stored."""

    root: Path
    images_TVHWC: list[NDArray[np.uint8]]  # per episode
    states_TS: list[NDArray[np.float32]]
    actions_TA: list[NDArray[np.float32]]
    instructions: list[str]


def write_data_set(
    root: Path,
    version: str = "v3.0",
    *,
    images: str = "png",  # "png" in parquet, "beside" it, or "mp4"
    lengths: Sequence[int] = LENGTHS,
    size: tuple[int, int] = (SIDE, SIDE),  # height, width; multiples of BLOCK
    keys: Sequence[str] = KEYS,
    state_key: str = "observation.state",
    action_key: str = "action",
    state_width: int = 8,
    gripper: str = "minus_open_plus_close",
    row_group: int | None = None,  # rows; None: one group an episode, as LeRobot records
    codec: str = "libx264",
    group_of_pictures: int = 2,
    fps: float = FPS,
    episodes_per_file: int = 2,
    extra: dict[str, list[Any]] | None = None,  # further scalar columns, values per episode
    recorded: Recorded | None = None,  # episodes to write instead of random ones
) -> Recorded:
    """Write one data set; episode i's task is task i modulo 2."""
    rng = np.random.default_rng(7)
    if recorded is not None:
        lengths, size = [len(images) for images in recorded.images_TVHWC], recorded.images_TVHWC[0].shape[2:4]
    given, recorded = recorded, recorded or Recorded(root, [], [], [], [TASKS[i % 2] for i in range(len(lengths))])
    for length in lengths if given is None else ():
        blocks = rng.integers(0, 256, (length, len(keys), size[0] // BLOCK, size[1] // BLOCK, 3), dtype=np.uint8)
        recorded.images_TVHWC.append(blocks.repeat(BLOCK, axis=2).repeat(BLOCK, axis=3))
        recorded.states_TS.append(_states(rng, length, state_width))
        actions_TA = rng.uniform(-0.9375, 0.9375, (length, 7)).astype(np.float32)
        low = -1.0 if gripper == "minus_open_plus_close" else 0.0
        actions_TA[:, 6] = np.where(np.arange(length) < length // 2, low, 1.0)
        recorded.actions_TA.append(actions_TA)

    v3 = version == "v3.0"
    root.mkdir(parents=True)
    features = _features(
        keys, state_key, action_key, state_width, "video" if images == "mp4" else "image", size, v3, fps
    )
    for name in extra or {}:
        features[name] = {"dtype": "float32" if "reward" in name else "bool", "shape": [1], "names": None}
    tables = [
        _table(recorded, i, keys, state_key, action_key, images, extra or {}, fixed=not v3) for i in range(len(lengths))
    ]
    places: list[dict[str, Any]] = [{} for _ in lengths]
    for first in range(0, len(lengths), episodes_per_file if v3 else 1):
        episodes = range(first, min(first + (episodes_per_file if v3 else 1), len(lengths)))
        file = first // episodes_per_file
        stem = f"chunk-000/file-{file:03d}" if v3 else f"chunk-000/episode_{first:06d}"
        _write_parquet(root / f"data/{stem}.parquet", [tables[i] for i in episodes], row_group)
        for i in episodes:
            places[i] = {"data/chunk_index": 0, "data/file_index": file}
        for v, key in enumerate(keys if images == "mp4" else ()):
            name = f"videos/{key}/{stem}.mp4" if v3 else f"videos/chunk-000/{key}/episode_{first:06d}.mp4"
            clips = [recorded.images_TVHWC[i][:, v] for i in episodes]
            seconds = write_video(root / name, clips, codec=codec, group_of_pictures=group_of_pictures, fps=fps)
            for i, start, stop in zip(episodes, seconds, seconds[1:], strict=False):
                places[i] |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file}
                places[i] |= {f"videos/{key}/from_timestamp": start, f"videos/{key}/to_timestamp": stop}
    _write_info(root, version, lengths, features, len(keys) if images == "mp4" else 0, fps)
    _write_meta(root, recorded, version, places, state_key, action_key)
    (root / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- LeRobot\n---\n")
    return recorded


def write_video(
    path: Path,
    clips: Sequence[NDArray[np.uint8]],
    *,
    codec: str = "libx264",
    group_of_pictures: int = 2,
    fps: float = FPS,
    pixels: str = "yuv420p",
) -> list[float]:
    """Encode each clip [T, H, W, 3] and join the files as they are; the seconds where clips begin and end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts, seconds = [], [0.0]
    for number, clip in enumerate(clips):
        part = path.with_name(f"{path.stem}.part{number}.mp4")
        with av.open(str(part), "w") as container:
            stream: Any = container.add_stream(codec, rate=int(fps))
            stream.height, stream.width = clip.shape[1:3]
            stream.pix_fmt = pixels
            stream.options = {"g": str(group_of_pictures), "crf": "10"}
            for image in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        with av.open(str(part)) as container:
            video = container.streams.video[0]
            assert video.duration is not None
            assert video.time_base is not None
            seconds.append(seconds[-1] + float(video.duration * video.time_base))
        parts.append(part)
    listing = path.with_suffix(".ffconcat")
    listing.write_text("ffconcat version 1.0\n" + "".join(f"file '{part.name}'\n" for part in parts))
    with (
        av.open(str(listing), format="concat", options={"safe": "0"}) as joined,
        av.open(str(path), "w", options={"movflags": "faststart"}) as out,
    ):
        copied = out.add_stream_from_template(joined.streams.video[0], opaque=True)
        copied.time_base = joined.streams.video[0].time_base
        for packet in joined.demux(video=0):
            if packet.dts is not None:
                packet.stream = copied
                out.mux(packet)
    for temporary in (listing, *parts):
        temporary.unlink()
    return seconds


def png(image_HWC: NDArray[Any]) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "png")
    return file.getvalue()


def edit_table(path: Path, column: str, row: int, value: Any) -> None:
    """Write another value into one cell of a parquet file, or drop the column (``value`` is ``...``)."""
    table = pq.read_table(path)
    if value is ...:
        table = table.drop_columns([column])
    else:
        at, values = table.column_names.index(column), table[column].to_pylist()
        values[row] = value
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    pq.write_table(table, path)


def edit_info(root: Path, **changes: Any) -> None:
    """Change keys of ``meta/info.json``; "a__b" reaches into objects, None as ``...`` drops."""
    info = json.loads((root / "meta/info.json").read_text())
    for dotted, value in changes.items():
        *way, last = dotted.split("__")
        at = info
        for name in way:
            at = at[name]
        at[last] = value
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))


def _states(rng: np.random.Generator, length: int, width: int) -> NDArray[np.float32]:
    position, finger = rng.uniform(-0.3, 1.2, (length, 3)), rng.uniform(0.0, 0.04, (length, 1))
    fingers = np.concatenate([finger, -finger], axis=1)
    if width == 8:
        return np.concatenate([position, rng.uniform(-3, 3, (length, 3)), fingers], axis=1).astype(np.float32)
    quaternions = rng.normal(size=(length, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    return np.concatenate([fingers, position, quaternions], axis=1).astype(np.float32)


def _features(
    keys: Sequence[str],
    state_key: str,
    action_key: str,
    state_width: int,
    dtype: str,
    size: tuple[int, int],
    v3: bool,
    fps: float,
) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {}
    for key in keys:
        features[key] = {"dtype": dtype, "shape": [*size, 3], "names": ["height", "width", "channel"]}
        if dtype == "video":
            told = {"height": size[0], "width": size[1], "codec": "h264", "pix_fmt": "yuv420p", "is_depth_map": False}
            more = {"fps": int(fps), "channels": 3}
            features[key]["info"] = {f"video.{k}": v for k, v in (told | more).items()} | {"has_audio": False}
    features[state_key] = {"dtype": "float32", "shape": [state_width], "names": ["state"]}
    features[action_key] = {"dtype": "float32", "shape": [7], "names": ["actions"]}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    if v3:
        for feature in features.values():
            if feature["dtype"] != "video":
                feature["fps"] = fps
    return features


def _table(
    recorded: Recorded,
    episode: int,
    keys: Sequence[str],
    state_key: str,
    action_key: str,
    images: str,
    extra: dict[str, list[Any]],
    *,
    fixed: bool,
) -> pa.Table:
    length = len(recorded.actions_TA[episode])
    columns: dict[str, Any] = {}
    for v, key in enumerate(keys if images != "mp4" else ()):
        values = []
        for t, image in enumerate(recorded.images_TVHWC[episode][:, v]):
            name = f"images/{key}/episode_{episode:06d}/frame_{t:06d}.png"
            if images == "beside":
                (recorded.root / name).parent.mkdir(parents=True, exist_ok=True)
                (recorded.root / name).write_bytes(png(image))
            inside = {"bytes": png(image), "path": Path(name).name}
            values.append(inside if images == "png" else {"bytes": None, "path": name})
        columns[key] = pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    for key, numbers in ((state_key, recorded.states_TS[episode]), (action_key, recorded.actions_TA[episode])):
        kind = pa.list_(pa.float32(), numbers.shape[1]) if fixed else pa.list_(pa.float32())
        columns[key] = pa.array(numbers.tolist(), kind)
    first = sum(len(actions) for actions in recorded.actions_TA[:episode])
    columns["timestamp"] = pa.array(np.arange(length, dtype=np.float32) / FPS)
    columns["frame_index"] = pa.array(np.arange(length))
    columns["episode_index"] = pa.array(np.full(length, episode))
    columns["index"] = pa.array(first + np.arange(length))
    columns["task_index"] = pa.array(np.full(length, TASKS.index(recorded.instructions[episode])))
    for name, per_episode in extra.items():
        columns[name] = pa.array(per_episode[episode])
    table = pa.table(columns)
    hugging = {"info": {"features": {key: {"_type": "Image"} for key in keys}}} if images != "mp4" else {"info": {}}
    return table.replace_schema_metadata({"huggingface": json.dumps(hugging)})


def _write_parquet(path: Path, tables: Sequence[pa.Table], row_group: int | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if row_group is not None:
        pq.write_table(pa.concat_tables(tables), path, row_group_size=row_group)
        return
    with pq.ParquetWriter(path, tables[0].schema, compression="snappy", use_dictionary=True) as writer:
        for table in tables:
            writer.write_table(table)


def _write_info(
    root: Path, version: str, lengths: Sequence[int], features: dict[str, Any], cameras: int, fps: float
) -> None:
    v3 = version == "v3.0"
    info: dict[str, Any] = {
        "codebase_version": version,
        "robot_type": "panda",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": len(TASKS),
    }
    if v3:
        data, video = "data/{}.parquet", "videos/{{video_key}}/{}.mp4"
        place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
        data, video = data.format(place), video.format(place)
    else:
        info |= {"total_videos": cameras * len(lengths), "total_chunks": 1}
        data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    info |= {"chunks_size": 1000, "fps": fps, "splits": {"train": f"0:{len(lengths)}"}}
    info |= {"data_path": data, "video_path": video if cameras or not v3 else None, "features": features}
    if v3:
        info |= {"data_files_size_in_mb": 100, "video_files_size_in_mb": 500}
    (root / "meta").mkdir()
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))


def _write_meta(
    root: Path,
    recorded: Recorded,
    version: str,
    places: Sequence[dict[str, Any]],
    state_key: str,
    action_key: str,
) -> None:
    stats = []
    for states_TS, actions_TA in zip(recorded.states_TS, recorded.actions_TA, strict=True):
        stats.append({state_key: _stats(states_TS), action_key: _stats(actions_TA)})
    lengths = [len(actions) for actions in recorded.actions_TA]
    lines = [
        {"episode_index": i, "tasks": [recorded.instructions[i]], "length": length} for i, length in enumerate(lengths)
    ]
    if version != "v3.0":
        _jsonl(root / "meta/episodes.jsonl", lines)
        _jsonl(root / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(TASKS)])
        if version == "v2.1":
            numbered = [{"episode_index": i, "stats": each} for i, each in enumerate(stats)]
            _jsonl(root / "meta/episodes_stats.jsonl", numbered)
        return
    rows = []
    for i, line in enumerate(lines):
        flat = {f"stats/{key}/{name}": v for key, each in stats[i].items() for name, v in each.items()}
        where = {"dataset_from_index": sum(lengths[:i]), "dataset_to_index": sum(lengths[: i + 1])}
        rows.append(places[i] | where | line | flat | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    tasks = pa.table({"task_index": list(range(len(TASKS))), "task": list(TASKS)})
    tasks = tasks.replace_schema_metadata({"pandas": json.dumps({"index_columns": ["task"], "columns": []})})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    (root / "meta/stats.json").write_text(json.dumps(stats[0]))


def _stats(values: NDArray[np.float32]) -> dict[str, list[float]]:
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    return {name: each.astype(float).tolist() for name, each in found.items()} | {"count": [len(values)]}


def _jsonl(path: Path, lines: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
