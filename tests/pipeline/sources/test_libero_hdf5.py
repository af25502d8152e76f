"""The official HDF5 layout, read from files written with plain h5py."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from geomcache.cache_schemas.errors import InputError, SourceDamaged
from geomcache.pipeline.official_layout import instruction_of
from geomcache.pipeline.sources.libero_hdf5 import Config, Source
from tests.conftest import LENGTHS, SIDE, TASK, write_demo_file


def test_row_t_pairs_the_observation_before_an_action_with_that_action(demo_file: Path) -> None:
    episodes = list(Source(Config(path=demo_file)).episodes())
    with h5py.File(demo_file) as file:
        demo = file["data/demo_1"]
        assert len(episodes[1]) == len(demo["actions"]) - 1
        # obs[j] was recorded after action j, so it is what action j+1 answers to
        np.testing.assert_array_equal(episodes[1].actions_TA, demo["actions"][1:].astype(np.float32))
        np.testing.assert_array_equal(episodes[1].states_TS[:, :6], demo["obs/ee_states"][:-1].astype(np.float32))
        # and the stored picture is bottom-up
        np.testing.assert_array_equal(episodes[1].frames.images_BVHWC[3, 0], demo["obs/agentview_rgb"][3][::-1])
        np.testing.assert_array_equal(episodes[1].frames.images_BVHWC[3, 1], demo["obs/eye_in_hand_rgb"][3][::-1])


def test_depth_is_metric_and_upright_and_matrices_lead_to_the_robot_base(demo_file: Path) -> None:
    frames = next(Source(Config(path=demo_file)).episodes()).frames
    assert frames.depth_BVHW is not None
    assert frames.extrinsics_BV44 is not None
    with h5py.File(demo_file) as file:
        z = file["data/demo_0/obs/agentview_depth"][2][::-1, :, 0].astype(np.float64)
    near, far = 0.01, 50.0
    ndc = 2.0 * z - 1.0  # the textbook perspective inversion, another form of the same formula
    np.testing.assert_allclose(frames.depth_BVHW[2, 0], 2 * near * far / (far + near - ndc * (far - near)), rtol=1e-5)
    np.testing.assert_allclose(frames.extrinsics_BV44[0, 0, :3, 3], [0.66, 0.0, -0.9])


def test_demonstrations_are_ordered_by_number_and_the_instruction_is_the_tasks_name(tmp_path: Path) -> None:
    source = Source(Config(path=write_demo_file(tmp_path / f"{TASK}_demo.hdf5", lengths=(3,) * 11)))
    episodes = list(source.episodes())
    assert [episode.episode for episode in episodes] == list(range(11))
    assert episodes[0].instruction == "pick up the alphabet soup and place it in the basket"
    assert (episodes[0].suite, episodes[0].task) == ("libero_object", TASK)
    assert instruction_of("LIVING_ROOM_SCENE10_put_the_mug_on_the_plate") == "put the mug on the plate"


def test_a_file_without_depth_says_so(tmp_path: Path) -> None:
    source = Source(Config(path=write_demo_file(tmp_path / "task_demo.hdf5", depth=False)))
    assert not source.contract.has_depth
    assert next(source.episodes()).frames.depth_BVHW is None
    assert [(c.name, c.height) for c in source.contract.cameras] == [
        ("agentview", SIDE),
        ("robot0_eye_in_hand", SIDE),
    ]
    assert source.episode_count == len(LENGTHS)


def test_the_revision_follows_the_bytes(tmp_path: Path, demo_file: Path) -> None:
    again = write_demo_file(tmp_path / demo_file.name)
    other = write_demo_file(tmp_path / "other_demo.hdf5", seed=1)
    assert Source(Config(path=other)).revision != Source(Config(path=demo_file)).revision
    assert Source(Config(path=demo_file)).revision != Source(Config(path=demo_file, cameras=("agentview",))).revision
    assert again.name == demo_file.name


def _edit(path: Path, change: str) -> None:
    with h5py.File(path, "a") as file:
        obs = file["data/demo_1/obs"]
        if change == "camera":
            del file["data/demo_0/obs/eye_in_hand_rgb"]
        elif change == "short":
            del obs["ee_states"]
            obs["ee_states"] = np.zeros((3, 6))
        elif change == "nan":
            file["data/demo_1/actions"][2, 1] = np.nan
        elif change == "size":
            del obs["agentview_rgb"]
            obs["agentview_rgb"] = np.zeros((LENGTHS[1], 7, 7, 3), np.uint8)
        elif change == "actions":
            del file["data/demo_1/actions"]
        elif change == "width":
            del obs["ee_states"]
            obs["ee_states"] = np.zeros((LENGTHS[1], 7))
        elif change == "matrix":
            obs["agentview_extrinsics"][4, 0, 0] = np.nan
        elif change == "flat":
            del file["data/demo_0/obs/agentview_rgb"]
            file["data/demo_0/obs/agentview_rgb"] = np.zeros(5, np.uint8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("camera", "eye_in_hand_rgb is missing"),
        ("short", "obs/ee_states has 3 steps but there are 12 actions"),
        ("nan", "actions hold NaN"),
        ("size", "obs/agentview_rgb is uint8 (7, 7, 3) a step, expected (28, 28, 3)"),
        ("width", "obs/ee_states is float64 (7,) a step, expected (6,)"),
        ("matrix", "obs/agentview_extrinsics hold NaN"),
        ("flat", "expected (T, H, W, 3)"),
        ("actions", "/data/demo_1/actions is missing"),
    ],
)
def test_damage_is_named_by_file_episode_and_field(tmp_path: Path, change: str, named: str) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5")
    _edit(path, change)
    with pytest.raises(SourceDamaged) as caught:
        list(Source(Config(path=path)).episodes())
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SourceDamaged, match=r"task_demo\.hdf5 cannot be opened"):
        Source(Config(path=path))


@pytest.mark.parametrize("make", ["missing", "empty folder", "no demonstrations"])
def test_an_empty_source_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "source"
    if make == "empty folder":
        path.mkdir()
    elif make == "no demonstrations":
        path = write_demo_file(tmp_path / "x_demo.hdf5", lengths=())
    with pytest.raises(InputError) as caught:
        Source(Config(path=path))
    assert "geomcache demos" in str(caught.value)


def test_the_files_short_camera_name_is_refused_and_other_groups_are_left_alone(tmp_path: Path) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5")
    with pytest.raises(ValueError, match="say robot0_eye_in_hand"):
        Config(path=path, cameras=("agentview", "eye_in_hand"))
    with h5py.File(path, "a") as file:
        file["data/mask"] = np.zeros(3)
    assert Source(Config(path=path)).episode_count == len(LENGTHS)
