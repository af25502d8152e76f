"""The official HDF5 layout, read from files written with plain h5py."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from geomcache.cache_schemas.errors import InputError, SourceDamaged
from geomcache.pipeline.official_layout import instruction_of
from geomcache.pipeline.sources.libero_hdf5 import Config, Source
from tests.conftest import LENGTHS, SIDE, TASK, whole, write_demo_file


def test_row_t_pairs_the_observation_before_an_action_with_that_action(demo_file: Path) -> None:
    head, rows = whole(Source(Config(path=demo_file)), 1)
    with h5py.File(demo_file) as file:
        demo = file["data/demo_1"]
        assert len(head) == len(rows) == len(demo["actions"]) - 1
        # obs[j] was recorded after action j, so it is what action j+1 answers to
        np.testing.assert_array_equal(head.actions_TA, demo["actions"][1:].astype(np.float32))
        np.testing.assert_array_equal(rows.states_TS[:, :6], demo["obs/ee_states"][:-1].astype(np.float32))
        # and the stored picture is bottom-up
        np.testing.assert_array_equal(rows.frames.images_BVHWC[3, 0], demo["obs/agentview_rgb"][3][::-1])
        np.testing.assert_array_equal(rows.frames.images_BVHWC[3, 1], demo["obs/eye_in_hand_rgb"][3][::-1])


def test_the_no_noops_regeneration_has_its_observation_before_the_action(tmp_path: Path) -> None:
    """Its files lack the attributes of ``data``; one row more, and row t is (obs[t], actions[t])."""
    path = write_demo_file(tmp_path / "libero_goal_no_noops" / f"{TASK}_demo.hdf5", depth=False)
    with h5py.File(path, "a") as file:
        for name in list(file["data"].attrs):
            del file["data"].attrs[name]
        actions, images = file["data/demo_0/actions"][:], file["data/demo_0/obs/agentview_rgb"][:]
    source = Source(Config(path=path))
    head, rows = whole(source, 0)
    np.testing.assert_array_equal(head.actions_TA, actions.astype(np.float32))
    np.testing.assert_array_equal(rows.frames.images_BVHWC[:, 0], images[:, ::-1])
    assert (source.details["observation"], head.suite) == ("before_action", "libero_goal")
    assert len(Source(Config(path=path, observation="after_action")).head(0)) == len(head) - 1


def test_a_slice_is_that_part_of_the_whole(demo_file: Path) -> None:
    source = Source(Config(path=demo_file))
    _, rows = whole(source, 1)
    part = source.read(1, 3, 7)
    np.testing.assert_array_equal(part.states_TS, rows.states_TS[3:7])
    for mine, theirs in zip(vars(part.frames).values(), vars(rows.frames).values(), strict=True):
        np.testing.assert_array_equal(mine, theirs[3:7])


def test_depth_is_metric_and_upright_and_matrices_lead_to_the_robot_base(demo_file: Path) -> None:
    frames = whole(Source(Config(path=demo_file)), 0)[1].frames
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
    heads = [source.head(episode) for episode in range(source.episode_count)]
    assert [head.number for head in heads] == list(range(11))
    assert heads[10].where == f"{TASK}_demo.hdf5: data/demo_10"
    assert heads[0].instruction == "pick up the alphabet soup and place it in the basket"
    assert (heads[0].suite, heads[0].task) == ("libero_object", TASK)
    assert instruction_of("LIVING_ROOM_SCENE10_put_the_mug_on_the_plate") == "put the mug on the plate"


def test_depth_is_declared_and_can_be_left_out_but_not_wished_for(tmp_path: Path, demo_file: Path) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5", depth=False)
    source = Source(Config(path=path))
    assert not source.contract.has_depth
    assert whole(source, 0)[1].frames.depth_BVHW is None
    assert [(c.name, c.height) for c in source.contract.cameras] == [
        ("agentview", SIDE),
        ("robot0_eye_in_hand", SIDE),
    ]
    assert source.episode_count == len(LENGTHS)
    with pytest.raises(SourceDamaged, match=r"has no depth(.|\n)*demos --replay"):
        Source(Config(path=path, depth=True))
    flat = Source(Config(path=demo_file, depth=False))
    assert (flat.contract, whole(flat, 0)[1].frames.extrinsics_BV44) == (source.contract, None)


@pytest.mark.parametrize("orientation", ["rot180", "rot90_left"])
def test_images_are_turned_from_the_declared_orientation(tmp_path: Path, orientation: str) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5", depth=False)
    with h5py.File(path, "a") as file:
        images = file["data/demo_0/obs/agentview_rgb"]
        upright = images[:]
        images[:] = upright[:, :, ::-1] if orientation == "rot180" else np.rot90(upright, 1, axes=(1, 2))
    source = Source(Config.model_validate({"path": path, "image_orientation": orientation}))
    np.testing.assert_array_equal(whole(source, 0)[1].frames.images_BVHWC[:, 0], upright[:-1])


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
        elif change == "range":
            file["data/demo_1/actions"][4, 6] = 1.5
        elif change == "gone":
            file["data"].attrs["num_demos"] = 4
        elif change == "kind":
            file["data/demo_1/actions"].attrs["x"] = 1
            del file["data/demo_1/actions"]
            file["data/demo_1/actions"] = np.array([b"a"] * 12)
        elif change == "base":
            file["data/demo_1"].attrs["robot_base_pose"] = np.zeros(16)
        elif change == "near":
            file["data/demo_1"].attrs["depth_near"] = 50.0
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
        ("range", "actions[4, 6] is 1.5, expected -1 to 1"),
        ("kind", "actions are |S1 (12,), expected numbers"),
        ("gone", "4 demonstrations, as the attribute num_demos says"),
        ("base", "robot_base_pose is no rigid transform"),
        ("near", "depth_near 50, depth_far 50"),
        ("size", "obs/agentview_rgb is uint8 (7, 7, 3) a step, expected (28, 28, 3)"),
        ("width", "obs/ee_states is float64 (7,) a step, expected (6,)"),
        ("matrix", "obs/agentview_extrinsics hold NaN"),
        ("flat", "obs/agentview_rgb has 5 steps but there are 9 actions"),
        ("actions", "data/demo_1/actions is missing"),
    ],
)
def test_damage_is_named_by_file_episode_and_field(tmp_path: Path, change: str, named: str) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5")
    _edit(path, change)
    source = Source(Config(path=path))
    with pytest.raises(SourceDamaged) as caught:
        [whole(source, episode) for episode in range(source.episode_count)]
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


def test_only_the_damaged_demonstration_is_refused(tmp_path: Path) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5")
    _edit(path, "camera")  # of the first one, so the conventions come from the second
    source = Source(Config(path=path))
    with pytest.raises(SourceDamaged, match="eye_in_hand_rgb is missing"):
        source.head(0)
    assert [len(whole(source, episode)[1]) for episode in (1, 2)] == [LENGTHS[1] - 1, LENGTHS[2] - 1]


def test_a_truncated_file_is_named_and_the_others_can_be_read(tmp_path: Path) -> None:
    write_demo_file(tmp_path / "a_demo.hdf5")
    path = tmp_path / "b_demo.hdf5"
    path.write_bytes((tmp_path / "a_demo.hdf5").read_bytes()[:5000])
    with pytest.raises(SourceDamaged, match=r"b_demo\.hdf5 cannot be opened"):
        Source(Config(path=path))
    source = Source(Config(path=tmp_path))
    assert len(whole(source, 0)[1]) == LENGTHS[0] - 1
    with pytest.raises(SourceDamaged, match=r"b_demo\.hdf5 cannot be opened"):
        source.head(source.episode_count - 1)


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


def test_unfinished_recordings_under_hidden_names_are_left_alone(tmp_path: Path) -> None:
    write_demo_file(tmp_path / "demos" / f"{TASK}_demo.hdf5")
    write_demo_file(tmp_path / "demos" / f".{TASK}_demo.hdf5.parts" / "attempt_000003.hdf5", seed=4)
    assert Source(Config(path=tmp_path / "demos")).episode_count == len(LENGTHS)


def test_files_of_both_kinds_in_one_folder_each_keep_their_timing(tmp_path: Path) -> None:
    write_demo_file(tmp_path / "a_demo.hdf5")
    with h5py.File(write_demo_file(tmp_path / "b_demo.hdf5", seed=3), "a") as file:
        for name in list(file["data"].attrs):
            del file["data"].attrs[name]
        actions = file["data/demo_0/actions"][:]
    source = Source(Config(path=tmp_path))
    assert [len(source.head(i)) for i in (0, len(LENGTHS))] == [LENGTHS[0] - 1, LENGTHS[0]]
    np.testing.assert_array_equal(source.head(len(LENGTHS)).actions_TA, actions.astype(np.float32))
    assert source.details["observation"] == "after_action, before_action"


@pytest.mark.parametrize("way", ["external storage", "external link", "virtual"])
def test_arrays_that_keep_their_bytes_in_other_files_are_refused(tmp_path: Path, way: str) -> None:
    """A data set from outside must not be able to name files of this machine."""
    path = write_demo_file(tmp_path / "task_demo.hdf5", depth=False)
    shape = (LENGTHS[1], SIDE, SIDE, 3)
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(int(np.prod(shape))))
    with h5py.File(tmp_path / "other.hdf5", "w") as other:
        other["x"] = np.zeros(shape, np.uint8)
    with h5py.File(path, "a") as file:
        obs = file["data/demo_1/obs"]
        del obs["agentview_rgb"]
        if way == "external storage":
            obs.create_dataset("agentview_rgb", shape, np.uint8, external=[(str(secret), 0, secret.stat().st_size)])
        elif way == "external link":
            obs["agentview_rgb"] = h5py.ExternalLink("other.hdf5", "x")
        else:
            layout = h5py.VirtualLayout(shape, np.uint8)
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "x", shape)
            obs.create_virtual_dataset("agentview_rgb", layout)
    with pytest.raises(SourceDamaged, match="bytes in other files"):
        Source(Config(path=path)).head(1)


@pytest.mark.parametrize("rubbish", ["scalar actions", "group of pictures", "num_demos", "data"])
def test_rubbish_is_named_and_not_a_traceback(tmp_path: Path, rubbish: str) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5", depth=False)
    with h5py.File(path, "a") as file:
        if rubbish == "scalar actions":
            del file["data/demo_1/actions"]
            file["data/demo_1/actions"] = 5.0
        elif rubbish == "group of pictures":
            del file["data/demo_0/obs/agentview_rgb"]
            file.create_group("data/demo_0/obs/agentview_rgb")
        elif rubbish == "num_demos":
            file["data"].attrs["num_demos"] = "many"
        else:
            del file["data"]
            file["data"] = np.zeros(3)
    with pytest.raises(SourceDamaged, match=r"task_demo\.hdf5"):
        [whole(source, episode) for source in [Source(Config(path=path))] for episode in range(source.episode_count)]
