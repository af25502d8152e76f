"""The whole check: an intact run passes, a fault in the closed loop's code fails by name, bad input is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.cache_schemas.pack_info import NoOpFilter
from geomcache.pipeline.sim import libero_env
from geomcache.stages.cli.app import app
from geomcache.stages.evaluate.check.finding import CHECKS, FIXES, explanation
from geomcache.stages.evaluate.check.inputs import check_answer, check_inputs
from geomcache.stages.evaluate.check.open_loop import check_open_loop
from geomcache.stages.evaluate.check.opened import OpenedRun, StoredEpisode, open_run
from geomcache.stages.evaluate.check.run import REPORT_NAME, CheckReport, check_run
from geomcache.stages.evaluate.check.scene import NoScene, Replayed, Scene, Scenes
from geomcache.stages.evaluate.check.unrestored import check_unrestored
from geomcache.stages.train.checkpoint import latest_checkpoint
from geomcache.stages.train.normalise import Normaliser
from tests.conftest import nothing
from tests.stages.evaluate.check.conftest import edit_card, run_on, the_episode
from tests.stages.evaluate.check.test_frames_and_states import assert_named

pytestmark = [pytest.mark.sim, pytest.mark.slow]


def test_an_intact_run_passes_every_check(folder: Path, tmp_path: Path) -> None:
    report = check_run(folder / "pool", out=tmp_path / "out", device="cpu", progress=nothing)
    assert [one for one in report.findings if not one.passed] == []
    assert {one.check for one in report.findings} == set(CHECKS)
    assert CheckReport.model_validate_json((tmp_path / "out" / REPORT_NAME).read_text()) == report


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
    assert [one["fault"] for one in report["findings"] if one["fault"]] == ["horizontal mirror"]
    assert (tmp_path / "out/frames_0.png").stat().st_size > 1000


def test_what_a_pack_without_its_scene_can_tell(folder: Path) -> None:
    """The replay is not shown as passed, what remains is; with the demonstrations everything is possible again."""
    run = open_run(folder / "none", "cpu")
    episode = the_episode(run)
    bare = StoredEpisode(episode.pack, replace(episode.record, metadata="{}"), episode.first)
    found = Scenes(run).of(bare)
    assert isinstance(found, NoScene)
    assert "--demos" in found.fix
    findings = check_unrestored(bare)
    assert [one.check for one in findings if one.passed] == ["frames", "frames", "actions", "actions", "states"]
    scenes = Scenes(run, folder / "demos")
    try:
        scene = scenes.of(bare)
        assert isinstance(scene, Scene)
        scene.start()
        shown = scene.env.observe()
    finally:
        scenes.close()
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
    states, actions = run.data.states(), run.data.actions()
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
    with pytest.raises(GeomcacheError, match="no token cache"):
        run_on(folder / "pool", tmp_path / "lost", cache=tmp_path / "gone")
    shutil.copytree(intact.policy.checkpoint, tmp_path / "alone/checkpoints/step_00000002")
    with pytest.raises(InputError, match="which data"):
        open_run(tmp_path / "alone", "cpu")


def test_a_fault_is_named_only_if_it_explains_clearly_better() -> None:
    assert explanation({"BGR": 0.1, "exposure": 5.0}, 10.0) == "BGR"
    assert explanation({"BGR": 0.1, "exposure": 0.12}, 10.0) is None
    assert explanation({"BGR": 3.0}, 10.0) is None
    assert explanation({}, 10.0) is None


def test_every_fault_has_a_fix() -> None:
    assert all(fix for fix in FIXES.values())
