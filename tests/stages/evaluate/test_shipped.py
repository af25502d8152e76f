"""Exported policies in evaluation: found by name, played on what they were trained on, refused where data are asked."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from geomcache.cache_schemas.errors import InputError, UnknownName
from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.pipeline.sim import suites
from geomcache.stages.cli.app import app
from geomcache.stages.evaluate import shipped
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.controls import blind_training
from geomcache.stages.evaluate.results import read_results
from geomcache.stages.evaluate.serve.config import ServeConfig, load_served_policy
from geomcache.stages.evaluate.shipped import (
    default_out,
    find_policy,
    measured,
    shipped_names,
    with_defaults,
)
from geomcache.stages.train.checkpoint import read_card, weights_digest
from geomcache.stages.train.shipping import export_policy
from tests.conftest import TASK
from tests.stages.evaluate.evaluation_folders import keys, write_folder
from tests.stages.train.test_shipping import train_briefly


@pytest.fixture(scope="module")
def run(pack_path: Path, caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_briefly(tmp_path_factory.mktemp("shipped") / "run", pack_path, caches["oracle_pointmap"])


@pytest.fixture(autouse=True)
def exported(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``tiny-soup`` as if it came with geomcache, and another working folder."""
    monkeypatch.setattr(shipped, "shipped_folder", lambda: tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "tiny-soup"
    export_policy(run, folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def _retell(folder: Path, *tasks: dict[str, list[str]]) -> None:
    """As if it had been trained on packs of these tasks."""
    record = json.loads((folder / "export.json").read_text())
    record["trained_on"] = [{**record["trained_on"][0], "tasks": each} for each in tasks]
    card = json.loads((folder / "card.json").read_text())
    (folder / "export.json").write_text(json.dumps(record))
    card["digests"]["export.json"] = digest_file(folder / "export.json")
    (folder / "card.json").write_text(json.dumps(card))


def _settings(folder: Path, **settings: Any) -> EvalConfig:
    return EvalConfig.model_validate({"run": folder, "out": "out", **settings})


def test_a_name_leads_to_the_shipped_policy_and_a_folder_to_itself(exported: Path) -> None:
    assert shipped_names() == ["tiny-soup"]
    assert find_policy(Path("tiny-soup")) == exported
    with pytest.raises(UnknownName, match="did you mean 'tiny-soup'"):
        find_policy(Path("tiny_soup"))
    assert find_policy(Path("runs/tiny-soup")) == Path("runs/tiny-soup")  # no name: told as a missing run
    Path("tiny-soup").mkdir()
    assert find_policy(Path("tiny-soup")) == Path("tiny-soup")


def test_nothing_may_be_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        monkeypatch.setattr(shipped, "shipped_folder", lambda folder=folder: folder)
        assert shipped_names() == []
        with pytest.raises(UnknownName, match="none here"):
            find_policy(Path("tiny-soup"))


def test_results_never_go_into_the_package(exported: Path, run: Path) -> None:
    assert default_out(exported) == Path("runs/eval/tiny-soup")
    assert default_out(run) == run / "eval"


def test_the_command_takes_one_policy_and_names_the_unknown() -> None:
    both = CliRunner().invoke(app, ["eval", "tiny-soup", "--checkpoint", "tiny-soup"])
    assert isinstance(both.exception, InputError)
    assert "leave one out" in str(both.exception)
    unknown = CliRunner().invoke(app, ["eval", "--checkpoint", "tiny-soap"])
    assert isinstance(unknown.exception, UnknownName)
    assert "did you mean 'tiny-soup'" in str(unknown.exception)


@pytest.mark.sim
def test_it_plays_what_it_was_trained_on_unless_told_otherwise(exported: Path, run: Path) -> None:
    found = with_defaults(_settings(exported))
    assert (found.suites, found.tasks, found.execute_steps) == (("libero_object",), (0,), 4)  # chunks of 4
    for told in ({"suites": ("libero_spatial",)}, {"tasks": None}):
        assert with_defaults(_settings(exported, **told)).tasks is None
    told = {"suites": ("libero_object",), "tasks": (3,), "execute_steps": 2}
    assert with_defaults(_settings(exported, **told)) == _settings(exported, **told)
    assert with_defaults(_settings(run)) == _settings(run)  # not exported: the settings as they are

    names = [suites.task_info("libero_object", number).name for number in range(10)]
    _retell(exported, {"libero_object_spread": [names[4]]}, {"libero_object_spread": [names[1], names[4]]})
    assert with_defaults(_settings(exported)).tasks == (1, 4)
    assert with_defaults(_settings(exported)).suites == ("libero_object_spread",)
    assert with_defaults(_settings(exported, suites=("libero_object",))).tasks is None
    _retell(exported, {"libero_object": [names[4]]}, {"libero_spatial": ["put_it_there"]})
    assert with_defaults(_settings(exported, suites=("libero_object",))).tasks == (4,)
    with pytest.raises(UnknownName, match="libero_spatial has no task 'put_it_there'"):
        with_defaults(_settings(exported))
    spatial = suites.task_info("libero_spatial", 0)
    _retell(exported, {"libero_object": [names[4]], "libero_spatial": [spatial.name]})
    with pytest.raises(InputError, match="different tasks"):
        with_defaults(_settings(exported))
    assert with_defaults(_settings(exported, tasks=(2,))).suites == ("libero_object", "libero_spatial")
    kitchen = suites.task_info("libero_10", 0)  # LeRobot sets name a task by its instruction
    _retell(exported, {"libero_10": [kitchen.instruction.replace(" ", "_")]})
    assert with_defaults(_settings(exported)).tasks == (0,)
    _retell(exported, {"unknown": ["anything"]})
    with pytest.raises(InputError, match=r"for which suite[\s\S]*--suite SUITE"):
        with_defaults(_settings(exported))


@pytest.mark.sim
def test_the_command_runs_a_policy_by_its_name_alone(exported: Path) -> None:
    short = [f"--set={text}" for text in ("horizon=4", "settle_steps=0", "workers=0")]
    done = CliRunner().invoke(app, ["eval", "--checkpoint", "tiny-soup", "--episodes", "1", *short])
    assert done.exit_code == 0, done.output
    found = read_results(Path("runs/eval/tiny-soup"))
    assert [(one.suite, one.task_name) for one in found.episodes] == [("libero_object", TASK)]
    assert found.conditions.checkpoint_weights == weights_digest(read_card(exported))
    assert {path.name for path in exported.iterdir()} == {
        *("README.md", "backbone", "card.json", "export.json", "policy.safetensors"),
    }


def test_it_is_served_and_what_needs_its_data_is_refused(exported: Path) -> None:
    served = load_served_policy(ServeConfig(run=exported, execute_steps=4, device="cpu", without_geometry=True))
    assert served.checkpoint == exported
    for command in ("check", "diagnose"):
        found = CliRunner().invoke(app, [command, str(exported)])
        assert isinstance(found.exception, InputError)
        assert "trained on" in str(found.exception)
    with pytest.raises(InputError, match="trained on"):
        blind_training(exported)


def test_figures_come_from_finished_evaluations_of_what_acts(tmp_path: Path) -> None:
    played = keys(suites=("libero_object", "libero_spatial"), tasks=(0, 3), states=range(2, 7), seeds=(7, 8))
    write_folder(tmp_path / "a", played, lambda key: key[0] == "libero_object" and key[2] < 6, camera_orbit=10)
    first, second = measured(tmp_path / "a")
    assert (first.suite, first.tasks, first.init_states, first.seeds) == ("libero_object", (0, 3), (2, 6), (7, 8))
    assert (first.successes, first.episodes, second.successes, second.episodes) == (16, 20, 0, 20)
    assert (round(first.low, 3), round(first.high, 3)) == (0.584, 0.919)  # Wilson's interval of 16/20
    assert first.changes == ("camera orbit ±10°",)
    write_folder(tmp_path / "b", played, lambda _: True, finished=False)
    with pytest.raises(InputError, match="unfinished"):
        measured(tmp_path / "b")
    write_folder(tmp_path / "c", played, lambda _: True, averaged=False)
    with pytest.raises(InputError, match="weights that do not act"):
        measured(tmp_path / "c")


def test_the_export_command_says_what_it_made(run: Path, tmp_path: Path) -> None:
    out, evaluation = tmp_path / "soup", tmp_path / "eval"
    weights = weights_digest(read_card(next((run / "checkpoints").iterdir())))
    write_folder(evaluation, keys(tasks=(0,)), lambda _: True, checkpoint_weights=weights)
    done = CliRunner().invoke(
        app, ["export", str(run), "--out", str(out), "--evaluation", str(evaluation), "--dtype", "fp32", "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["measured"] == ["libero_object 5/5"]
    assert found["bytes"] == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert found["bytes"] > 4 * found["parameters"]
