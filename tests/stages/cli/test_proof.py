"""The proof's plan, its judgement and tables against hand-computed values; training is real, closed loop is not."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from geomcache.cache_schemas.errors import ConfigError, InputError
from geomcache.configs.load import load_config
from geomcache.configs.schema import ProofConfig
from geomcache.pipeline.sim import recorder
from geomcache.stages.cli import chain, proof, proof_plan
from geomcache.stages.cli.app import app
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.report.inputs import open_evaluation
from geomcache.stages.evaluate.report.proof import Cost, Rule, Trained, make_results
from geomcache.stages.evaluate.report.proof_tables import comparisons_table, results_page, success_table
from geomcache.stages.evaluate.results import EpisodeKey
from geomcache.stages.train.checkpoint import latest_checkpoint, read_card, weights_digest
from geomcache.stages.train.run import TrainResult
from tests.conftest import TASK, write_demo_file
from tests.stages.evaluate.evaluation_folders import keys, write_folder

STATES = list(range(10))


def _settings(**changes: Any) -> ProofConfig:
    return load_config(
        ProofConfig, "tiny/smallest", [f"{key}={json.dumps(value)}" for key, value in changes.items()], {}
    )


def test_an_arm_changes_what_it_names_and_shares_the_rest() -> None:
    base = {"policy": {"dit": {"width": 8, "blocks": 2}, "backbone": {"stem": {}}}, "steps": 5}
    change = {"policy": {"dit": {"width": 4}, "backbone": {"stem": None}}, "betas": [0.9, 0.99]}
    assert proof_plan.merged(base, change) == {
        "policy": {"dit": {"width": 4, "blocks": 2}, "backbone": {"stem": None}},
        "steps": 5,
        "betas": [0.9, 0.99],
    }
    assert base["policy"] == {"dit": {"width": 8, "blocks": 2}, "backbone": {"stem": {}}}


def test_every_seed_of_a_training_follows_the_training_seed() -> None:
    config = proof_plan.train_config(_settings(), "pool", 3)
    assert (config.seed, config.policy.seed, config.policy.backbone.config["seed"]) == (3, 3, 3)
    assert config.policy.backbone.config["image_size"] == 56  # the shared settings are kept
    assert config.policy.geom_compression_type == "pool"
    assert config.out.parts[-3:] == ("train", "pool", "seed_3")
    assert str(config.data[0].cache).endswith("caches/oracle_pointmap")


@pytest.mark.parametrize("preset", ["tiny/proof", "tiny/geometry", "tiny/language", "tiny/smallest"])
def test_every_arm_and_cell_of_the_presets_is_accepted_by_its_part(preset: str) -> None:
    """Options of backbones and compressors, suites, orbits and rulers included."""
    settings = load_config(ProofConfig, preset, [], {"out": Path("nowhere")})
    for arm in settings.arms:
        assert proof_plan.train_config(settings, arm, 0).device == "cpu"
        for cell in proof_plan.cells_of(settings, arm):
            assert proof_plan.eval_config(settings, arm, 0, cell).workers == 0
    proof_plan.check(settings, proof_plan.chosen(settings, "all"))


def test_the_shipped_gate_is_the_issues() -> None:
    settings = load_config(ProofConfig, "tiny/proof", [], {})
    episodes = proof_plan.eval_config(settings, "none", 0, "random").episodes
    assert settings.gate is not None
    assert settings.gate.at_least["none"] * episodes == 12
    assert settings.gate.at_most["blind"] * episodes == 4
    assert set(settings.core) >= {"blind", "none"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"core": ["none", "pol"]}, "there is no pol"),
        ({"comparisons": [["none/shipped", "pool/shiped"]]}, "there is no pool/shiped"),
        ({"cells.shipped.only": ["pool"]}, "there is no none/shipped"),
        ({"train.seed": 3}, "seeds names the training seeds"),
        ({"arms.pool.settings.stepz": 3}, "did you mean 'steps'"),
        ({"arms.pool.settings.policy.backbone.config.imagesize": 3}, "did you mean 'image_size'"),
        ({"arms.pool.cache": None}, "a cache and a compressor, or neither"),
        ({"cells.shipped.settings.camera_orbits": 3}, "did you mean 'camera_orbit'"),
        ({"eval.tasks": [10]}, "has no task 10"),
        ({"eval.episodes": 51}, "too few initial states"),
    ],
)
def test_a_wrong_setting_of_a_late_part_is_refused_before_the_first(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    command = ["proof", "--config", "tiny/smallest", "--out", str(tmp_path / "p")]
    command += [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    with pytest.raises((ConfigError, InputError, ValueError)) as caught:
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert said in str(caught.value)
    assert not (tmp_path / "p").exists()


def test_arms_are_the_core_those_named_or_all() -> None:
    settings = load_config(ProofConfig, "tiny/proof", [], {})
    core = proof_plan.chosen(settings, None)
    assert tuple(core) == settings.core
    assert core["qformer"] == ["random"]  # the orbit waits until it is asked for
    assert core["blind"] == ["random"]  # a turned camera is nothing to a policy that sees nothing
    assert tuple(proof_plan.chosen(settings, "all")) == tuple(settings.arms)
    asked = proof_plan.chosen(settings, "qformer,none")
    assert tuple(asked) == ("qformer", "none")
    assert asked["qformer"] == ["random", "orbit"]
    rulers = proof_plan.chosen(load_config(ProofConfig, "tiny/geometry", [], {}), "qformer,none")
    assert "shuffled_geometry" in rulers["qformer"]
    assert "shuffled_geometry" not in rulers["none"]
    assert proof_plan.caches_of(settings, ["none", "qformer"]) == ["oracle_pointmap"]
    with pytest.raises(InputError, match="no arm qfomer"):
        proof_plan.chosen(settings, "qfomer")


def test_two_processes_share_the_arms_longest_first() -> None:
    times = {"demos": 100.0, "train/a/seed_0": 30.0, "train/b/seed_0": 50.0, "train/c/seed_0": 40.0}
    lines = [proof_plan.Line(part, "to do", seconds) for part, seconds in times.items()]
    lines += [proof_plan.Line("eval/a/seed_0/random", "to do", 5.0)]
    settings = load_config(ProofConfig, "tiny/proof", [], {})
    assert proof_plan.seconds_to_go(settings, lines) == 100 + max(50, 40 + 35)


def _wins(states: set[int]) -> Callable[[EpisodeKey], bool]:
    return lambda key: key[2] in states


def _trained(
    folder: Path, arm: str, seed: int, cells: dict[str, set[int]], cpu: float = 1.0, seeds: tuple[int, ...] = (7,)
) -> Trained:
    """``cells``: which of STATES succeed; ``seeds``: of evaluation."""
    result = TrainResult(
        run="r", checkpoint="c", steps=10, rows=5, parameters=2_000_000, trainable_parameters=2_000_000,
        open_loop_error=0.1 + 0.1 * seed, mean_action_error=0.4, open_loop_rows=8,
    )  # fmt: skip
    evaluations = {}
    for cell, wins in cells.items():
        path = folder / arm / str(seed) / cell
        write_folder(path, keys(tasks=(0,), states=STATES, seeds=seeds), _wins(wins), seeds=seeds)
        evaluations[cell] = open_evaluation(path, f"{arm}/{cell}")
    return Trained(arm, "none", seed, result, Cost(cpu_seconds=cpu), evaluations)


def test_pairs_of_all_training_seeds_are_counted_together_and_seeds_stay_beside_them(tmp_path: Path) -> None:
    """none wins 2 of 10 three times; b wins the same 2 and 3, 2, 1 others: 6 discordant pairs of 30, all one way."""
    wins_b = [{0, 1, 2, 3, 4}, {0, 1, 2, 3}, {0, 1, 2}]
    trained = [_trained(tmp_path, "none", seed, {"random": {0, 1}}, 100.0 + seed) for seed in range(3)]
    trained += [_trained(tmp_path, "b", seed, {"random": wins_b[seed]}, 200.0) for seed in range(3)]
    rules = [
        Rule("b", "random", "at least", 0.4),
        Rule("none", "random", "at most", 0.19),
        Rule("gone", "random", "at least", 1.0),
    ]
    wanted = [("none/random", "b/random"), ("none/random", "gone/random")]
    results = make_results(trained, wanted, rules, {"train/none/seed_0": Cost(wall_seconds=7.0, cpu_seconds=6.0)})
    (found,) = results.comparisons
    assert (found.pairs.count, found.pairs.both, found.pairs.only_a, found.pairs.only_b) == (30, 6, 0, 6)
    assert found.p == pytest.approx(2 * 0.5**6)  # McNemar: six of six
    assert found.by_seed == pytest.approx({0: 0.3, 1: 0.2, 2: 0.1})
    assert found.over_seeds is not None
    assert found.over_seeds.mean == pytest.approx(0.2)
    half = 4.302653 * 0.1 / 3**0.5  # Student's t, two degrees of freedom, standard deviation 0.1
    assert found.over_seeds.low == pytest.approx(0.2 - half, abs=1e-5)
    assert found.low < 0.2 < found.high
    assert results.missing == (("none/random", "gone/random"),)
    none, b = results.arms
    assert (none.cpu_seconds, b.cpu_seconds) == (101.0, 200.0)
    assert none.open_loop_error == pytest.approx(0.2)
    assert (b.cells["random"].successes, b.cells["random"].episodes) == (12, 30)
    assert {seed: one.successes for seed, one in b.cells["random"].by_seed.items()} == {0: 5, 1: 4, 2: 3}
    assert [line.failed for line in results.gate] == [False, True, False]  # 12/30, 6/30, not evaluated
    assert not results.passed
    page = results_page(results, "geomcache proof")
    for said in (
        "| none | none | 2,000,000 | 10 | 101 | 0.200 | - | 0.400 |",
        "| none | 6/30 [0.10, 0.37] |",
        "- none in random: 6/30, at most 19% wanted: does not hold",
        "| b | random | 5/10 | 4/10 | 3/10 |",
        "+30, +20, +10; mean +20.0 [-5, +45]",
        "| train/none/seed_0 | 7 | 6 |",
        "gone/random against none/random",
        "- b/random against none/random: not resolved (+20.0 pp, corrected p = 0.062). With these 30 pairs",
        "libero_object, tasks 0, initial states 0 to 9, seeds 7",
    ):
        assert said in page, page


def test_seeds_of_one_placement_are_drawn_together(tmp_path: Path) -> None:
    """b wins in the same 5 of 10 states with every seed, none nowhere: the mean of states is binomial(10, 1/2) / 10.

    Its 2.5 % and 97.5 % quantiles are 2 and 8 (1.1 % lie below 2, 5.5 % below 3). Seeds drawn apart would give 0.35.
    """
    seeds = (7, 8)  # of evaluation; with 3 of training each state has 6 pairs
    trained = [_trained(tmp_path, "none", seed, {"random": set()}, seeds=seeds) for seed in range(3)]
    trained += [_trained(tmp_path, "b", seed, {"random": set(range(5))}, seeds=seeds) for seed in range(3)]
    (found,) = make_results(trained, [("none/random", "b/random")], [], {}).comparisons
    assert (found.pairs.count, found.difference) == (60, pytest.approx(0.5))
    assert (found.low, found.high) == (pytest.approx(0.2), pytest.approx(0.8))
    assert found.sentence.endswith(": a difference is supported (+50.0 pp, corrected p = 1.9e-09).")
    (turned,) = make_results(trained, [("b/random", "none/random")], [], {}).comparisons
    assert (turned.low, turned.difference, turned.high) == pytest.approx((-0.8, -0.5, -0.2))


def test_a_cell_of_some_arms_leaves_the_others_blank_and_can_be_compared_with_another_cell(tmp_path: Path) -> None:
    trained = [
        _trained(tmp_path, "none", 0, {"random": set()}, 1.0),
        _trained(tmp_path, "b", 0, {"random": set(STATES), "ruler": {0}}, 1.0),
    ]
    results = make_results(trained, [("b/random", "b/ruler"), ("none/random", "b/random")], [], {})
    table = success_table(results)
    assert table.columns == ["arm", "random", "ruler"]
    assert [line[-1] for line in table.cells] == ["-", "1/10 [0.02, 0.40]"]
    shuffled = results.arms[1].cells["ruler"].model_copy(update={"told": results.arms[1].cells["random"]})
    arm = results.arms[1].model_copy(update={"cells": {"wrong": shuffled}})
    (line,) = success_table(results.model_copy(update={"arms": (arm,)})).cells
    assert line == ["b", "1/10 [0.02, 0.40]; as told 10/10 [0.72, 1.00]"]
    first, second = results.comparisons
    assert (first.pairs.only_a, first.pairs.only_b, second.pairs.only_b) == (9, 0, 10)
    assert second.p_holm == pytest.approx(2 * 2 * 0.5**10)  # the smaller of two is doubled
    compared = comparisons_table(results)
    assert compared is not None
    assert compared.cells[0][:4] == ["b/ruler against b/random", "10", "9", "0"]
    assert results.passed


@pytest.mark.parametrize(
    ("wins", "said"),
    [
        (({*STATES}, {*STATES}), "not resolved (+100.0 pp, corrected p = 1.9e-06). It takes 3 training seeds."),
        (({*STATES}, {*STATES}, set()), "not resolved (+66.7 pp, corrected p = 1.9e-06). The training seeds disagree"),
        (({0}, {1}, {2}), "not resolved (+10.0 pp, corrected p = 0.25). With these 30 pairs a difference below about"),
    ],
)
def test_a_difference_is_supported_by_three_seeds_of_one_sign_or_not_at_all(
    wins: tuple[set[int], ...], said: str, tmp_path: Path
) -> None:
    trained = [_trained(tmp_path, "none", seed, {"random": set()}) for seed in range(len(wins))]
    trained += [_trained(tmp_path, "b", seed, {"random": won}) for seed, won in enumerate(wins)]
    (found,) = make_results(trained, [("none/random", "b/random")], [], {}).comparisons
    assert found.sentence.startswith(f"b/random against none/random: {said}")
    assert not found.supported


def test_what_a_part_costs_adds_up_over_stops_and_begins_anew_with_its_folder(tmp_path: Path) -> None:
    path, folder = tmp_path / "costs" / "x.json", tmp_path / "made"

    def works(progress: chain.Progress) -> bool:
        folder.mkdir(exist_ok=True)
        progress(1, 2, "")
        time.sleep(0.15)
        return False

    def stopped(progress: chain.Progress) -> bool:
        works(progress)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chain.with_cost(path, folder, stopped, lambda *_: None)
    assert not chain.with_cost(path, folder, works, lambda *_: None)
    twice = chain.read_cost(path)
    assert twice is not None
    assert 0.2 <= twice.wall_seconds < 5
    assert chain.with_cost(path, folder, lambda _: True, lambda *_: None)  # stood already: costs nothing
    assert chain.read_cost(path) == twice
    folder.rmdir()
    chain.with_cost(path, folder, works, lambda *_: None)
    once = chain.read_cost(path)
    assert once is not None
    assert once.wall_seconds < twice.wall_seconds


_PARENT = """
import os, signal, sys, time
from functools import partial
from pathlib import Path
from geomcache.stages.cli import chain

