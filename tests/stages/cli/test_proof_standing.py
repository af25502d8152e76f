"""What of a proof's folder counts as finished, and what its gate says: trainings and evaluations written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from geomcache.configs.load import load_config
from geomcache.configs.schema import ProofConfig
from geomcache.pipeline.files import write_config
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.stages.cli import proof, proof_plan
from geomcache.stages.cli.app import app
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.results import RESULTS_NAME
from geomcache.stages.train.checkpoint import WEIGHTS_NAME, CheckpointCard, weights_digest, write_card
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.run import RESULT_NAME, TrainResult
from tests.conftest import build_pack_at, nothing, write_demo_file
from tests.stages.evaluate.evaluation_folders import keys, write_folder

ARMS = {"none": range(2), "pool": range(5)}  # -> initial states of 10 in which it succeeds
TRAININGS, EVALUATIONS = [f"train/{arm}/seed_0" for arm in ARMS], [f"eval/{arm}/seed_0/shipped" for arm in ARMS]
SETTINGS = ["eval.episodes=10"]


@pytest.fixture
def out(tmp_path: Path, pack_path: Path, caches: dict[str, Path]) -> Path:
    """The folder of a proof, its pack and cache the shared ones."""
    out = tmp_path / "proof"
    (out / "caches").mkdir(parents=True)
    (out / "pack").symlink_to(pack_path)
    (out / "caches" / "oracle_pointmap").symlink_to(caches["oracle_pointmap"])
    for arm in ARMS:
        _write_arm(_settings(out), arm)
    return out


def _settings(out: Path, *changes: str) -> ProofConfig:
    return load_config(ProofConfig, "tiny/smallest", [*SETTINGS, *changes], {"out": out})


def _write_arm(settings: ProofConfig, arm: str) -> None:
    """Its training and evaluation as the commands leave them, but for weights that nobody can load."""
    config, cell = proof_plan.train_config(settings, arm, 0), proof_plan.eval_config(settings, arm, 0, "shipped")
    checkpoint = config.out / "checkpoints" / f"step_{config.steps:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / WEIGHTS_NAME).write_text(arm)
    with PackReader(config.data[0].pack) as pack:
        card = CheckpointCard(
            step=config.steps,
            policy=config.policy,
            contract=pack.info.contract,
            recipe=CachedTokens(Path(config.data[0].cache)).recipe if config.data[0].cache else None,
            normaliser=Normaliser.fit(pack.states_NS, pack.actions_NA),
            packs=(pack.info.digest,),
            geomcache_version="0",
        )
    card = write_card(checkpoint, card)
    result = TrainResult(
        run="r", checkpoint=checkpoint.name, steps=config.steps, rows=25, parameters=9, trainable_parameters=9,
        open_loop_error=0.1, mean_action_error=0.4, open_loop_rows=8,
    )  # fmt: skip
    write_config(config.out, config)
    (config.out / RESULT_NAME).write_text(result.model_dump_json())
    # suites and episodes follow from the keys (10 are the class's default); the others are of Conditions
    names = set(EvalConfig.model_fields) - {"suites", "episodes", "mode", "batch_size", "device"}
    plain = {name: getattr(cell, name) for name in names}
    episodes = keys(tasks=(0,), states=range(10))
    write_folder(cell.out, episodes, lambda key: key[2] in ARMS[arm], checkpoint_weights=weights_digest(card), **plain)


def _finished(out: Path, *changes: str) -> set[str]:
    """What the plan shows as finished, and the report counts; they must agree."""
    settings = _settings(out, *changes)
    shown = {line.part for line in proof_plan.dry_run(settings, proof_plan.chosen(settings, "all"))
             if line.state == "finished" and "/" in line.part}  # fmt: skip
    counted = set()
    for one in proof_plan.standing(settings):
        counted |= {f"train/{one.arm}/seed_0", *(f"eval/{one.arm}/seed_0/{cell}" for cell in one.evaluations)}
    assert shown == counted
    return shown


@pytest.mark.parametrize(
    "change",
    [
        "eval.suites=[libero_spatial]",
        "eval.tasks=[1]",
        "eval.episodes=9",
        "eval.first_init_state=1",
        "eval.seeds=[8]",
        "eval.execute_steps=7",
    ],
)
def test_an_evaluation_of_other_settings_is_not_finished(out: Path, change: str) -> None:
    assert _finished(out) == {*TRAININGS, *EVALUATIONS}
    assert _finished(out, change) == {*TRAININGS}


@pytest.mark.parametrize("change", [{"finished": False}, {"conditions": {"checkpoint_weights": "0" * 64}}])
def test_an_unfinished_evaluation_and_one_of_other_weights_are_begun(out: Path, change: dict[str, Any]) -> None:
    path = out / EVALUATIONS[0] / RESULTS_NAME
    found = json.loads(path.read_text())
    for name, value in change.items():
        found[name] = {**found[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(found))
    assert _finished(out) == {*TRAININGS, EVALUATIONS[1]}


def test_a_training_of_other_settings_or_without_its_result_does_not_stand_nor_what_was_evaluated_of_it(
    out: Path,
) -> None:
    assert _finished(out, "train.steps=5") == set()
    assert _finished(out, "arms.pool.settings.batch_size=3") == {TRAININGS[0], EVALUATIONS[0]}
    (out / TRAININGS[0] / RESULT_NAME).unlink()
    assert _finished(out) == {TRAININGS[1], EVALUATIONS[1]}


def test_a_training_on_another_pack_does_not_stand(out: Path, tmp_path: Path) -> None:
    other = build_pack_at(write_demo_file(tmp_path / "other_demo.hdf5", seed=8, lengths=(5,)), tmp_path / "other")
    (out / "pack").unlink()
    (out / "pack").symlink_to(other)
    assert _finished(out) == set()


def test_a_training_on_another_cache_does_not_stand(out: Path, caches: dict[str, Path]) -> None:
    cache = out / "caches" / "oracle_pointmap"
    cache.unlink()
    cache.symlink_to(caches["depth_anything3"])
    assert _finished(out) == {TRAININGS[0], EVALUATIONS[0]}


def test_the_commands_gate_holds_both_ways_and_its_comparison_has_the_right_sign(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 of 10 without geometry, the same 2 and 3 others with it."""
    for name in ("_data", "_arms"):  # all stands
        monkeypatch.setattr(proof, name, nothing)
    monkeypatch.setattr(proof, "_pages", lambda *_: [])  # they take a second a run

    def run(gate: str) -> tuple[int, str]:
        sets = [part for text in (*SETTINGS, gate) for part in ("--set", text)]
        found = CliRunner().invoke(app, ["proof", "--config", "tiny/smallest", "--out", str(out), *sets])
        return found.exit_code, found.output

    assert run("gate.at_most.none=0.2")[0] == 0
    code, said = run("gate.at_most.none=0.1")
    assert code == 1
    assert "the gate: none in shipped: 2/10, at most 10% wanted: does not hold" in said
    assert run("gate.at_least.pool=0.5")[0] == 0
    assert run("gate.at_least.pool=0.6")[0] == 1
    (found,) = json.loads((out / proof.RESULTS_NAME).read_text())["comparisons"]
    assert (found["a"], found["b"], found["difference"]) == ("none/shipped", "pool/shipped", pytest.approx(0.3))
    assert found["low"] + found["high"] > 0


def test_a_training_whose_cache_is_gone_does_not_stand(out: Path) -> None:
    (out / "caches" / "oracle_pointmap").unlink()
    assert _finished(out) == {TRAININGS[0], EVALUATIONS[0]}
