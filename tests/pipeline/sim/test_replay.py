"""Replaying files in the official layout: recorded here as LIBERO does it, written by plain h5py, rendered again.

The scene has fixtures that LIBERO places at random (a cabinet and a stove).
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import ContractMismatch, InputError, SourceDamaged, UnknownName
from geomcache.pipeline.camera_geometry import metric_depth
from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.orientation_by_replay import find_orientation
from geomcache.pipeline.sim.orientation_finding import agreed_orientation
from geomcache.pipeline.sim.replay import Replay, find_task, read_demo
from geomcache.pipeline.sim.rerender import ReplayReport, RerenderConfig, rerender
from geomcache.pipeline.sim.system import quiet_simulator
from geomcache.pipeline.sources.libero_hdf5 import Config, Source

pytestmark = pytest.mark.sim

SUITE, TASK = "libero_spatial", "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate"
SEED, INIT_STATE = 7, 2
CAMERAS = ("agentview", "robot0_eye_in_hand")
SIDE, STEPS, DROPPED = 64, 10, 5
KEPT = STEPS - DROPPED
FILE = f"{TASK}_demo.hdf5"
RERENDER = RerenderConfig(cameras=CAMERAS, height=SIDE, width=SIDE)


@dataclass(frozen=True)
class Recording:
    """What a live simulator showed, as an HDF5 file keeps it."""

    actions: NDArray[np.float64]
    states: NDArray[np.float64]  # before each action
    obs: dict[str, NDArray[Any]]


class Columns:
    """Values of rows, collected by name."""

    def __init__(self) -> None:
        self.values: dict[str, list[NDArray[Any]]] = {}

    def take(self, env: LiberoEnv) -> None:
        row: dict[str, NDArray[Any]] = {
            "ee_pos": env.proprioception().ee_pos_3,
            "joint_states": env.proprioception().joint_pos_7,
        }
        for camera in CAMERAS:
            view, short = env.raw_camera(camera), camera.removeprefix("robot0_")
            row |= {f"{short}_rgb": view.rgb_HWC, f"{short}_depth": view.zbuffer_HW[..., None]}
        self.take_row(row)

    def take_row(self, row: dict[str, NDArray[Any]]) -> None:
        for name, value in row.items():
            self.values.setdefault(name, []).append(value)

    def stacked(self) -> dict[str, NDArray[Any]]:
        return {name: np.stack(values) for name, values in self.values.items()}


def wild_actions() -> NDArray[np.float64]:
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (STEPS, 7))
    actions[:, 6] = -1.0
    return actions


def record(env: LiberoEnv, timing: str) -> Recording:
    """Rows of obs are taken ``before`` or ``after`` the action, or not at all."""
    states, seen = [], Columns()
    for action in wild_actions():
        states.append(env.flat_state())
        if timing == "before":
            seen.take(env)
        env.step(action)
        if timing == "after":
            seen.take(env)
    return Recording(wild_actions(), np.stack(states), seen.stacked())


def played_back(states: NDArray[np.float64], model_file: str) -> Recording:
    """What LIBERO's create_dataset.py makes of a recording, by LIBERO's own environment."""
    with quiet_simulator():
        from libero.libero.envs.env_wrapper import OffScreenRenderEnv

    generator = np.random.get_state()
    env = OffScreenRenderEnv(
        bddl_file_name=str(suites.task_info(SUITE, 0).bddl_path),
        camera_heights=SIDE,
        camera_widths=SIDE,
        camera_depths=True,
    )
    with quiet_simulator():
        env.reset()
        env.reset_from_xml_string(model_file)
    env.sim.reset()
    env.sim.set_state_from_flattened(states[0])
    env.sim.forward()
    seen = Columns()
    for action in wild_actions():
        shown, _, _, _ = env.step(action)
        row = {"ee_pos": shown["robot0_eef_pos"], "joint_states": shown["robot0_joint_pos"]}
        for camera in CAMERAS:
            short = camera.removeprefix("robot0_")
            row |= {f"{short}_rgb": shown[f"{camera}_image"], f"{short}_depth": shown[f"{camera}_depth"]}
        seen.take_row(row)
    env.close()
    np.random.set_state(generator)
    return Recording(
        wild_actions()[DROPPED:], states[DROPPED:], {name: v[DROPPED:] for name, v in seen.stacked().items()}
    )


@dataclass(frozen=True)
class Studio:
    """A simulator, and what was recorded of one task."""

    env: LiberoEnv
    seeded: Recording  # obs after the action, as `geomcache demos`
    official: Recording  # the same played back by LIBERO, without its first steps
    no_noops: Recording  # obs before the action
    model_file: str
    fixtures: dict[str, NDArray[np.float64]]  # where they stand in seeded and official
    depth_range: tuple[float, float]


def fixtures_of(env: LiberoEnv) -> dict[str, NDArray[np.float64]]:
    inner = env.simulator
    return {name: inner.sim.data.body_xpos[inner.obj_body_id[name]].copy() for name in inner.fixtures_dict}


@pytest.fixture(scope="module")
def studio() -> Iterator[Studio]:
    with LiberoEnv(SUITE, 0, cameras=CAMERAS, height=SIDE, width=SIDE) as env:
        env.reset(SEED, INIT_STATE, settle_steps=9)
        seeded = record(env, "after")
        env.reset(SEED, INIT_STATE, settle_steps=0)
        model_file, fixtures = env.model_xml(), fixtures_of(env)
        official = played_back(record(env, "never").states, model_file)
        env.reset(0, INIT_STATE, settle_steps=10)
        no_noops = record(env, "before")
        no_noops.states[0] = suites.init_state(SUITE, 0, INIT_STATE)  # as the regeneration's script has it
        yield Studio(env, seeded, official, no_noops, model_file, fixtures, env.depth_range())


def write(path: Path, demos: dict[str, tuple[Recording, dict[str, Any]]], *, official: bool = True) -> Path:
    """A file as the public ones are, without depth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if official:
            data.attrs["problem_info"] = "{}"
            data.attrs["bddl_file_name"] = f"chiliocosm/bddl_files/{SUITE}/{TASK}.bddl"
        for name, (recording, attributes) in demos.items():
            group = data.create_group(name)
            group.attrs.update(attributes)
            group["actions"], group["states"] = recording.actions, recording.states
            group["rewards"] = np.zeros(len(recording.actions), dtype=np.uint8)
            for key, values in recording.obs.items():
                if not key.endswith("_depth"):
                    group[f"obs/{key}"] = values
    return path


