"""The whole check: an intact run passes, a fault in the closed loop's code fails by name, bad input is told."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from geomcache.cache_schemas.errors import ConfigError, GeomcacheError, InputError, MissingDependency
from geomcache.cache_schemas.pack_info import NoOpFilter
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.sim import libero_env
from geomcache.stages.cli.app import app
from geomcache.stages.evaluate.check import open_loop
from geomcache.stages.evaluate.check import scene as scene_module
from geomcache.stages.evaluate.check.finding import CHECKS
from geomcache.stages.evaluate.check.inputs import check_answer, check_inputs
from geomcache.stages.evaluate.check.open_loop import check_open_loop
from geomcache.stages.evaluate.check.opened import OpenedRun, StoredEpisode, open_run
from geomcache.stages.evaluate.check.run import REPORT_NAME, CheckReport, check_run
from geomcache.stages.evaluate.check.scene import NoScene, Replayed, Scene, Scenes
from geomcache.stages.evaluate.check.unrestored import _actions, _states, check_unrestored
from geomcache.stages.train.checkpoint import latest_checkpoint, load_policy
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.ranks import make_accelerator
from geomcache.stages.train.validation import measure, spread
from tests.conftest import nothing
from tests.stages.evaluate.check.conftest import KeptScenes, edit_card, run_on, the_episode
from tests.stages.evaluate.check.test_frames_and_states import assert_named

pytestmark = [pytest.mark.sim, pytest.mark.slow]


@pytest.mark.usefixtures("one_simulator")
def test_an_intact_run_passes_every_check(folder: Path, tmp_path: Path) -> None:
    report = check_run(folder / "pool", out=tmp_path / "out", device="cpu", progress=nothing)
    assert [one for one in report.findings if not one.passed] == []
    assert {one.check for one in report.findings} == set(CHECKS)
    assert CheckReport.model_validate_json((tmp_path / "out" / REPORT_NAME).read_text()) == report


@pytest.mark.usefixtures("one_simulator")
def test_a_mirrored_closed_loop_ends_the_command_with_1_and_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulator's pictures are turned by 180 degrees, as the community does; nothing declared changes."""
    upright = libero_env.to_upright
    monkeypatch.setattr(
        libero_env, "to_upright", lambda image, _, row_axis: upright(image, "upside_down", row_axis=row_axis)
    )
    result = CliRunner().invoke(
        app, ["check", str(folder / "none"), "--device", "cpu", "--out", str(tmp_path / "out"), "--json"]
    )
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    assert report["looked_at"] == "1 of 1 episodes, 1 of 1 packs"
    assert [one["fault"] for one in report["findings"] if one["fault"]] == ["horizontal mirror"]
    assert (tmp_path / "out/frames_0.png").stat().st_size > 1000


def test_what_a_pack_without_its_scene_can_tell(folder: Path, scenes: Scenes) -> None:
    """The replay is not shown as passed, what remains is; with the demonstrations everything is possible again."""
    run = open_run(folder / "none", "cpu")
    episode = the_episode(run)
    bare = StoredEpisode(episode.pack, replace(episode.record, metadata="{}"), episode.first)
    found = Scenes(run).of(bare)
    assert isinstance(found, NoScene)
    assert "--demos" in found.fix
    findings = check_unrestored(bare)
    assert [one.check for one in findings if one.passed] == ["frames", "frames", "actions", "actions", "states"]
    scene = KeptScenes(run, folder / "demos", scenes._open).of(bare)
    assert isinstance(scene, Scene)
    scene.start()
    shown = scene.env.observe()
    np.testing.assert_array_equal(shown.frame.images_BVHWC, bare.frames([0]).images_BVHWC)


def test_rows_left_out_as_no_ops_make_a_replay_impossible(folder: Path) -> None:
    run = open_run(folder / "none", "cpu")
    episode, info = the_episode(run), the_episode(run).pack.info
    request = info.request.model_copy(update={"no_ops": NoOpFilter()})
    episode.pack.info = info.model_copy(update={"request": request, "no_op_rows": 3})
    found = Scenes(run).of(episode)
    assert isinstance(found, NoScene)
    assert "3 rows" in found.why


