"""Damaged LeRobot data sets: named by file, episode and field; the other episodes stay readable."""

import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from geomcache.cache_schemas.errors import GeomcacheError, InputError, SourceDamaged
from geomcache.pipeline.sources.lerobot import Config, Source
from tests.lerobot_files import KEYS, LENGTHS, SIDE, edit_info, edit_table, png, write_data_set, write_video

BAD = 1  # the episode that is damaged, with its own files in v2.1
DATA = f"data/chunk-000/episode_{BAD:06d}.parquet"
VIDEO = f"videos/chunk-000/{KEYS[1]}/episode_{BAD:06d}.mp4"
V3_DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def problem_of(root: Path, bad: int = BAD) -> SourceDamaged:
    """The error of one episode; every other one is read whole."""
    source = Source(Config(path=root))
    for i in range(source.episode_count):
        if i != bad:
            assert len(source.read(i, 0, len(source.head(i)))) == len(source.head(i))
    with pytest.raises(SourceDamaged) as caught:
        source.read(bad, 0, len(source.head(bad)))
    assert f"episode {bad}" in caught.value.what
    assert caught.value.fix
    return caught.value


def truncate(root: Path, name: str, keep: float) -> None:
    raw = (root / name).read_bytes()
    (root / name).write_bytes(raw[: int(len(raw) * keep)])


def zero_middle(root: Path, name: str) -> None:
    raw = bytearray((root / name).read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 400] = bytes(400)
    (root / name).write_bytes(raw)


def picture(image: np.ndarray) -> dict[str, Any]:
    return {"bytes": png(image), "path": "frame.png"}


def flipped_png() -> dict[str, Any]:
    """One bit of the compressed pixels is wrong such that Pillow shows another picture without a word."""
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    whole = png(image)
    for at in range(len(whole) - 20, whole.index(b"IDAT") + 4, -1):
        raw = bytearray(whole)
        raw[at] ^= 1
        with suppress(OSError, SyntaxError):
            if (np.asarray(Image.open(io.BytesIO(raw))) != image).any():
                return {"bytes": bytes(raw), "path": "frame.png"}
    raise AssertionError("Pillow sees every flipped bit now")


def retype(root: Path, column: str, kind: pa.DataType) -> None:
    table = pq.read_table(root / DATA)
    values = [None] * len(table) if pa.types.is_binary(kind) else np.zeros((len(table), 7), int).tolist()
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, column, pa.array(values, kind)), root / DATA)


