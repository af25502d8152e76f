"""LeRobot data sets read row by row: compared with what an independent writer wrote."""

import json
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from geomcache.cache_schemas.errors import ConfigError, InputError, SourceDamaged
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.interfaces import FrameSource
from geomcache.pipeline.sources import _hub
from geomcache.pipeline.sources.lerobot import Config, GripperSign, Source
from tests.lerobot_files import KEYS, LENGTHS, SIDE, TASKS, Recorded, edit_info, write_data_set, write_video

# format, pictures, further settings of the writer; names are those of published sets
SETS = {
    "openpi v2.0": ("v2.0", "png", {"keys": ("image", "wrist_image"), "state_key": "state", "action_key": "actions"}),
    "v2.1 png": ("v2.1", "png", {"keys": ("observation.images.image", "observation.images.wrist_image")}),
    "v2.1 png files": ("v2.1", "beside", {}),
    "v2.1 h264": ("v2.1", "mp4", {"fps": 20}),
    "v3.0 png, a row group an episode": ("v3.0", "png", {}),
    "v3.0 png, one row group": ("v3.0", "png", {"row_group": 1000}),
    "v3.0 png, four rows a group": ("v3.0", "png", {"row_group": 4}),
    "v3.0 h264": ("v3.0", "mp4", {}),
    "v3.0 h264, few keyframes": ("v3.0", "mp4", {"group_of_pictures": 250, "fps": 30}),
    "v3.0 av1": ("v3.0", "mp4", {"codec": "libsvtav1"}),  # LeRobot's default
}
LOSSY = 8.0  # grey levels, mean over a frame; neighbouring frames differ by about 85


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recorded]:
    """Every set, written once."""
    folder = tmp_path_factory.mktemp("lerobot")
    return {
        name: write_data_set(folder / str(i), version, images=images, **settings)  # type: ignore[arg-type]
        for i, (name, (version, images, settings)) in enumerate(SETS.items())
    }


def upright(stored_TVHWC: np.ndarray) -> np.ndarray:
    """What was seen, from the raw buffer (bottom-up) turned by 180 degrees."""
    raw = np.rot90(stored_TVHWC, 2, axes=(2, 3))
    return np.flip(raw, axis=2)


@pytest.mark.parametrize("name", SETS)
def test_every_row_is_what_was_written(name: str, recorded: dict[str, Recorded]) -> None:
    written = recorded[name]
    source = Source(Config(path=written.root))
    assert isinstance(source, FrameSource)
    assert source.episode_count == len(LENGTHS)
    seen = np.concatenate([upright(images) for images in written.images_TVHWC]).astype(int)
    at = 0
    for i, length in enumerate(LENGTHS):
        head, rows = source.head(i), source.read(i, 0, length)
        np.testing.assert_array_equal(head.actions_TA, written.actions_TA[i])
        np.testing.assert_array_equal(rows.states_TS, written.states_TS[i])
        assert (head.number, head.instruction, head.succeeded) == (i, written.instructions[i], None)
        assert head.task == written.instructions[i].replace(" ", "_")
        images = rows.frames.images_BVHWC.astype(int)
        assert images.shape == (length, 2, SIDE, SIDE, 3)
        for t in range(length):
            for v in range(2):  # the nearest of all written frames is this one
                distances = np.abs(seen[:, v] - images[t, v]).mean(axis=(1, 2, 3))
                assert distances.argmin() == at + t
                assert distances.min() <= (LOSSY if "mp4" in SETS[name] else 0.0)
        at += length


@pytest.mark.parametrize("name", SETS)
def test_slices_are_the_whole(name: str, recorded: dict[str, Recorded]) -> None:
    source, length = Source(Config(path=recorded[name].root)), LENGTHS[1]
    whole = source.read(1, 0, length)
    for start in range(length):
        for stop in range(start, length + 1):
            rows = source.read(1, start, stop)
            np.testing.assert_array_equal(rows.frames.images_BVHWC, whole.frames.images_BVHWC[start:stop])
            np.testing.assert_array_equal(rows.states_TS, whole.states_TS[start:stop])