def test_another_instruction_is_named(intact: OpenedRun, replayed: Replayed) -> None:
    told = {step: replace(seen, instruction="pick the soup") for step, seen in replayed.observed.items()}
    found = check_inputs(intact, the_episode(intact), sorted(told), replace(replayed, observed=told), "cpu")
    assert_named(found, "other instruction")
    assert "pick the soup" in found.found


def test_states_normalised_by_other_statistics_are_named(folder: Path, tmp_path: Path) -> None:
    run = run_on(folder / "none", tmp_path / "run")
    states, actions = run.data.states(), run.data.labels(np.arange(len(run.data)))
    state = Normaliser.fit(states, actions, "q99").state
    card = run.policy.card
    edit_card(
        latest_checkpoint(tmp_path / "run") / "card.json",
        normaliser=card.normaliser.model_copy(update={"state": state}).model_dump(mode="json"),
    )
    changed = open_run(tmp_path / "run", "cpu")
    episode = the_episode(changed)
    assert_named(check_inputs(changed, episode, [0, 50, 90], None, "cpu"), "min_max statistics read as q99")
    assert check_answer(changed, episode, [0, 50], "cpu").passed is False


def test_an_open_loop_error_that_is_not_the_log_s_fails(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "none", tmp_path / "run")
    path = tmp_path / "run/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"open_loop_error": 0.9}))
    assert_named(check_open_loop(open_run(tmp_path / "run", "cpu"), "cpu"), "unexplained difference")
    path.unlink()
    assert check_open_loop(open_run(tmp_path / "run", "cpu"), "cpu").passed is None


def test_bad_input_is_told_by_name(folder: Path, tmp_path: Path, intact: OpenedRun) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        open_run(tmp_path, "cpu")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "nowhere")])
    assert isinstance(result.exception, InputError)
    with pytest.raises(GeomcacheError, match="is not a finished pack"):
        run_on(folder / "none", tmp_path / "moved", pack=tmp_path / "gone")
    with pytest.raises(GeomcacheError, match="gone is not there"):
        run_on(folder / "pool", tmp_path / "lost", cache=tmp_path / "gone")
    shutil.copytree(intact.policy.checkpoint, tmp_path / "alone/checkpoints/step_00000002")
    with pytest.raises(InputError, match="which data"):
        open_run(tmp_path / "alone", "cpu")


@pytest.mark.parametrize(
    "metadata",
    [
        '{"seed": 0}',
        '{"seed": "abc", "init_state_index": 0}',
        '{"seed": 0, "init_state_index": 77}',
        '{"seed": 99999999999, "init_state_index": 0}',
        '{"seed": 0, "init_state_index": 0, "noise": null}',
        "[]",
    ],
)
def test_damaged_metadata_make_a_replay_impossible(metadata: str, intact: OpenedRun, scenes: Scenes) -> None:
    episode = the_episode(intact)
    strange = StoredEpisode(episode.pack, replace(episode.record, metadata=metadata), episode.first)
    found = scenes.of(strange)
    assert isinstance(found, NoScene)
    assert "damaged" in found.why


def test_a_simulator_that_is_missing_is_an_error(intact: OpenedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise MissingDependency("no simulator")

    monkeypatch.setattr(scene_module, "LiberoEnv", missing)
    with pytest.raises(MissingDependency):
        Scenes(intact).of(the_episode(intact))


def test_episodes_of_lerobot_sets_are_not_looked_for_in_files(folder: Path) -> None:
    run = open_run(folder / "none", "cpu")
    episode = the_episode(run)
    info = episode.pack.info
    (source,) = info.request.sources
    request = info.request.model_copy(update={"sources": (source.model_copy(update={"kind": "lerobot"}),)})
    episode.pack.info = info.model_copy(update={"request": request})
    bare = StoredEpisode(episode.pack, replace(episode.record, metadata="{}"), episode.first)
    for demos in (None, folder / "demos"):
        found = Scenes(run, demos).of(bare)
        assert isinstance(found, NoScene)
        assert "--demos" not in found.fix


def test_every_pack_is_looked_at(folder: Path, intact: OpenedRun) -> None:
    packs: Any = [PackReader(folder / "pack") for _ in range(3)]
    run = replace(intact, data=cast("Any", SimpleNamespace(packs=packs)))
    assert [one.first for one in run.episodes(1)] == [0, len(packs[0]), 2 * len(packs[0])]


def test_a_checkpoint_is_found_from_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(latest_checkpoint(folder / "none"))
    run = open_run(Path(), "cpu")
    assert run.run == (folder / "none").resolve()
    assert run.policy.checkpoint.name == "step_00000002"


def test_settings_of_the_encoder_reach_the_live_one(folder: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(folder / "pool"), "--set", "encoder_config.nonsense=1"])
    assert isinstance(result.exception, ConfigError)
    assert "nonsense" in str(result.exception)


