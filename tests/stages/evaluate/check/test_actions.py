"""Actions that would not do in the simulator what they did when they were recorded are named, and undone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.replay import read_demo
from geomcache.stages.evaluate.check.actions import check_decoding, check_replay
from geomcache.stages.evaluate.check.frames import check_frames
from geomcache.stages.evaluate.check.opened import OpenedRun, StoredEpisode, open_run
from geomcache.stages.evaluate.check.scene import NoScene, Replayed, Scene, Scenes
from geomcache.stages.evaluate.check.states import check_states
from geomcache.stages.evaluate.live_policy import LivePolicy
from geomcache.stages.train.data import TrainingData
from geomcache.stages.train.normalise import Normaliser
from tests.stages.evaluate.check.conftest import KeptScenes, edit_card, run_on, scene_of, the_episode
from tests.stages.evaluate.check.test_frames_and_states import assert_named

pytestmark = [pytest.mark.sim, pytest.mark.slow]
Array = NDArray[Any]


def _gripper(actions: Array, factor: float, offset: float) -> Array:
    return np.concatenate([actions[:, :6], factor * actions[:, 6:] + offset], axis=1)


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("gripper sign", {"actions": lambda x: _gripper(x, -1, 0), "rows": 90}),
        ("chunk shifted by one", {"actions": lambda x: np.concatenate([x[1:], x[-1:]])}),
        ("chunk shifted by one", {"actions": lambda x: np.concatenate([x[:1], x[:-1]])}),  # fingers tremble in the end
        ("wrong control rate", {"every": 2, "rows": 40}),
        ("absolute for delta actions", {}),
    ],
)
def test_packed_actions_of_another_convention_are_named_and_undone(
    fault: str, changes: dict[str, Any], plant: Callable[..., OpenedRun], intact: OpenedRun, scenes: Scenes
) -> None:
    if fault.startswith("absolute"):
        states = the_episode(intact).states_TS
        following = np.concatenate([states[1:, :6], states[-1:, :6]])  # the pose that the next row has
        changes = {"actions": lambda x: np.concatenate([following, x[:, 6:]], axis=1), "rows": 40}
    run = plant(**changes)
    episode = the_episode(run)
    decoding, decoded = check_decoding(run, episode)
    found, replayed = check_replay(scene_of(scenes, episode), decoded, bool(decoding.passed), [0], 20)
    assert_named(found, fault)
    assert replayed.corrected == fault
    if fault == "gripper sign":  # what follows is compared with the demonstration, not with its failure
        assert check_states(replayed, episode.states_TS).passed


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_gripper_of_0_to_1_is_named(sign: float, plant: Callable[..., OpenedRun]) -> None:
    run = plant(actions=lambda x: _gripper(x, 0.5 * sign, 0.5))
    assert_named(check_decoding(run, the_episode(run))[0], "gripper range")


@pytest.mark.parametrize("mode", ["q99", "mean_std"])
def test_statistics_of_another_mode_are_named(folder: Path, tmp_path: Path, mode: Any) -> None:
    run_on(folder / "none", tmp_path / "run")
    (card,) = (tmp_path / "run/checkpoints").glob("*/card.json")
    data = TrainingData(open_run(tmp_path / "run", "cpu").config)
    other = Normaliser.fit(data.states(), data.labels(np.arange(len(data))), mode).model_copy(
        update={"mode": "min_max"}
    )
    edit_card(card, normaliser=other.model_dump(mode="json"))
    run = open_run(tmp_path / "run", "cpu")
    assert_named(check_decoding(run, the_episode(run))[0], f"min_max statistics read as {mode}")


def test_statistics_of_another_data_set_are_named(folder: Path, tmp_path: Path) -> None:
    run_on(folder / "none", tmp_path / "run")
    (card,) = (tmp_path / "run/checkpoints").glob("*/card.json")
    rng = np.random.default_rng(3)
    other = Normaliser.fit(rng.normal(size=(50, 8)), rng.uniform(-0.7, 0.8, size=(50, 7)))
    edit_card(card, normaliser=other.model_dump(mode="json"))
    run = open_run(tmp_path / "run", "cpu")
    assert_named(check_decoding(run, the_episode(run))[0], "statistics of another data set")


def test_a_decoding_with_the_gripper_turned_is_named(intact: OpenedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = LivePolicy.decode
    monkeypatch.setattr(LivePolicy, "decode", lambda self, x: _gripper(decode(self, x), -1, 0))
    assert_named(check_decoding(intact, the_episode(intact))[0], "gripper sign")


def test_chunks_that_training_takes_one_row_late_are_named(intact: OpenedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = TrainingData.action_chunk
    last = len(intact.data) - 1
    monkeypatch.setattr(TrainingData, "action_chunk", lambda self, row: chunk(self, min(row + 1, last)))
    assert_named(check_decoding(intact, the_episode(intact))[0], "chunk shifted by one")


def test_a_closed_loop_that_does_not_settle_is_named(
    plant: Callable[..., OpenedRun], scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The declared number of settling steps is right; the simulator leaves them out."""
    episode = the_episode(plant(rows=7))
    reset = LiberoEnv.reset
    monkeypatch.setattr(LiberoEnv, "reset", lambda self, seed, init, settle_steps=10: reset(self, seed, init, 0))  # noqa: ARG005
    found, replayed = check_replay(scene_of(scenes, episode), episode.actions_TA, True, [0, 5], 20)
    assert_named(found, "missing settling steps")
    assert "10 settling steps" in found.found
    assert check_frames(replayed, None)[0].passed
    assert check_states(replayed, episode.states_TS).passed


