"""Ranks: when they are started, what they are told, what is refused, and two of them end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from geomcache.cache_schemas.errors import ConfigError, InputError
from geomcache.stages.cli.launch import KILLED, culprit, needs_ranks, strategy_environment
from geomcache.stages.train import ranks
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.run import read_config, run
from tests.conftest import nothing

ACCELERATE = Path(__file__).parents[3] / "configs" / "accelerate"


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"out": "unused", "data": (), "trackers": [], "device": "cpu", **changes})


def test_ranks_are_started_for_several_or_for_a_strategy_but_never_inside_one() -> None:
    assert not needs_ranks(1, "ddp", {})
    assert needs_ranks(2, "ddp", {})
    assert needs_ranks(1, "zero2", {})
    assert needs_ranks(1, "fsdp2", {})
    assert not needs_ranks(2, "ddp", {"RANK": "0"})
    assert not needs_ranks(4, "zero2", {"RANK": "3"})


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_ranks_are_told_what_accelerate_launch_would_tell_them(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own launcher as the oracle, with the shipped file; its own defaults may say more, not otherwise."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        monkeypatch.delenv(name)
    arguments = ["--config_file", str(ACCELERATE / f"{strategy}.yaml"), "-m", "geomcache.stages.train.run", "x.yaml"]
    parsed, file, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    parsed.deepspeed_fields_from_accelerate_config = ",".join(file.deepspeed_config)  # as launch_command goes on
    theirs = prepare_deepspeed_cmd_env(parsed)[1] if strategy == "zero2" else prepare_multi_gpu_env(parsed)
    ours = strategy_environment(strategy)
    lowered = {name: str(theirs.get(name)).lower() for name in ours}
    assert lowered == {name: value.lower() for name, value in ours.items()}
    switches = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    assert [name in ours for name in switches] == [strategy == "fsdp2", strategy == "zero2"]
    assert [theirs.get(name) == "true" for name in switches] == [name in ours for name in switches]
    shipped = yaml.safe_load((ACCELERATE / f"{strategy}.yaml").read_text())
    assert shipped["num_processes"] == 4


def test_what_was_asked_and_what_runs_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="zero2 needs GPUs"):
        ranks.make_accelerator(config(strategy="zero2"))
    with pytest.raises(InputError, match=r"2 \(processes\)[\s\S]*1 running"):
        ranks.make_accelerator(config(processes=2))
    monkeypatch.setattr(ranks, "resolve_device", lambda _: "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"fewer GPUs here than processes[\s\S]*--processes 2"):
        ranks.make_accelerator(config(processes=4, strategy="fsdp2", device="cuda"))


def test_the_rank_that_explains_the_others() -> None:
    """Exit codes of ranks 0, 1, ...; ``ended`` were killed by the launcher because another had failed."""
    assert culprit([0, 0], []) == 0
    assert culprit([143, 143], []) == 0  # all were asked to stop; rank 0 has said so
    assert culprit([1, 2], []) == 1  # a damaged row on rank 1; rank 0 lost its connection
    assert culprit([KILLED, 2, KILLED], [0, 2]) == 1  # the same where the others hang
    assert culprit([1, KILLED], []) == 1  # out of memory
    assert culprit([KILLED, 1], [0]) == 1  # our own bug on rank 1
    assert culprit([2, 2], []) == 0
    assert culprit([130, 1], []) == 0


def geomcache(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "geomcache.stages.cli.app", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)


@pytest.mark.slow
def test_two_ranks_end_to_end(pack_path: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    """JSON and nothing else on standard output; every rank's loss is in the mean; one process cannot take over."""
    sets = ["policy.dit.width=32", "policy.dit.blocks=2", "policy.dit.heads=2", "policy.backbone.config.image_size=28"]
    sets += ["batch_size=2", "open_loop_rows=4", "validation_share=0.34", "trackers=[]", "device=cpu", "log_every=1"]
    train = ["train", "--pack", pack_path, "--cache", caches["oracle_pointmap"], "--steps", 2]
    train += [part for text in sets for part in ("--set", text)]
    done = geomcache(*train, "--out", tmp_path / "two", "--processes", 2, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 2
    assert result["validation"]["rows"] > 0
    assert (tmp_path / "two" / "result.json").exists()
    assert "Traceback" not in done.stderr
    two = read_config(tmp_path / "two")
    changes = {"out": tmp_path / "one", "processes": 1, "gradient_accumulation_steps": 2}
    alone, _ = run(two.model_copy(update=changes), nothing)
    assert alone.parameters == result["parameters"]
    assert alone.validation is not None
    assert alone.validation.loss == pytest.approx(result["validation"]["loss"], rel=1e-4)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()[:2]]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(InputError, match="processes: 2 != 1"):
        run(two.model_copy(update={"processes": 1}), nothing)