@pytest.mark.parametrize(
    ("name", "form", "images"),
    [
        ("openpi v2.0", "LeRobot v2.0", "png in parquet"),
        ("v2.1 png files", "LeRobot v2.1", "png files"),
        ("v3.0 h264", "LeRobot v3.0", "mp4 h264/yuv420p, lossy, decoded by PyAV"),
        ("v3.0 av1", "LeRobot v3.0", "mp4 av1/yuv420p, lossy, decoded by PyAV"),
    ],
)
def test_a_data_card_learns_format_codec_and_conventions(
    name: str, form: str, images: str, recorded: dict[str, Recorded]
) -> None:
    source = Source(Config(path=recorded[name].root))
    assert source.details["format"] == form
    assert source.details["images"].startswith(images)
    assert source.details["image_orientation"] == "rot180"
    assert source.details["gripper_sign"] == "minus_open_plus_close"
    assert source.details["card_fps"] == "10"
    assert all(isinstance(value, str) for value in source.details.values())
    assert source.contract.camera_names == ("agentview", "robot0_eye_in_hand")
    assert source.contract.image_orientation == "upright"
    assert source.contract.control_rate_hz == 20  # whatever the card says
    assert not source.contract.has_depth


def test_a_gripper_of_0_close_1_open_leaves_as_the_simulator_wants_it(tmp_path: Path) -> None:
    written = write_data_set(tmp_path / "x", gripper="zero_close_one_open")
    source = Source(Config(path=written.root))
    gripper = source.head(0).actions_TA[:, 6]
    assert gripper.tolist() == [1.0] * 4 + [-1.0] * 5  # 0 closes: +1; 1 opens: -1
    np.testing.assert_array_equal(source.head(0).actions_TA[:, :6], written.actions_TA[0][:, :6])
    assert source.details["gripper_sign"] == "zero_close_one_open"
    assert source.contract.gripper_sign == "minus_open_plus_close"


@pytest.mark.parametrize(
    ("stored", "declared", "found"),
    [
        ("minus_open_plus_close", "minus_close_plus_open", [1.0] * 4 + [-1.0] * 5),
        ("zero_close_one_open", "zero_open_one_close", [-1.0] * 4 + [1.0] * 5),
    ],
)
def test_the_other_direction_can_be_declared(tmp_path: Path, stored: str, declared: str, found: list[float]) -> None:
    """Which end of the range opens is not in the values; `pack check` finds it out."""
    written = write_data_set(tmp_path / "x", gripper=stored)
    source = Source(Config.model_validate({"path": written.root, "gripper_sign": declared}))
    assert source.head(0).actions_TA[:, 6].tolist() == found


@pytest.mark.parametrize(
    ("stored", "declared"),
    [("minus_open_plus_close", "zero_close_one_open"), ("zero_close_one_open", "minus_open_plus_close")],
)
def test_a_declared_gripper_sign_must_be_that_of_the_values(tmp_path: Path, stored: str, declared: str) -> None:
    written = write_data_set(tmp_path / "x", gripper=stored)
    right = Source(Config.model_validate({"path": written.root, "gripper_sign": stored}))
    np.testing.assert_array_equal(right.head(1).actions_TA, Source(Config(path=written.root)).head(1).actions_TA)
    with pytest.raises(InputError) as caught:
        Source(Config.model_validate({"path": written.root, "gripper_sign": declared})).head(0)
    assert f"--set source.gripper_sign={stored}" in caught.value.fix


def test_one_episode_without_a_negative_gripper_does_not_change_the_data_sets_sign(tmp_path: Path) -> None:
    """An episode that only ever closes holds the values 1 alone; the other files tell what 1 means."""
    written = write_data_set(tmp_path / "x", "v2.1", lengths=(1, 6))
    assert Source(Config(path=written.root)).head(0).actions_TA[:, 6].tolist() == [1.0]
    alone = write_data_set(tmp_path / "y", "v2.1", lengths=(1,))
    with pytest.raises(InputError, match="is not told by its values"):
        Source(Config(path=alone.root)).head(0)
    signs = [Config(path=alone.root, gripper_sign=sign) for sign in get_args(GripperSign)]
    assert [Source(config).head(0).actions_TA[0, 6] for config in signs] == [1.0, -1.0, -1.0, 1.0]
    assert len({Source(config).revision for config in signs}) == len(signs)


