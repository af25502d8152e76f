"""Arms that differ in the compressor alone: same rows, same shared weights; stopped, resumed, compared."""

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from typer.testing import CliRunner, Result

from geomcache.cache_schemas.errors import ConfigError, GeomcacheError, InputError, UnknownName
from geomcache.stages.cli import train as module
from geomcache.stages.cli.app import app
from geomcache.stages.train.ablation import arms, require_trainable
from geomcache.stages.train.checkpoint import checkpoints_of
from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.run import build_policy
from tests.conftest import extract_without_ray

EVERY = ["none", "pool", "qformer", "per_layer", "gated"]
SETTINGS = {
    "policy": {
        "dit": {"width": 32, "blocks": 2, "heads": 2, "future_tokens": 2},
        "backbone": {"config": {"image_size": 28}},
        "repeated_diffusion_steps": 1,
        "geom_dit_tokens": 4,
    },
    "steps": 4,
    "batch_size": 2,
    "warmup_steps": 1,
    "save_every": 2,
    "log_every": 1,
    "validation_share": 0.34,
    "validation_rows": 4,
    "open_loop_rows": 4,
    "trackers": [],
    "device": "cpu",
}


@pytest.fixture
def config(pack_path: Path, caches: dict[str, Path], tmp_path: Path) -> TrainConfig:
    data = (DataPair(pack=pack_path, cache=str(caches["oracle_pointmap"])),)
    return TrainConfig.model_validate({**SETTINGS, "data": data, "out": tmp_path / "ablation"})


def test_arms_have_the_same_rows_and_the_same_weights_where_they_share_them(config: TrainConfig) -> None:
    chosen = arms(config, EVERY)
    assert list(chosen) == EVERY
    assert {arm.out for arm in chosen.values()} == {config.out / name for name in EVERY}
    order, weights = {}, {}
    for name, arm in chosen.items():
        data = TrainingData(arm)
        policy = build_policy(arm, data)
        assert policy.config.compressor == name
        normaliser = Normaliser.fit(data.states(), data.labels(np.arange(len(data))), arm.normalisation, arm.gripper)
        maker = BatchMaker(data, policy.backbone.packer, normaliser, arm)
        order[name] = np.stack([maker.rows(step) for step in range(30)])
        parts = ("backbone.", "dit.")
        weights[name] = {key: value for key, value in policy.state_dict().items() if key.startswith(parts)}
    for name in EVERY[1:]:
        np.testing.assert_array_equal(order[name], order["none"])
        assert weights[name].keys() == weights["none"].keys()
        assert all(torch.equal(weights[name][key], value) for key, value in weights["none"].items())


def test_nothing_but_the_compressor_differs(config: TrainConfig) -> None:
    config = config.model_copy(update={"mapanything_model_path": "weights"})
    for name, arm in arms(config, EVERY).items():
        assert arm.policy.compressor == name
        policy = arm.policy.model_copy(update={"geom_compression_type": "pool", "geom_inject_to_dit": True})
        undone = {"out": config.out, "policy": policy, "mapanything_model_path": "weights"}
        assert arm.model_copy(update=undone) == config
        assert arm.mapanything_model_path == (None if name == "none" else "weights")
    heads = PolicyConfig.model_validate({"geom_compression_type": "qformer", "geom_compression": {"heads": 4}})
    chosen = arms(config.model_copy(update={"policy": heads}), EVERY)
    options = {name: arm.policy.geom_compression for name, arm in chosen.items()}
    assert options == {name: {"heads": 4} if name == "qformer" else {} for name in EVERY}


