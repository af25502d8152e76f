"""One real episode: solved by the expert, recorded, read back with plain h5py, replayed."""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.camera_geometry import inverse_pose, metric_depth
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.sim import demo_file, recorder, suites
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.recorder import Config, EpisodeReport, RecordSummary, record
from tests.conftest import build_pack_at
from tests.pipeline.sim.objects_seen import ObjectsSeen

pytestmark = pytest.mark.sim

CONFIG = Config(
    suite="libero_object",
    tasks=(0,),
    episodes=1,
    first_init_state=1,
    seed=5,
    noise=0.05,
    height=128,
    width=128,
)
Recording = tuple[Path, RecordSummary, list[EpisodeReport]]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    reports: list[EpisodeReport] = []
    out = tmp_path_factory.mktemp("recorded")
    written = demo_file.write_part

    def write_and_copy(path: Path, config: Config, task: suites.TaskInfo, demo: demo_file.Demo) -> None:
        written(path, config, task, demo)
        shutil.copytree(path.with_name(f".{path.name}.parts"), out.with_name("parts"))

    with pytest.MonkeyPatch.context() as patch:  # parts as they stand when a run is stopped before joining them
        patch.setattr(demo_file, "write_part", write_and_copy)
        summary = record(CONFIG, out, reports.append)
    return out, summary, reports


def demo_of(file: Any) -> Any:
    return file["data/demo_0"]


def test_the_expert_solves_the_episode(recording: Recording) -> None:
    out, summary, reports = recording
    assert (summary.attempted, summary.succeeded, summary.failed) == (1, 1, 0)
    assert [report.succeeded for report in reports] == [True]
    assert summary.files == (out / "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo.hdf5",)
    assert 80 < summary.frames <= 280
    assert [path.name for path in out.iterdir()] == [summary.files[0].name]  # no temporary file is left


def test_the_file_has_libero_fields(recording: Recording) -> None:
    _, summary, _ = recording
    with h5py.File(summary.files[0], "r") as file:
        data, demo = file["data"].attrs, demo_of(file)
        problem = json.loads(data["problem_info"])
        assert problem["language_instruction"]
        assert data["instruction"] == "pick up the alphabet soup and place it in the basket"
        assert json.loads(data["env_args"])["env_kwargs"]["camera_heights"] == 128
        assert data["bddl_file_name"].startswith("libero/libero/bddl_files/libero_object/")
        assert (data["num_demos"], data["total"]) == (1, summary.frames)
        assert data["macros_image_convention"] == "opengl"
        assert data["cap_index"] == 0
        steps = demo.attrs["num_samples"]
        shapes = {
            "actions": (7,),
            "actions_executed": (7,),
            "states": (110,),
            "robot_states": (9,),
            "rewards": (),
            "dones": (),
            "obs/ee_states": (6,),
            "obs/ee_pos": (3,),
            "obs/ee_ori": (3,),
            "obs/gripper_states": (2,),
            "obs/joint_states": (7,),
        }
        for camera in ("agentview", "eye_in_hand"):
            shapes[f"obs/{camera}_rgb"] = (128, 128, 3)
            shapes[f"obs/{camera}_depth"] = (128, 128, 1)
            shapes[f"obs/{camera}_intrinsics"] = (3, 3)
            shapes[f"obs/{camera}_extrinsics"] = (4, 4)
        for name, shape in shapes.items():
            assert demo[name].shape == (steps, *shape), name
        assert demo["actions"].dtype == np.float64
        assert demo["obs/agentview_rgb"].dtype == np.uint8
        assert demo["obs/agentview_depth"].dtype == np.float32
        np.testing.assert_array_equal(demo["dones"][:], [0] * (steps - 1) + [1])
        np.testing.assert_array_equal(demo["rewards"][:], demo["dones"][:])
        np.testing.assert_array_equal(demo.attrs["init_state"], demo["states"][0])
        assert demo.attrs["model_file"].startswith("<mujoco")
        assert 'file="/' not in demo.attrs["model_file"]
        assert (demo.attrs["seed"], demo.attrs["init_state_index"], demo.attrs["noise"]) == (5, 1, 0.05)
        assert demo["actions"][-1, 6] == -1.0  # the gripper's opening is in
        assert (demo["actions"][:, 6] == 1.0).any()


def test_timing_states_before_and_observations_after_the_action(recording: Recording, env: LiberoEnv) -> None:
    _, summary, _ = recording
    with h5py.File(summary.files[0], "r") as file:
        demo = demo_of(file)
        states, executed, labels = demo["states"][:], demo["actions_executed"][:], demo["actions"][:]
        images, zbuffers = demo["obs/agentview_rgb"][:], demo["obs/agentview_depth"][:]
        extrinsics, base = demo["obs/eye_in_hand_extrinsics"][:], demo.attrs["robot_base_pose"].reshape(4, 4)
        ee_states, fingers = demo["obs/ee_states"][:], demo["obs/gripper_states"][:]
        near, far = demo.attrs["depth_near"], demo.attrs["depth_far"]
    np.testing.assert_array_equal(executed[0], labels[0])  # the settling no-op carries no noise
    np.testing.assert_array_equal(executed[:, 3:], labels[:, 3:])
    assert np.abs(executed[1:, :3] - labels[1:, :3]).max() > 0.01

    env.reset(5, 1, settle_steps=9)
    for j, action in enumerate(executed):
        np.testing.assert_array_equal(env.flat_state(), states[j])
        success = env.step(action)
        if j in (0, 1, 40, len(executed) - 1):
            seen = env.observe()
            assert seen.frame.depth_BVHW is not None
            assert seen.frame.extrinsics_BV44 is not None
            np.testing.assert_array_equal(seen.frame.images_BVHWC[0, 0], images[j][::-1])
            depth = metric_depth(zbuffers[j][::-1, :, 0], near, far)
            np.testing.assert_array_equal(seen.frame.depth_BVHW[0, 0], depth)
            wrist = inverse_pose(base) @ extrinsics[j]
            np.testing.assert_array_equal(seen.frame.extrinsics_BV44[0, 1], wrist)
            state = np.concatenate([ee_states[j], fingers[j]]).astype(np.float32)
            np.testing.assert_array_equal(seen.state_S, state)
    assert success