def test_a_state_with_a_quaternion_becomes_the_contracts_layout(tmp_path: Path) -> None:
    written = write_data_set(tmp_path / "x", state_width=9)
    states_TS = Source(Config(path=written.root)).read(2, 0, LENGTHS[2]).states_TS.astype(np.float64)
    stored_TS = written.states_TS[2].astype(np.float64)
    np.testing.assert_array_equal(states_TS[:, :3], stored_TS[:, 2:5])
    np.testing.assert_array_equal(states_TS[:, 6:], stored_TS[:, :2])
    angle = np.linalg.norm(states_TS[:, 3:6], axis=1, keepdims=True)  # back to x y z w by its definition
    again = np.concatenate([states_TS[:, 3:6] / angle * np.sin(angle / 2), np.cos(angle / 2)], axis=1)
    np.testing.assert_allclose(again, stored_TS[:, 5:], atol=1e-5)
    with pytest.raises(InputError, match="is of another shape"):
        Source(Config(path=written.root, state_layout="eef_pos3+eef_axisangle3+gripper_qpos2"))


@pytest.mark.parametrize("orientation", ["upright", "bottom_up", "rot90_left"])
def test_another_declared_orientation_is_followed(tmp_path: Path, orientation: str) -> None:
    written = write_data_set(tmp_path / "x", lengths=(3,), size=(24, 32))
    source = Source(Config.model_validate({"path": written.root, "image_orientation": orientation}))
    told = [(camera.height, camera.width) for camera in source.contract.cameras]
    assert told == [(32, 24) if orientation == "rot90_left" else (24, 32)] * 2
    stored = written.images_TVHWC[0]
    back = {"upright": stored, "bottom_up": stored[:, :, ::-1], "rot90_left": np.rot90(stored, -1, axes=(2, 3))}
    np.testing.assert_array_equal(source.read(0, 0, 3).frames.images_BVHWC, back[orientation])


def test_cameras_by_name_are_the_views_in_the_simulators_order(tmp_path: Path) -> None:
    written = write_data_set(tmp_path / "x", lengths=(3,), keys=("observation.images.hand", "observation.images.front"))
    with pytest.raises(InputError) as caught:
        Source(Config(path=written.root))
    assert caught.value.found == "observation.images.hand, observation.images.front"
    assert "--set source.cameras.agentview=KEY --set source.cameras.robot0_eye_in_hand=KEY" in caught.value.fix
    views = {"robot0_eye_in_hand": "observation.images.hand", "agentview": "observation.images.front"}
    source = Source(parse_config(Config, {"path": written.root, "cameras": views}, "source"))
    assert source.contract.camera_names == ("agentview", "robot0_eye_in_hand")
    np.testing.assert_array_equal(source.read(0, 0, 3).frames.images_BVHWC, upright(written.images_TVHWC[0][:, [1, 0]]))
    one = Source(Config(path=written.root, cameras={"agentview": "observation.images.front"}))
    assert one.read(0, 1, 2).frames.images_BVHWC.shape == (1, 1, SIDE, SIDE, 3)
    for wrong in ({"eye_in_hand": "a"}, {}, {"agentview": "a", "sideview": "a"}):
        with pytest.raises(ConfigError):
            parse_config(Config, {"path": written.root, "cameras": wrong}, "source")
    with pytest.raises(InputError, match="there is no image feature observation"):
        Source(Config(path=written.root, cameras={"agentview": "observation.images.side"}))