def test_a_simulator_of_another_control_rate_is_named(
    intact: OpenedRun, scenes: Scenes, replayed: Replayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert replayed.follows  # the simulator runs; where it is does not matter
    monkeypatch.setattr(Scene, "start", lambda self, settle_steps=None: None)  # noqa: ARG005
    episode = the_episode(intact)
    step = LiberoEnv.step
    monkeypatch.setattr(LiberoEnv, "step", lambda self, action: [step(self, action) for _ in range(2)][-1])
    found, _ = check_replay(scene_of(scenes, episode), episode.actions_TA[:10], True, [0], 20)
    assert_named(found, "wrong control rate")
    assert "0.100 s" in found.found


def test_a_simulator_that_turns_the_gripper_is_named(
    intact: OpenedRun, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it settles the fingers close, so only the hand is where row 0 says."""
    episode = the_episode(intact)
    step = LiberoEnv.step
    monkeypatch.setattr(LiberoEnv, "step", lambda self, action: step(self, action * [1, 1, 1, 1, 1, 1, -1]))
    found, _ = check_replay(scene_of(scenes, episode), episode.actions_TA, True, [0], 20)
    assert_named(found, "gripper sign")
    assert "report it" in found.fix


def test_a_track_that_is_followed_but_does_not_reach_the_goal_is_no_agreement(
    plant: Callable[..., OpenedRun], scenes: Scenes
) -> None:
    episode = the_episode(plant(rows=10))
    found, replayed = check_replay(scene_of(scenes, episode), episode.actions_TA, True, [0], 20)
    assert_named(found, "unexplained difference")
    assert "does not reach its goal here" in found.found
    assert replayed.follows


def test_of_a_noisy_pack_the_file_s_actions_are_executed_and_the_labels_compared(
    folder: Path, intact: OpenedRun, scenes: Scenes, plant: Callable[..., OpenedRun]
) -> None:
    turned = the_episode(plant(actions=lambda x: _gripper(x, -1, 0), rows=10))
    noisy = StoredEpisode(turned.pack, replace(turned.record, metadata='{"noise": 0.1, "seed": 0}'), turned.first)
    scene = KeptScenes(intact, folder / "demos", scenes._open).of(
        StoredEpisode(noisy.pack, replace(noisy.record, metadata='{"noise": 0.1}'), noisy.first)
    )
    assert isinstance(scene, Scene)
    found, replayed = check_replay(scene, turned.actions_TA, True, [0], 20)
    assert_named(found, "gripper sign")
    assert "the file's executed ones" in found.compared
    assert replayed.follows
    damaged = KeptScenes(intact, folder / "demos", scenes._open).of(noisy)  # a seed without an initial state
    assert isinstance(damaged, NoScene)


def test_how_far_a_file_s_own_actions_lead_from_its_states(folder: Path, intact: OpenedRun, scenes: Scenes) -> None:
    (path,) = (folder / "demos").glob("*.hdf5")
    demo = read_demo(path, "demo_0")
    states = demo.states_TD[:5].copy()
    states[3, 4] += 0.25  # radians of a joint
    short = replace(demo, actions_TA=demo.actions_TA[:5], states_TD=states)
    scene = replace(scene_of(scenes, the_episode(intact)), start_from=short, noisy=True)
    assert abs(scene.own_error() - 0.25) < 1e-3
    assert scene.executed_TA is not None
    np.testing.assert_array_equal(scene.executed_TA, short.actions_TA[1:])


@pytest.mark.parametrize("change", [lambda x: _gripper(x, 0.9, 0), lambda x: x * np.where(np.arange(7) == 6, 0, 1)])
def test_gripper_commands_that_are_binarised_need_not_come_back(
    change: Callable[[Array], Array], plant: Callable[..., OpenedRun]
) -> None:
    run = plant(actions=lambda x: np.concatenate([change(x[::2]), x[1::2]]))
    assert check_decoding(run, the_episode(run))[0].passed


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("unexplained difference", lambda x: np.concatenate([x[:, :6], -np.ones((len(x), 1))], axis=1)),
        ("unexplained difference", lambda x: x * [1, 1, 1, 0, 0, 0, 1]),
        ("gripper range", lambda x: _gripper(x, 0.5, 0.5)),
    ],
)
def test_what_a_decoding_does_to_the_gripper_or_the_rotation_is_no_statistics(
    fault: str, change: Callable[[Array], Array], intact: OpenedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = LivePolicy.decode
    monkeypatch.setattr(LivePolicy, "decode", lambda self, x: change(decode(self, x)))
    assert_named(check_decoding(intact, the_episode(intact))[0], fault)
