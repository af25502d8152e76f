"""One rank of runs whose weights are sharded by torch's own FSDP2 on CPUs; started by test_sharding.py.

Three configs: a whole run; one that goes on from the whole run's first checkpoint; one with accelerate's plain DDP.

accelerate trains plain DDP when it is asked for FSDP on a CPU. So its ``prepare`` is replaced by what it does on GPUs:
``fully_shard`` on every class that configs/accelerate/fsdp2.yaml names, then on the whole.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import fully_shard

from geomcache.stages.cli.launch import strategy_environment
from geomcache.stages.train import run
from geomcache.stages.train.checkpoint import checkpoints_of

WRAPPED = strategy_environment("fsdp2")["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")


def prepare(_self: Accelerator, model: Any, optimizer: torch.optim.Optimizer) -> Any:
    place = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [[place[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    for module in list(model.modules())[::-1]:
        if type(module).__name__ in WRAPPED:
            fully_shard(module)
    fully_shard(model)
    sharded = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [sharded[name] for name in members]
    return model, optimizer


def cut(whole: Path, resumed: Path) -> None:
    """``resumed`` is what ``whole`` was when its first checkpoint stood."""
    for name in ("checkpoints/" + checkpoints_of(whole)[0].name, "metrics.jsonl", "config.yaml"):
        source, target = whole / name, resumed / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


whole, resumed, plain = sys.argv[1:]
original = Accelerator.prepare
Accelerator.prepare = prepare  # type: ignore[method-assign]
run.main([whole])
folders = [Path(yaml.safe_load(Path(file).read_text())["out"]) for file in (whole, resumed)]
if os.environ["RANK"] == "0":
    cut(*folders)
while not (folders[1] / "config.yaml").exists():  # the last file that ``cut`` copies
    time.sleep(0.05)
for file in (resumed, plain):
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    run.main([file])
    Accelerator.prepare = original  # type: ignore[method-assign]