@pytest.mark.parametrize(
    ("column", "values", "succeeded"),
    [
        ("next.success", [[False, False, True], [False, False, False]], [True, False]),
        ("next.reward", [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [True, False]),
        ("next.done", [[False, False, True], [False, False, True]], [None, None]),  # ended, which is not success
    ],
)
def test_success_is_what_the_data_say(
    tmp_path: Path, column: str, values: list[list[float]], succeeded: list[bool | None]
) -> None:
    written = write_data_set(tmp_path / "x", lengths=(3, 3), extra={column: values})
    source = Source(Config(path=written.root))
    assert [source.head(i).succeeded for i in range(2)] == succeeded
    assert source.details["success"].startswith("not stated" if succeeded == [None, None] else column)


def test_the_revision_follows_bytes_and_reading(tmp_path: Path) -> None:
    written = write_data_set(tmp_path / "x", images="mp4", lengths=(4, 4))
    first = Source(Config(path=written.root)).revision
    assert Source(Config(path=write_data_set(tmp_path / "y", images="mp4", lengths=(4, 4)).root)).revision == first
    declared = Config(
        path=written.root, gripper_sign="minus_open_plus_close", state_key="observation.state", suite="unknown"
    )
    assert Source(declared).revision == first  # what was found, said aloud
    assert Source(Config(path=written.root, image_orientation="upright")).revision != first
    one = Source(Config(path=written.root, cameras={"agentview": "observation.images.image"}))
    assert one.revision != first
    (written.root / "README.md").write_text("another card")
    assert Source(Config(path=written.root)).revision == first
    video = next(written.root.rglob("*image2/**/*.mp4"))
    write_video(video, [images[:, 0] for images in written.images_TVHWC])
    assert Source(Config(path=written.root)).revision != first
    assert one.revision == Source(one.config).revision  # that camera is not read
    video.unlink()
    assert Source(Config(path=written.root)).revision != first


def test_only_the_pictures_asked_for_are_read(tmp_path: Path) -> None:
    """A corrupt picture hurts the rows that need it, no others: nothing else was decoded."""
    written = write_data_set(tmp_path / "x", "v2.1", images="beside", lengths=(6,))
    for picture in written.root.rglob("frame_000004.png"):
        picture.unlink()
    source = Source(Config(path=written.root))
    assert len(source.head(0)) == 6
    assert len(source.read(0, 0, 4)) == 4
    assert len(source.read(0, 5, 6)) == 1
    with pytest.raises(SourceDamaged, match=r"episode 0: observation\.images\.image cannot be used"):
        source.read(0, 3, 5)


@pytest.mark.parametrize(
    ("folder", "suite"),
    [("libero_10_no_noops_1.0.0_lerobot", "libero_10"), ("libero_object", "libero_object"), ("libero", "unknown")],
)
def test_the_suite_is_named_by_the_data_set(tmp_path: Path, folder: str, suite: str) -> None:
    written = write_data_set(tmp_path / folder, lengths=(2,))
    source = Source(Config(path=written.root, cameras={"agentview": "observation.images.image"}))
    assert (source.head(0).suite, source.location) == (suite, folder)
    assert Source(Config(path=written.root, suite="libero_goal")).head(0).suite == "libero_goal"
    assert source.head(0).where == "data/chunk-000/file-000.parquet: episode 0"
    assert source.head(0).instruction == TASKS[0]


def test_a_hub_snapshot_is_read_and_called_by_its_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--owner--libero_goal/snapshots" / ("a" * 40)
    written = write_data_set(snapshot, lengths=(2,))
    source = Source(Config(path=written.root))
    assert source.location == "owner/libero_goal" == _hub.location_of(snapshot)
    assert source.head(0).suite == "libero_goal"


def test_older_and_stranger_cards_are_read_too(tmp_path: Path) -> None:
    """Channels first, the index column pandas names itself, several tables of episodes, chunks of other sizes."""
    written = write_data_set(tmp_path / "x", lengths=(3, 3, 3))
    image = {"dtype": "image", "shape": [3, SIDE, SIDE], "names": ["channels", "height", "width"]}
    edit_info(written.root, **{"features__observation.images.image": image})
    tasks = pq.read_table(written.root / "meta/tasks.parquet").rename_columns(["task_index", "__index_level_0__"])
    pq.write_table(tasks, written.root / "meta/tasks.parquet")
    folder = written.root / "meta/episodes/chunk-000"
    table = pq.read_table(folder / "file-000.parquet")
    pq.write_table(table.slice(0, 1), folder / "file-000.parquet")
    pq.write_table(table.slice(1), folder / "file-001.parquet")
    source = Source(Config(path=written.root))
    for i in range(3):
        assert source.head(i).instruction == written.instructions[i]
        np.testing.assert_array_equal(source.read(i, 0, 3).frames.images_BVHWC, upright(written.images_TVHWC[i]))
    chunked = write_data_set(tmp_path / "y", "v2.1", lengths=(2, 2))
    edit_info(chunked.root, chunks_size=1)
    (chunked.root / "data/chunk-001").mkdir()
    moved = chunked.root / "data/chunk-000/episode_000001.parquet"
    moved.rename(chunked.root / "data/chunk-001" / moved.name)
    assert len(Source(Config(path=chunked.root)).head(1)) == 2
    assert json.loads((chunked.root / "meta/info.json").read_text())["chunks_size"] == 1


def test_a_videos_colours_are_those_of_lerobots_own_decoder(recorded: dict[str, Recorded]) -> None:
    root = recorded["v2.1 h264"].root
    with av.open(str(root / f"videos/chunk-000/{KEYS[0]}/episode_000000.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    images = Source(Config(path=root)).read(0, 0, LENGTHS[0]).frames.images_BVHWC
    np.testing.assert_array_equal(images[:, 0], decoded[:, :, ::-1])