chain._TOLD_AGAIN_SECONDS = 0.5
folder = Path(sys.argv[1])

def saves_when_asked(progress):
    def save(*_):
        (folder / "saved").touch()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(143)
    signal.signal(signal.SIGTERM, save)
    (folder / "begun").write_text(str(os.getpid()))
    time.sleep(60)
    return False

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    chain.side_by_side([[("a", saves_when_asked)]], 1, 1)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_parts_save_and_end_when_their_parent_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    """Else the next command would find their locks. The part does what a training does with signals."""
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], stderr=subprocess.DEVNULL) as parent:
        _wait_for(tmp_path / "begun")
        parent.send_signal(number)
    _wait_for(tmp_path / "saved")
    _wait_for(Path("/proc") / (tmp_path / "begun").read_text(), gone=True)


def _wait_for(path: Path, *, gone: bool = False) -> None:
    deadline = time.monotonic() + 90
    while path.exists() is gone:
        assert time.monotonic() < deadline, path
        time.sleep(0.1)


@pytest.mark.slow
def test_the_command_trains_each_arm_judges_what_stands_and_skips_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Demonstrations stand and evaluations are invented; what they are of is read from the real checkpoints."""
    out = tmp_path / "proof"
    write_demo_file(out / "demos" / f"{TASK}_demo.hdf5")
    finished = recorder.RecordSummary(attempted=0, succeeded=0, failed=0, frames=0, seconds=0.0, files=())
    monkeypatch.setattr(recorder, "record", lambda *_: finished)
    monkeypatch.setattr(proof, "_arms", _arms_here)
    command = ["proof", "--config", "tiny/smallest", "--out", str(out), "--arms", "none"]
    sets = ["train.policy.backbone.config.image_size=28", "eval.episodes=10", "gate.at_least.none=0.6"]
    command += [part for text in sets for part in ("--set", text)]
    failed = CliRunner().invoke(app, command)
    assert failed.exit_code == 1, failed.output
    assert "the gate: none in shipped: 0/10, at least 60% wanted: does not hold" in failed.output
    assert not (out / "caches").exists()  # no arm asked for reads one
    page = (out / "results.md").read_text()
    assert "| none | none |" in page
    assert "Not compared, a side was not evaluated: pool/shipped against none/shipped" in page
    assert (out / "reports" / "shipped_seed_0.html").exists()
    planned = CliRunner().invoke(app, [*command, "--dry-run", "--json"])
    states = {line["part"]: line["state"] for line in json.loads(planned.stdout)["parts"]}
    assert states == {
        "demos": "begun",  # not by the recorder: no digest
        "pack": "finished",
        "train/none/seed_0": "finished",
        "eval/none/seed_0/shipped": "finished",
    }
    again = CliRunner().invoke(app, [*command[:-2], "--set", "gate.at_least.none=0", "--json"])
    assert again.exit_code == 0, again.output
    assert "pack: finished before with the same inputs, skipped" in again.output
    other = CliRunner().invoke(app, [*command, "--set", "eval.horizon=17", "--dry-run", "--json"])
    states = {line["part"]: line["state"] for line in json.loads(other.stdout)["parts"]}
    assert states["eval/none/seed_0/shipped"] == "begun"  # stands for another horizon


def _arms_here(settings: ProofConfig, work: proof_plan.Work) -> None:
    for arm in work:
        proof.train_one(settings, arm, 0, lambda *_: None)
        config = proof_plan.eval_config(settings, arm, 0, "shipped")
        weights = weights_digest(read_card(latest_checkpoint(config.run)))
        # suites and episodes follow from the keys (10 are the class's default); the others are of Conditions
        names = set(EvalConfig.model_fields) - {"suites", "episodes", "mode", "batch_size", "device"}
        plain = {name: getattr(config, name) for name in names}
        found = keys(tasks=(0,), states=STATES)
        write_folder(config.out, found, lambda _: False, checkpoint_weights=weights, **plain)