def test_demonstrations_that_are_not_there_are_told_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone does not exist"):
        check_run(tmp_path / "no_run", demos=tmp_path / "gone", device="cpu", progress=nothing)


def test_what_only_packed_rows_tell_fails_by_name(plant: Callable[..., OpenedRun]) -> None:
    turned = plant(images=lambda x: x[:, :, :, ::-1], actions=lambda x: np.concatenate([x[:, :6], -x[:, 6:]], axis=1))
    named = [(one.check, one.fault) for one in check_unrestored(the_episode(turned)) if not one.passed]
    assert named == [("frames", "horizontal mirror")] * 2 + [("actions", "gripper sign")]


def test_what_only_packed_numbers_tell_fails_by_name(intact: OpenedRun) -> None:
    episode = the_episode(intact)

    def named(states: Any, actions: Any) -> list[str | None]:
        changed: Any = SimpleNamespace(states_TS=states, actions_TA=actions)
        return [found.fault for found in (_actions(changed), _states(changed))]

    states, actions = episode.states_TS, episode.actions_TA
    assert named(states, actions) == [None, None]
    assert named(states * 0, states[:, :7])[1] == "state omitted"
    quaternion = np.concatenate([states[:, :3], Rotation.from_rotvec(states[:, 3:6]).as_quat(), states[:, 6:7]], 1)
    following = np.concatenate([states[1:, :7], states[-1:, :7]])
    assert named(quaternion, following) == ["absolute for delta actions", "quaternion for axis-angle"]


def test_observations_that_are_others_than_the_stored_ones_are_told(intact: OpenedRun, replayed: Replayed) -> None:
    episode, steps = the_episode(intact), sorted(replayed.observed)
    assert check_inputs(intact, episode, steps, replayed, "cpu").passed
    apart = {step: replace(seen, state_S=seen.state_S + np.float32(0.1)) for step, seen in replayed.observed.items()}
    assert check_inputs(intact, episode, steps, replace(replayed, observed=apart), "cpu").passed is False


def test_a_logged_error_of_other_statistics_or_weights_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_on(folder / "none", tmp_path / "run")
    path, metrics = tmp_path / "run/result.json", tmp_path / "run/metrics.jsonl"
    settings = run.config.model_copy(update={"processes": 1, "device": "cpu", "trackers": ()})
    rows = spread(run.data.training_rows, run.config.open_loop_rows)

    def logged(policy: Any, maker: Any) -> Any:
        error = measure(policy, maker, rows, settings, make_accelerator(settings)).open_loop_error
        path.write_text(json.dumps(json.loads(path.read_text()) | {"open_loop_error": error}))
        return check_open_loop(run, "cpu")

    monkeypatch.setattr(open_loop, "_TOLERANCE", 1e-4)  # two steps old, a policy's error is little but noise
    other = BatchMaker(run.data, run.policy.packer, run.fitted("mean_std"), run.config)
    assert_named(logged(run.policy.net, other), "min_max statistics read as mean_std")
    raw = load_policy(run.policy.checkpoint, run.policy.card)
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.mul_(0.5)
    monkeypatch.setattr(open_loop, "load_policy", lambda *_, **__: raw)
    assert_named(logged(raw.eval(), run.maker), "raw weights for averaged ones")
    assert logged(run.policy.net, run.maker).passed
    error = json.loads(path.read_text())["open_loop_error"]
    path.unlink()  # a run that was stopped: what it validated last is compared
    monkeypatch.setattr(TrainingData, "validation_rows", property(lambda _: rows))
    one_rank_too_few = replace(run, config=run.config.model_copy(update={"processes": len(rows) + 1}))
    for factor in (1.0, 1.5):
        metrics.write_text(json.dumps({"step": 1, "validation": {"open_loop_error": factor * error}}) + "\n")
        for each in (run, one_rank_too_few):
            assert check_open_loop(each, "cpu").passed is (factor == 1.0)