def test_a_packed_frame_shows_objects_where_they_are(recording: Recording, env: LiberoEnv, tmp_path: Path) -> None:
    """Its depth, unprojected with its matrices, lies in the objects' boxes; the mirror image's does not."""
    out, summary, _ = recording
    row = 30
    with PackReader(build_pack_at(out, tmp_path / "pack", 64)) as pack, h5py.File(summary.files[0], "r") as file:
        frames = pack.frames([row])
        executed = demo_of(file)["actions_executed"][:]
    assert frames.depth_BVHW is not None
    assert frames.intrinsics_BV33 is not None
    assert frames.extrinsics_BV44 is not None
    env.reset(5, 1, settle_steps=9)
    for action in executed[: row + 1]:
        env.step(action)
    seen = ObjectsSeen(
        env,
        frames.depth_BVHW[0, 0],
        env.segment("agentview"),
        frames.intrinsics_BV33[0, 0],
        env.robot_base_pose() @ frames.extrinsics_BV44[0, 0],
    )
    movable = env.simulator.objects_dict
    large = [name for name in movable if seen.pixels(name).sum() > 20 and seen.mirrored().pixels(name).sum() > 20]
    assert len(large) >= 2
    assert min(seen.fraction_in_box(name) for name in large) >= 0.99
    mirrored = [seen.mirrored().fraction_in_box(name) for name in large]
    assert max(mirrored) < 0.5  # an object near the mirror's axis keeps a quarter of its pixels
    assert min(mirrored) < 0.01


def test_a_finished_file_is_kept_and_another_recording_refused(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, first, _ = recording
    monkeypatch.setattr(recorder, "LiberoEnv", None)  # nothing may be simulated
    again = record(CONFIG, out)
    assert (again.attempted, again.files, again.skipped) == (0, first.files, first.files)
    with pytest.raises(InputError, match="another recorder configuration"):
        record(CONFIG.model_copy(update={"seed": 6}), out)
    (tmp_path / first.files[0].name).write_text("something")
    with pytest.raises(InputError, match="did not write"):
        record(CONFIG, tmp_path)


def test_a_stopped_recording_goes_on_with_what_was_recorded(recording: Recording, tmp_path: Path) -> None:
    """A demonstration is safe as soon as it is recorded; joined, the file is the undisturbed one, byte for byte."""
    out, first, _ = recording
    finished = first.files[0]
    parts = tmp_path / f".{finished.name}.parts"
    shutil.copytree(out.with_name("parts"), parts)
    (parts / "attempt_000001.hdf5").write_bytes(b"cut by a kill")
    again = record(CONFIG, tmp_path)
    assert (again.attempted, again.frames) == (0, first.frames)
    assert (tmp_path / finished.name).read_bytes() == finished.read_bytes()
    assert not parts.exists()


def test_a_file_holds_as_many_demonstrations_as_were_asked_for(recording: Recording, tmp_path: Path) -> None:
    """Parts of a stopped, larger recording are not joined, and not lost."""
    out, first, _ = recording
    parts = tmp_path / f".{first.files[0].name}.parts"
    shutil.copytree(out.with_name("parts"), parts)
    shutil.copy(parts / "attempt_000000.hdf5", parts / "attempt_000001.hdf5")
    with h5py.File(parts / "attempt_000001.hdf5", "a") as file:
        demo_of(file).attrs["attempt"] = 1
    assert record(CONFIG, tmp_path).files[0].read_bytes() == first.files[0].read_bytes()
    assert [path.name for path in parts.iterdir()] == ["attempt_000001.hdf5"]
    assert record(CONFIG, tmp_path).skipped == (tmp_path / first.files[0].name,)


@pytest.mark.slow
def test_workers_side_by_side_record_the_same_demonstrations(recording: Recording, tmp_path: Path) -> None:
    _, alone, _ = recording
    both = record(CONFIG.model_copy(update={"episodes": 2, "workers": 2}), tmp_path)
    assert (both.attempted, both.short_tasks) == (2, ())
    with h5py.File(both.files[0]) as file, h5py.File(alone.files[0]) as before:
        assert [int(file[f"data/demo_{i}"].attrs["seed"]) for i in range(2)] == [5, 6]
        assert file["data"].attrs["recorder_digest"] == before["data"].attrs["recorder_digest"]
        for name in ("actions", "states", "obs/agentview_rgb", "obs/eye_in_hand_depth", "obs/ee_states"):
            np.testing.assert_array_equal(demo_of(file)[name][:], demo_of(before)[name][:])


def test_a_task_beyond_the_expert_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scripted expert cannot do libero_goal task 0"):
        record(Config(suite="libero_goal", tasks=(0,), episodes=1), tmp_path)
    assert list(tmp_path.iterdir()) == []