def test_every_arms_faults_are_named_before_the_first_trains(
    config: TrainConfig, pack_path: Path, tmp_path: Path
) -> None:
    def fault(kind: type[GeomcacheError], names: list[str], **changes: Any) -> str:
        with pytest.raises(kind) as caught:
            require_trainable(arms(config.model_copy(update=changes), names))
        assert not config.out.exists()
        return str(caught.value)

    assert "each once" in fault(ConfigError, [])
    assert "none,pool,none" in fault(ConfigError, ["none", "pool", "none"])
    assert "did you mean 'gated'" in fault(UnknownName, ["none", "gate"])
    assert "no compressor named ''" in fault(UnknownName, ["none", ""])
    assert "no compressor named '../x'" in fault(UnknownName, ["none", "../x"])
    assert "reads a token cache" in fault(ConfigError, ["none", "pool"], data=(DataPair(pack=pack_path),))
    cache = extract_without_ray(pack_path, "oracle_pointmap", tmp_path / "pooled", pool=4)
    data = (DataPair(pack=pack_path, cache=str(cache)),)
    assert "'qformer' reads every token" in fault(ConfigError, ["none", "pool", "qformer"], data=data)
    policy = config.policy.model_copy(update={"geom_dit_tokens": 33})
    assert "1 to 32" in fault(ConfigError, ["none", "pool"], policy=policy)
    policy = config.policy.model_copy(update={"geom_compression": {"heads": 2}})
    assert "unknown key 'heads'" in fault(ConfigError, ["none", "pool"], policy=policy)
    assert "was not made by MapAnything" in fault(ConfigError, ["none", "pool"], mapanything_model_path="weights")
    (config.out / "pool").mkdir(parents=True)
    (config.out / "pool" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        require_trainable(arms(config, ["none", "pool"]))


@pytest.fixture
def command(config: TrainConfig) -> Callable[..., Result]:
    """``geomcache train --ablation none,pool``, in this process."""
    file = config.out.with_suffix(".yaml")
    file.write_text(json.dumps(config.model_dump(mode="json")))  # JSON is YAML

    def run(*more: object) -> Result:
        AcceleratorState._reset_state(reset_partial_state=True)
        return CliRunner().invoke(app, ["train", "--config", str(file), "--ablation", "none, pool", *map(str, more)])

    return run


def test_the_comparison(config: TrainConfig, command: Callable[..., Result]) -> None:
    done = command("--steps", 20, "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == ["arm none: trained", "arm pool: trained"]
    table = json.loads(done.stdout)
    assert table == json.loads((config.out / "ablation.json").read_text())
    for arm in table["arms"]:
        result = json.loads((config.out / arm["name"] / "result.json").read_text())
        lines = [json.loads(line) for line in (config.out / arm["name"] / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == 20
        assert arm["loss"] == pytest.approx(np.mean(losses[-2:]))
        assert arm["validation_loss"] == result["validation"]["loss"]
        assert arm["open_loop_error"] == result["open_loop_error"]
        assert arm["parameters"] == result["parameters"]
    none, pool = table["arms"]
    assert pool["parameters"] - none["parameters"] == 3 * 128 + 128  # D C + C
    assert none["mean_action_error"] == pool["mean_action_error"]
    with Image.open(io.BytesIO((config.out / "ablation.png").read_bytes())) as picture:
        assert min(picture.size) > 300
    words = command("--steps", 20)
    assert words.stderr.splitlines()[:2] == ["arm none: finished before", "arm pool: finished before"]
    for text in ("none", "pool", "held-out", f"{none['open_loop_error']:.4f}"):
        assert text in words.stdout


def test_stopped_in_the_second_arm(
    config: TrainConfig, command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command leaves the first arm alone; the comparison is that of an ablation nothing happened to."""

    @contextmanager
    def bar(title: str, **_: Any) -> Iterator[Callable[..., None]]:
        yield lambda done, *_: os.kill(os.getpid(), signal.SIGTERM) if (title, done) == ("training pool", 3) else None

    with monkeypatch.context() as patched:
        patched.setattr(module, "progress_bar", bar)
        stopped = command("--json")
    assert (stopped.exit_code, stopped.stdout) == (143, "")
    assert stopped.stderr.splitlines()[0] == "arm none: trained"
    assert "stopped by SIGTERM after step 3; saved, the same command continues" in stopped.stderr
    assert not (config.out / "ablation.json").exists()
    first = checkpoints_of(config.out / "none")[-1] / "policy.safetensors"
    written = first.stat().st_mtime_ns
    again = command("--json")
    assert again.exit_code == 0, again.output
    assert again.stderr.splitlines() == ["arm none: finished before", "arm pool: trained"]
    assert first.stat().st_mtime_ns == written
    whole = command("--json", "--out", config.out.with_name("whole"))
    timed = {"seconds_per_step", "data_wait_share"}
    tables = [
        [{key: value for key, value in arm.items() if key not in timed} for arm in json.loads(done.stdout)["arms"]]
        for done in (again, whole)
    ]
    assert tables[0] == tables[1]