Change = Callable[[Path], object]
GREY = np.zeros((SIDE, SIDE), np.uint8)
SMALL = np.zeros((SIDE // 2, SIDE, 3), np.uint8)
IN_PARQUET: dict[str, tuple[Change, str, str]] = {  # change, field, what was found
    "missing file": (lambda root: (root / DATA).unlink(), "file", "no such file"),
    "truncated": (lambda root: truncate(root, DATA, 0.6), "file", "footer"),
    "empty": (lambda root: truncate(root, DATA, 0.0), "file", "size is 0 bytes"),
    "missing column": (lambda root: edit_table(root / DATA, "action", 0, ...), "action", "frame_index"),
    "nan in action": (
        lambda root: edit_table(root / DATA, "action", 2, [0.0] * 6 + [np.nan]),
        "action",
        "nan at row 2",
    ),
    "nan in state": (
        lambda root: edit_table(root / DATA, "observation.state", 3, [np.inf] + [0.0] * 7),
        "observation.state",
        "inf at row 3, number 0",
    ),
    "action beyond 1": (lambda root: edit_table(root / DATA, "action", 1, [1.5] + [0.0] * 6), "action", "1.5 at row 1"),
    "joints as state": (
        lambda root: edit_table(root / DATA, "observation.state", 0, [0.0] * 6 + [0.8, 0.0]),
        "observation.state as eef_pos3",
        "0.8",
    ),
    "null action": (lambda root: edit_table(root / DATA, "action", 1, None), "action", ""),
    "integers": (lambda root: retype(root, "action", pa.list_(pa.int64())), "action", "list<"),
    "bytes without path": (lambda root: retype(root, KEYS[0], pa.binary()), KEYS[0], "binary"),
    "frame twice": (lambda root: edit_table(root / DATA, "frame_index", 3, 2), "frame_index", "2"),
    "row of another": (lambda root: edit_table(root / DATA, "episode_index", 5, 2), "rows", "5"),
    "two tasks": (lambda root: edit_table(root / DATA, "task_index", 0, 0), "task_index", "0, 1"),
    "corrupt png": (lambda root: edit_table(root / DATA, KEYS[0], 4, flipped_png()), KEYS[0], "row 4"),
    "no png": (lambda root: edit_table(root / DATA, KEYS[0], 4, {"bytes": b"GIF", "path": None}), KEYS[0], "row 4"),
    "grey": (lambda root: edit_table(root / DATA, KEYS[1], 0, picture(GREY)), KEYS[1], "32 x 32 L at row 0"),
    "depth": (lambda root: edit_table(root / DATA, KEYS[1], 0, picture(GREY.astype(np.uint16))), KEYS[1], "32 I;16"),
    "another size": (lambda root: edit_table(root / DATA, KEYS[1], 2, picture(SMALL)), KEYS[1], "16 x 32 RGB at row 2"),
    "null picture": (lambda root: edit_table(root / DATA, KEYS[0], 1, None), KEYS[0], "neither at row 1"),
    "absolute path": (
        lambda root: edit_table(root / DATA, KEYS[0], 1, {"bytes": None, "path": str(root / "x.png")}),
        KEYS[0],
        "x.png at row 1",
    ),
    "path outside": (
        lambda root: edit_table(root / DATA, KEYS[0], 1, {"bytes": None, "path": "images/../../x.png"}),
        KEYS[0],
        "images/../../x.png",
    ),
    "path to nothing": (
        lambda root: edit_table(root / DATA, KEYS[0], 1, {"bytes": None, "path": "images/x.png"}),
        KEYS[0],
        "No such file",
    ),
}


@pytest.mark.parametrize("name", IN_PARQUET)
def test_damage_in_parquet_is_one_episodes(tmp_path: Path, name: str) -> None:
    root = write_data_set(tmp_path / "x", "v2.1").root
    change, field, found = IN_PARQUET[name]
    change(root)
    problem = problem_of(root)
    assert f"{root / DATA}: episode {BAD}: {field}" in problem.what
    assert found in problem.found


def shorter_video(root: Path) -> None:
    write_video(root / VIDEO, [np.zeros((LENGTHS[BAD] - 1, SIDE, SIDE, 3), np.uint8)])


def other_rate(root: Path) -> None:
    write_video(root / VIDEO, [np.zeros((2 * LENGTHS[BAD], SIDE, SIDE, 3), np.uint8)], fps=20)


def smaller_video(root: Path) -> None:
    write_video(root / VIDEO, [np.zeros((LENGTHS[BAD], SIDE, SIDE // 2, 3), np.uint8)])


def grey_video(root: Path) -> None:
    """As LeRobot stores depth; FFmpeg decodes a grey h264 as colour."""
    write_video(root / VIDEO, [np.zeros((LENGTHS[BAD], SIDE, SIDE, 3), np.uint8)], codec="libx265", pixels="gray12le")


IN_MP4: dict[str, tuple[Change, str]] = {
    "missing file": (lambda root: (root / VIDEO).unlink(), "no such file"),
    "truncated": (lambda root: truncate(root, VIDEO, 0.7), "Invalid data"),
    "no video": (lambda root: (root / VIDEO).write_bytes(b"MP4?" * 100), "Invalid data"),
    "zeroed": (lambda root: zero_middle(root, VIDEO), ""),
    "fewer frames": (shorter_video, f"no frame for row {LENGTHS[BAD] - 1}"),
    "another rate": (other_rate, "a frame at"),
    "another size": (smaller_video, "32 x 16"),
    "grey": (grey_video, "pixel format gray"),
}


@pytest.mark.parametrize("name", IN_MP4)
def test_damage_in_a_video_is_one_episodes(tmp_path: Path, name: str) -> None:
    root = write_data_set(tmp_path / "x", "v2.1", images="mp4").root
    change, found = IN_MP4[name]
    change(root)
    problem = problem_of(root)
    assert f"{root / VIDEO}: episode {BAD}: {KEYS[1]}" in problem.what
    assert found in problem.found


def test_pictures_that_ffmpeg_conceals_are_refused(tmp_path: Path) -> None:
    """Wherever FFmpeg itself marks a picture as damaged, though it hands one out."""
    root = write_data_set(tmp_path / "x", "v2.1", images="mp4").root
    raw = (root / VIDEO).read_bytes()
    source, marked = Source(Config(path=root)), 0
    for at in range(raw.index(b"mdat") + 100, len(raw) - 60, 60):
        (root / VIDEO).write_bytes(raw[:at] + bytes(50) + raw[at + 50 :])
        with suppress(av.FFmpegError), av.open(str(root / VIDEO)) as container:
            if any(frame.is_corrupt for frame in container.decode(video=0)):
                marked += 1
                with pytest.raises(SourceDamaged, match=f"episode {BAD}"):
                    source.read(BAD, 0, LENGTHS[BAD])
    assert marked > 1


def test_an_episode_shorter_in_its_video_does_not_show_the_next_ones_frames(tmp_path: Path) -> None:
    """v3.0 keeps episodes one after another: row 9 of a video of 8 frames would be the next episode's first."""
    root = write_data_set(tmp_path / "x", images="mp4", lengths=(8, 8)).root
    edit_table(root / EPISODES, f"videos/{KEYS[0]}/to_timestamp", 0, 0.7)
    problem = problem_of(root, bad=0)
    assert (problem.expected, problem.found) == ("8 frames", "7.00 frames, from 0 to 0.7 s")


def test_a_video_place_half_a_frame_off_is_refused(tmp_path: Path) -> None:
    root = write_data_set(tmp_path / "x", images="mp4", lengths=(4, 4)).root
    edit_table(root / EPISODES, f"videos/{KEYS[0]}/from_timestamp", 1, 0.44)  # 0.04 s late at 10 frames a second
    assert "a frame at" in problem_of(root).found
    edit_table(root / EPISODES, f"videos/{KEYS[0]}/from_timestamp", 1, 0.401)  # the drift of summed durations
    source = Source(Config(path=root))
    assert len(source.read(1, 0, len(source.head(1)))) == 4


def test_fewer_rows_than_meta_says(tmp_path: Path) -> None:
    root = write_data_set(tmp_path / "x").root
    edit_table(root / EPISODES, "length", BAD, LENGTHS[BAD] + 1)
    problem = problem_of(root)
    assert f"{root / V3_DATA}: episode {BAD}: rows" in problem.what
    assert (problem.expected, problem.found) == ("7 rows, as meta says", "6")


def test_a_truncated_file_of_v3_takes_its_episodes_only(tmp_path: Path) -> None:
    root = write_data_set(tmp_path / "x").root  # episodes 0 and 1 in file 0, 2 in file 1
    truncate(root, V3_DATA, 0.5)
    source = Source(Config(path=root))
    for bad in (0, 1):
        with pytest.raises(SourceDamaged, match=f"file-000.parquet: episode {bad}: file cannot be used"):
            source.head(bad)
    assert len(source.read(2, 0, 3)) == 3
    assert source.details["images"] == "png in parquet"


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("change", ["gap", "too few", "twice", "beyond"])
def test_episodes_that_meta_contradicts(tmp_path: Path, version: str, change: str) -> None:
    root = write_data_set(tmp_path / "x", version).root
    numbers = {"gap": [0, 2], "too few": [0, 1, 2], "twice": [0, 1, 1, 2], "beyond": [0, 1, 2]}[change]
    if change in ("too few", "beyond"):
        edit_info(root, total_episodes={"too few": 4, "beyond": 2}[change])
    if version == "v3.0":
        pq.write_table(pq.read_table(root / EPISODES).take(numbers), root / EPISODES)
    else:
        lines = (root / "meta/episodes.jsonl").read_text().splitlines()
        (root / "meta/episodes.jsonl").write_text("\n".join(lines[number] for number in numbers))
    bad = {"gap": 1, "too few": 3, "twice": 1, "beyond": 2}[change]
    assert Source(Config(path=root)).episode_count == (4 if change == "too few" else 3)
    assert "meta/episodes" in problem_of(root, bad).what


def test_a_null_in_the_table_of_episodes_is_one_episodes(tmp_path: Path) -> None:
    root = write_data_set(tmp_path / "x").root
    edit_table(root / EPISODES, "data/file_index", BAD, None)
    assert f"episode {BAD}: data/file_index" in problem_of(root).what


def drop_line(root: Path) -> None:
    (root / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 9}\n{"episode_index": 1, "len\n')


WHOLE: dict[str, tuple[str, Change, type[GeomcacheError], str]] = {  # version, change, error, words
    "no info": ("v2.1", lambda root: (root / "meta/info.json").unlink(), InputError, "is no LeRobot data set"),
    "broken info": ("v2.1", lambda root: (root / "meta/info.json").write_text("{"), SourceDamaged, "info.json"),
    "info without fps": ("v3.0", lambda root: edit_info(root, fps=None), SourceDamaged, "info.json: field fps"),
    "fps of 0": ("v3.0", lambda root: edit_info(root, fps=0), SourceDamaged, "info.json: field fps"),
    "v1.6": ("v2.1", lambda root: edit_info(root, codebase_version="v1.6"), InputError, "v1.6 is not supported"),
    "v4.0": ("v3.0", lambda root: edit_info(root, codebase_version="v4.0"), InputError, "v4.0 is not supported"),
    "no tasks": ("v2.1", lambda root: (root / "meta/tasks.jsonl").unlink(), SourceDamaged, "tasks.jsonl: file"),
    "broken line": ("v2.1", drop_line, SourceDamaged, "episodes.jsonl: line 2"),
    "no tasks v3": ("v3.0", lambda root: (root / "meta/tasks.parquet").unlink(), SourceDamaged, "tasks.parquet: file"),
    "broken table": ("v3.0", lambda root: truncate(root, EPISODES, 0.5), SourceDamaged, f"{EPISODES}: file"),
    "no table": ("v3.0", lambda root: (root / EPISODES).unlink(), SourceDamaged, "table of episodes"),
    "no length": (
        "v3.0",
        lambda root: edit_table(root / EPISODES, "length", 0, ...),
        SourceDamaged,
        f"{EPISODES}: length",
    ),
    "path outside": ("v3.0", lambda root: edit_info(root, data_path="../{file_index}"), SourceDamaged, "data_path"),
    "path of others": ("v2.1", lambda root: edit_info(root, data_path="{chunk_index}"), SourceDamaged, "data_path"),
    "no episodes": ("v2.1", lambda root: empty(root), InputError, "holds no episodes"),
    "grey feature": (
        "v3.0",
        lambda root: edit_info(root, **{f"features__{KEYS[0]}__shape": [SIDE, SIDE, 1]}),
        InputError,
        f"{KEYS[0]} is no colour camera",
    ),
    "depth feature": (
        "v3.0",
        lambda root: edit_info(root, **{f"features__{KEYS[0]}__info": {"video.is_depth_map": True}}),
        InputError,
        f"{KEYS[0]} is no colour camera",
    ),
    "six joints": (
        "v3.0",
        lambda root: edit_info(root, **{"features__observation.state__shape": [6]}),
        InputError,
        "observation.state is of another shape",
    ),
    "wide action": (
        "v3.0",
        lambda root: edit_info(root, features__action__shape=[8]),
        InputError,
        "action is of another",
    ),
}


def empty(root: Path) -> None:
    edit_info(root, total_episodes=0)
    (root / "meta/episodes.jsonl").write_text("")


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_wrong_with_a_whole_data_set_is_said_at_once(tmp_path: Path, name: str) -> None:
    version, change, error, words = WHOLE[name]
    root = write_data_set(tmp_path / "x", version, lengths=(3,)).root
    change(root)
    with pytest.raises(error) as caught:
        Source(Config(path=root))
    assert words in caught.value.what
    assert caught.value.expected


def test_video_features_without_a_video_path_are_named(tmp_path: Path) -> None:
    root = write_data_set(tmp_path / "x", images="mp4", lengths=(3,)).root
    edit_info(root, video_path=None)
    with pytest.raises(SourceDamaged, match="video_path"):
        Source(Config(path=root))


def test_a_state_that_is_no_feature_is_answered_with_the_setting(tmp_path: Path) -> None:
    root = write_data_set(tmp_path / "x", lengths=(3,), state_key="observation.joints").root
    with pytest.raises(InputError) as caught:
        Source(Config(path=root))
    assert "observation.joints" in caught.value.found
    assert caught.value.fix == "--set source.state_key=KEY"
    assert len(Source(Config(path=root, state_key="observation.joints")).head(0)) == 3
    told = json.loads((root / "meta/info.json").read_text())["features"]
    assert "observation.joints" in told
