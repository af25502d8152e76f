"""Weights and optimiser state that ranks hold in parts: the checkpoint is whole, and a resumed run bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from geomcache.cache_schemas.errors import InputError
from geomcache.stages.cli import launch
from geomcache.stages.train.checkpoint import checkpoints_of, load_policy, read_card
from geomcache.stages.train.config import DataPair, LearningRates, TrainConfig
from geomcache.stages.train.metrics import read_metrics
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.sharding import adamw_of, load_optimizer_state, optimizer_state

SCRIPT = Path(__file__).with_name("fsdp_on_cpu.py")


def _run(configs: list[TrainConfig], folder: Path) -> None:
    files = [folder / f"{config.out.name}.yaml" for config in configs]
    for file, config in zip(files, configs, strict=True):
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_PORT": str(launch._free_port()), "ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, files)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, text = rank.communicate(timeout=150)
        assert rank.returncode == 0, text


@pytest.mark.slow
def test_fsdp2_trains_like_ddp_and_resumes_exactly(pack_path: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    config = TrainConfig(
        out=tmp_path / "whole",
        data=(DataPair(pack=pack_path, cache=caches["oracle_pointmap"]),),
        policy=PolicyConfig.model_validate(
            {
                "dit": {"width": 32, "blocks": 2, "heads": 2, "future_tokens": 2},
                "backbone": {"config": {"image_size": 28}},
                "repeated_diffusion_steps": 2,
            }
        ),
        steps=4,
        batch_size=2,
        processes=2,
        learning_rate=LearningRates(vlm=1e-3, head=1e-3),
        warmup_steps=1,
        ema_decay=0.9,
        validation_share=0.34,
        validate_every=1,  # also where nothing is saved: the averaged weights must not stay
        save_every=2,
        keep_last=9,
        log_every=1,
        open_loop_rows=4,
        trackers=(),
        device="cpu",
    )
    resumed, plain = (config.model_copy(update={"out": tmp_path / name}) for name in ("resumed", "ddp"))
    runs = [config, resumed, plain]
    _run(runs, tmp_path)
    last = checkpoints_of(config.out)[-1]
    assert {path.name for path in last.iterdir()} >= {"optimizer_rank0.pt", "optimizer_rank1.pt", "ema.safetensors"}
    again, ddp = (checkpoints_of(c.out)[-1] for c in (resumed, plain))
    for name in ("policy.safetensors", "ema.safetensors"):
        assert (again / name).read_bytes() == (last / name).read_bytes()
        sharded, whole = load_file(last / name), load_file(ddp / name)
        assert sharded.keys() == whole.keys()
        for key, tensor in whole.items():
            torch.testing.assert_close(sharded[key], tensor, atol=2e-5, rtol=1e-3)
    assert load_policy(last, read_card(last)).dit.blocks[0].mlp[0].weight.shape == (128, 32)
    losses = [[line["loss"] for line in read_metrics(c.out / "metrics.jsonl") if "loss" in line] for c in runs]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_optimiser_state_of_another_network_is_named() -> None:
    def made(width: int) -> torch.optim.AdamW:
        layer = torch.nn.Linear(width, 2)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(1, width)).sum().backward()
        optimizer.step()
        return optimizer

    three, four = made(3), made(4)
    state = optimizer_state(three)
    with pytest.raises(InputError, match=r"here\.pt is the optimiser state of another network"):
        load_optimizer_state(four, state, "here.pt")
    other = made(3)
    load_optimizer_state(other, state, "here.pt")
    assert adamw_of(other) is other
    for mine, theirs in zip(other.state.values(), three.state.values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in ("exp_avg", "exp_avg_sq", "step"))