@pytest.fixture(scope="module")
def source(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a seeded, an official and a damaged demonstration, and one of the regeneration."""
    folder = tmp_path_factory.mktemp("source")
    elsewhere = studio.model_file.replace("/assets/", "/nobody/workspace/libero-dev/chiliocosm/assets/")
    broken = replace(studio.official, states=studio.official.states.copy())
    broken.states[3, 5] = np.nan
    demos: dict[str, tuple[Recording, dict[str, Any]]] = {
        "demo_0": (studio.seeded, {"seed": SEED, "init_state_index": INIT_STATE, "model_file": elsewhere}),
        "demo_2": (studio.official, {"model_file": elsewhere, "init_state": studio.official.states[0]}),
        "demo_10": (broken, {"model_file": elsewhere}),
    }
    write(folder / SUITE / FILE, demos)
    write(folder / "no_noops" / FILE, {"demo_0": (studio.no_noops, {})}, official=False)
    return folder


@dataclass(frozen=True)
class Rendered:
    """What two calls made, of which the first was killed after its first demonstration."""

    folder: Path
    left_by_the_kill: list[str]
    reports: dict[str, ReplayReport]  # folder/demo -> report
    told: list[str]  # what the second call said was done


class Killed(Exception):
    """Instead of a signal."""


@pytest.fixture(scope="module")
def rendered(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    def kill(*_: object) -> None:
        raise Killed

    out, told = tmp_path_factory.mktemp("rendered"), list[str]()
    with pytest.raises(Killed):
        rerender(source, out, RERENDER, kill)
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*.hdf5"))
    reports = rerender(source, out, RERENDER, lambda report, *_: told.append(report.demo))
    return Rendered(out, left, {f"{Path(r.file).parent}/{r.demo}": r for r in reports}, told)


def obs(path: Path, demo: str, key: str) -> NDArray[Any]:
    with h5py.File(path, "r") as file:
        return np.asarray(file[f"data/{demo}/obs/{key}"])


def test_a_seeded_demonstration_is_seen_again_bit_for_bit(rendered: Rendered, studio: Studio) -> None:
    report = rendered.reports[f"{SUITE}/demo_0"]
    assert (report.way, report.scene, report.matched, report.max_state_error) == ("actions", "seed", True, 0.0)
    assert (report.image_error, report.stored_orientation, report.success) == (0.0, "bottom_up", False)
    for key, values in studio.seeded.obs.items():
        np.testing.assert_array_equal(obs(rendered.folder / SUITE / FILE, "demo_0", key), values, err_msg=key)


def test_an_official_demonstration_is_seen_again_with_its_depth(rendered: Rendered, studio: Studio) -> None:
    """It starts in the middle of an episode, and no seed of the replay would place its fixtures so."""
    report, path = rendered.reports[f"{SUITE}/demo_2"], rendered.folder / SUITE / FILE
    assert (report.way, report.scene, report.matched, report.frames) == ("actions", "model_file", True, KEPT)
    assert report.image_error is not None
    assert report.image_error < 0.02
    np.testing.assert_allclose(obs(path, "demo_2", "ee_pos"), studio.official.obs["ee_pos"], atol=1e-6)
    for short in ("agentview", "eye_in_hand"):
        stored, live = obs(path, "demo_2", f"{short}_depth"), studio.official.obs[f"{short}_depth"]
        difference = np.abs(metric_depth(stored, *studio.depth_range) - metric_depth(live, *studio.depth_range))
        assert np.median(difference) < 1e-5
        assert (difference > 1e-3).mean() < 2e-3  # of the pixels, at an edge


def test_the_regeneration_keeps_its_own_timing(rendered: Rendered, studio: Studio) -> None:
    report = rendered.reports["no_noops/demo_0"]
    assert (report.way, report.scene, report.frames) == ("actions", "unknown", STEPS)
    for key, values in studio.no_noops.obs.items():  # its fixtures happen to be placed by the replay's own seed
        np.testing.assert_array_equal(obs(rendered.folder / "no_noops" / FILE, "demo_0", key), values, err_msg=key)


def test_the_new_file_is_the_sources_with_depth(rendered: Rendered, source: Path) -> None:
    with h5py.File(source / SUITE / FILE, "r") as old, h5py.File(rendered.folder / SUITE / FILE, "r") as new:
        assert list(new["data"]) == ["demo_0", "demo_2"]
        assert (new["data"].attrs["num_demos"], new["data"].attrs["total"]) == (2, STEPS + KEPT)
        assert new["data"].attrs["problem_info"] == old["data"].attrs["problem_info"]
        for name, demo in new["data"].items():
            for key in ("actions", "states", "rewards"):
                np.testing.assert_array_equal(demo[key], old[f"data/{name}/{key}"])
            for key, value in old[f"data/{name}"].attrs.items():
                np.testing.assert_array_equal(demo.attrs[key], value)
    read = Source(Config(path=rendered.folder / SUITE))
    assert read.contract.has_depth
    head, depth = read.head(1), read.read(1, 0, 3).frames.depth_BVHW
    assert (len(head), head.number, head.suite) == (KEPT - 1, 2, SUITE)
    assert depth is not None
    assert 0.5 < depth[:, 0].min() < depth[:, 0].max() < 4.0  # metres, as the agent's view has them


def test_a_damaged_demonstration_is_named_and_left_out(rendered: Rendered) -> None:
    damage = rendered.reports[f"{SUITE}/demo_10"].damage
    assert damage is not None
    assert "data/demo_10" in damage
    assert "states hold NaN" in damage


def test_a_killed_run_loses_one_demonstration_and_finished_files_are_kept(
    rendered: Rendered, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be simulated")

    assert rendered.left_by_the_kill == [f"{SUITE}/.{FILE}.parts/demo_0.hdf5"]
    assert rendered.told == ["demo_2", "demo_10", "demo_0"]
    assert sorted(path.name for path in rendered.folder.rglob("*")) == sorted([SUITE, "no_noops", FILE, FILE])

    monkeypatch.setattr(LiberoEnv, "reset", never)
    written = (rendered.folder / SUITE / FILE).stat().st_mtime_ns
    again = rerender(source, rendered.folder, RERENDER)
    assert {f"{Path(r.file).parent}/{r.demo}": r for r in again} == rendered.reports
    assert (rendered.folder / SUITE / FILE).stat().st_mtime_ns == written
    with pytest.raises(InputError, match="exists and holds something else"):
        rerender(source, rendered.folder, RERENDER.model_copy(update={"height": 32}))
    with pytest.raises(InputError, match="lies inside the source"):
        rerender(source, source / "new", RERENDER)
    with pytest.raises(InputError, match="does not exist"):
        rerender(source / "not there", rendered.folder, RERENDER)


def test_states_are_shown_where_actions_lead_elsewhere(studio: Studio, tmp_path: Path) -> None:
    official = studio.official
    other = replace(official, actions=-official.actions)
    folder = write(tmp_path / "in" / FILE, {"demo_0": (other, {"model_file": studio.model_file})}).parent
    (report,) = rerender(folder, tmp_path / "out", RERENDER)
    assert (report.way, report.matched, report.frames) == ("states", False, KEPT)
    assert report.max_state_error is not None
    assert report.max_state_error > 1e-3
    hand, stored = obs(tmp_path / "out" / FILE, "demo_0", "ee_pos"), official.obs["ee_pos"]
    lag = np.abs(hand[:-1] - stored[:-1]).max()
    assert lag < 1e-3  # one physics step
    assert np.abs(stored[1:] - stored[:-1]).max() > 4 * lag  # so it is not the neighbour's row
    frames, seen = (
        images.astype(int)
        for images in (obs(tmp_path / "out" / FILE, "demo_0", "eye_in_hand_rgb"), official.obs["eye_in_hand_rgb"])
    )
    assert 2 * np.abs(frames[:-1] - seen[:-1]).mean() < np.abs(frames[:-1] - seen[1:]).mean()


def test_fixtures_stand_where_the_recording_had_them(studio: Studio, source: Path) -> None:
    demo = read_demo(source / SUITE / FILE, "demo_2")
    assert demo.scene is not None
    demo.scene["camera"]["agentview"][:3] += 0.25
    Replay(studio.env, demo)
    for name, at in fixtures_of(studio.env).items():
        np.testing.assert_allclose(at, studio.fixtures[name], atol=1e-6)
    camera = studio.env.raw_camera("agentview").extrinsics_world_44[:3, 3]
    np.testing.assert_allclose(camera, demo.scene["camera"]["agentview"][:3], atol=1e-9)

    nothing_known = replace(demo, scene={"body": {}, "camera": {}})
    assert Replay(studio.env, nothing_known).scene == "unknown"
    moved = [np.abs(at - studio.fixtures[name]).max() for name, at in fixtures_of(studio.env).items()]
    assert 1e-3 < max(moved) < 0.03

    with pytest.raises(SourceDamaged, match=r"demo_2 cannot be replayed"):
        Replay(studio.env, replace(demo, states_TD=demo.states_TD[:, :-1]))


def turned(source: Path, to: Path, camera: str, turn: Callable[[NDArray[Any]], NDArray[Any]]) -> Path:
    """A copy whose images of one camera are stored otherwise."""
    shutil.copy(source, to)
    with h5py.File(to, "r+") as file:
        for demo in file["data"].values():
            images = np.stack([turn(image) for image in demo[f"obs/{camera}_rgb"]])
            del demo[f"obs/{camera}_rgb"]
            demo[f"obs/{camera}_rgb"] = images
    return to


def test_the_stored_orientation_is_found_and_a_mixture_named(source: Path, tmp_path: Path) -> None:
    mixed = turned(source / SUITE / FILE, tmp_path / FILE, "agentview", lambda raw: np.rot90(raw, 2))
    wrist, agent = find_orientation(mixed, CAMERAS[::-1], demo="demo_2")
    assert (wrist.camera, wrist.best, wrist.decided) == ("robot0_eye_in_hand", "bottom_up", True)
    assert (agent.camera, agent.best, agent.decided) == ("agentview", "rot180", True)
    assert min(wrist.ratio, agent.ratio) > 3.0
    assert agreed_orientation([wrist], where=FILE) == "bottom_up"
    with pytest.raises(ContractMismatch, match=r"robot0_eye_in_hand: bottom_up.*agentview: rot180"):
        agreed_orientation((wrist, agent), where=FILE)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("model_file", "<mujoco><body", "model_file"),
        ("model_file", "<mujoco><body name='a' euler='1 0 0'/></mujoco>", "euler"),
        ("model_file", "<mujoco><camera name='a' pos='1 0 nan'/></mujoco>", "nan"),
    ],
)
def test_a_scene_that_cannot_be_read_is_named(
    attribute: str, value: str, message: str, source: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(source / SUITE / FILE, tmp_path))
    with h5py.File(path, "r+") as file:
        file["data/demo_2"].attrs[attribute] = value
    with pytest.raises(SourceDamaged, match=rf"(?s)data/demo_2 cannot be replayed.*{message}"):
        read_demo(path, "demo_2")


def test_files_that_cannot_be_replayed_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / FILE).write_bytes(b"not HDF5")
    with pytest.raises(SourceDamaged, match=FILE):
        rerender(tmp_path / "in", tmp_path / "out", RERENDER)
    assert not (tmp_path / "out").exists()
    shutil.copy(source / SUITE / FILE, tmp_path / "something_else.hdf5")
    with pytest.raises(UnknownName, match=r"something_else.hdf5 is named after no LIBERO task"):
        find_task(tmp_path / "something_else.hdf5")
    with pytest.raises(SourceDamaged, match="data/demo_7 cannot be replayed"):
        find_orientation(source / SUITE / FILE, CAMERAS, demo="demo_7")
    with pytest.raises(SourceDamaged, match="frontview_rgb"):
        find_orientation(source / SUITE / FILE, ("frontview",))
