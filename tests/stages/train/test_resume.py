"""Stop at any moment, by signal or by kill; what comes of it is bit for bit what an undisturbed run gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from geomcache.stages.train.checkpoint import checkpoints_of, step_of
from geomcache.stages.train.config import DataPair, LearningRates, TrainConfig
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.run import run
from geomcache.stages.train.stopping import TrainingStopped
from tests.conftest import nothing

FILES = ("policy.safetensors", "ema.safetensors", "optimizer.pt")
TEXT_OF_A_SIGNAL = "saved, the same command continues"


@pytest.fixture
def config(pack_path: Path, caches: dict[str, Path], tmp_path: Path) -> TrainConfig:
    """Everything that is random or remembered is on: dropout, geometry dropout, accumulation, EMA, validation."""
    return TrainConfig(
        out=tmp_path / "whole",
        data=(DataPair(pack=pack_path, cache=caches["oracle_pointmap"]),),
        policy=PolicyConfig.model_validate(
            {
                "dit": {"width": 32, "blocks": 2, "heads": 2, "future_tokens": 2, "dropout": 0.1},
                "backbone": {"config": {"image_size": 28}},
                "repeated_diffusion_steps": 2,
            }
        ),
        steps=12,
        batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=LearningRates(vlm=1e-3, head=1e-3),
        warmup_steps=2,
        ema_decay=0.9,
        geom_dropout=0.3,
        validation_share=0.34,
        validate_every=4,
        validation_rows=4,
        save_every=4,
        keep_last=5,
        log_every=1,
        open_loop_rows=4,
        trackers=(),
        device="cpu",
    )


def _outcome(run_folder: Path) -> dict[str, Any]:
    last = checkpoints_of(run_folder)[-1]
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("data_wait_share", "seconds_per_step")
    files = {name: (last / name).read_bytes() for name in FILES}
    result = json.loads((run_folder / "result.json").read_text())
    return {
        **files,
        "step": last.name,
        "lines": [{name: value for name, value in line.items() if name not in timed} for line in lines],
        "validation": result["validation"],
        "error": result["open_loop_error"],
    }


class Command:
    """`geomcache train` in a process of its own, with as many ranks as configured."""

    def __init__(self, config: TrainConfig, folder: Path, tag: str) -> None:
        file, self._log = folder / f"{tag}.yaml", folder / f"{tag}.log"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = [sys.executable, "-m", "geomcache.stages.cli.app", "train", "--config", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def text(self) -> str:
        return self._log.read_text()

    def ends_with(self) -> int:
        return self.process.wait(120)

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 100
        while not path.exists():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def children(self) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]


def test_stopped_at_every_step_by_a_signal(config: TrainConfig, tmp_path: Path) -> None:
    """A signal after each single step; each time the run saves, ends with 128 + 15, and goes on where it was."""
    run(config, nothing)
    other = config.model_copy(update={"out": tmp_path / "stopped"})

    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    for step in range(1, config.steps):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(TrainingStopped) as caught:
            run(other, stop)
        assert (caught.value.code, caught.value.step) == (143, step)
        assert TEXT_OF_A_SIGNAL in caught.value.text
        assert signal.getsignal(signal.SIGTERM) is before
    assert run(other, nothing)[0].steps == config.steps
    assert _outcome(other.out) == _outcome(config.out)


def _wait_until_gone(pids: list[int]) -> None:
    """Nothing is left of a command whose first process was killed."""
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 2)])
def test_killed_and_signalled_processes(config: TrainConfig, tmp_path: Path, ranks: int, workers: int) -> None:
    """kill -9 between checkpoints (of the launcher where there is one: its ranks save and end), then SIGTERM, then to
    the end; equal to a run without loader processes that nothing happened to."""
    accumulation = config.gradient_accumulation_steps // ranks
    config = config.model_copy(
        update={"processes": ranks, "gradient_accumulation_steps": accumulation, "steps": 40, "save_every": 3}
    )
    whole = Command(config, tmp_path, "whole")
    other = config.model_copy(update={"out": tmp_path / "cut", "data_workers": workers})
    cut = Command(other, tmp_path, "cut")
    cut.wait_for(other.out / "checkpoints" / "step_00000003")
    left = cut.children()
    os.kill(cut.process.pid, signal.SIGKILL)
    assert cut.ends_with() != 0
    _wait_until_gone(left)
    assert not (other.out / "result.json").exists()
    following = other.out / "checkpoints" / f"step_{step_of(checkpoints_of(other.out)[-1]) // 3 * 3 + 3:08d}"
    cut = Command(other, tmp_path, "again")
    cut.wait_for(following)
    if ranks == 1:
        os.killpg(cut.process.pid, signal.SIGTERM)  # schedulers signal every process of a job, loaders too
    else:
        os.kill(cut.children()[1], signal.SIGTERM)  # one rank alone has got it: all stop together
    assert cut.ends_with() == 143, cut.text()
    assert TEXT_OF_A_SIGNAL in cut.text()
    assert checkpoints_of(other.out)[-1] >= following
    last = Command(other, tmp_path, "last")
    assert last.ends_with() == 0, last.text()
    assert whole.ends_with() == 0, whole.text()
    assert _outcome(other.out) == _outcome(config.out)


def test_what_stays(config: TrainConfig) -> None:
    run(config.model_copy(update={"save_every": 2, "keep_last": 1, "keep_every": 6}), nothing)
    assert [path.name for path in checkpoints_of(config.out)] == ["step_00000006", "step_00000012"]


def test_parts_and_whole_batches_are_the_same_step(config: TrainConfig, tmp_path: Path) -> None:
    """Twice 2 samples is once 4 samples, though episode ends make their numbers of real actions differ."""
    policy = config.policy.model_copy(update={"dit": config.policy.dit.model_copy(update={"dropout": 0.0})})
    config = config.model_copy(update={"policy": policy, "steps": 3, "save_every": 3})
    run(config, nothing)
    whole = config.model_copy(update={"out": tmp_path / "4", "batch_size": 4, "gradient_accumulation_steps": 1})
    run(whole, nothing)
    parts, once = ([line for line in _outcome(c.out)["lines"] if "loss" in line] for c in (config, whole))
    for part, one in zip(parts, once, strict=True):
        assert part["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert part["loss_per_action_dim"] == pytest.approx(one["loss_per_action_dim"], rel=1e-4)
        assert part["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)


def test_the_averaged_weights_are_an_average(config: TrainConfig) -> None:
    """By hand from every step's weights: decay min(0.9, (1 + n) / (10 + n)), starting from the initial ones."""
    config = config.model_copy(update={"save_every": 1, "keep_last": 20, "steps": 6, "ema_decay": 0.35})
    run(config, nothing)
    found = checkpoints_of(config.out)
    name = "dit.out.weight"
    weights = [load_file(path / "policy.safetensors")[name].double() for path in found]
    averages = [load_file(path / "ema.safetensors")[name].double() for path in found]
    for n in range(2, 7):
        decay = min(0.35, (1 + n) / (10 + n))
        expected = decay * averages[n - 2] + (1 - decay) * weights[n - 1]
        torch.testing.assert_close(averages[n - 1], expected, atol=1e-7, rtol=0)
    assert not torch.equal(averages[-1], weights[-1])
