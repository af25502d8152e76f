"""AdamW groups with their own learning rates, and a cosine schedule in which every group ends at the same floor."""

import math

import torch
from torch import nn

from geomcache.stages.train.config import TrainConfig

BACKBONE_PREFIX = "backbone."
ADAPTER = ".lora_"  # in the names that peft gives


def make_optimizer(policy: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Groups named as in ``LearningRates`` over the trainable parameters; each remembers its peak rate."""
    groups: dict[str, list[nn.Parameter]] = {"vlm": [], "lora": [], "head": []}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            vlm = "lora" if ADAPTER in name else "vlm"
            groups[vlm if name.startswith(BACKBONE_PREFIX) else "head"].append(parameter)
    peaks = config.learning_rate.model_dump()
    return torch.optim.AdamW(
        [
            {"params": params, "lr": peaks[name], "peak": peaks[name], "name": name}
            for name, params in groups.items()
            if params
        ],
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


def learning_rate(step: int, peak: float, config: TrainConfig) -> float:
    """Linear warm-up from 0 over ``warmup_steps``, then a half cosine from ``peak`` to ``min_learning_rate``.

    Written by hand because transformers' cosine_with_min_lr scales one ratio for all groups, so groups with
    different peaks would end at different floors.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    floor = min(config.min_learning_rate, peak)
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> None:
    """Give every group its rate for ``step``; a pure function of the step, so resume needs no scheduler state."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, group["peak"], config)
