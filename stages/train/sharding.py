"""Weights and optimiser state where ranks hold parts of them (FSDP2's DTensors, ZeRO's partitions).

A checkpoint's weights are always whole tensors, so any number of processes can load them; the optimiser's state is
written as each rank holds it and goes back to the same number of ranks.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from geomcache.cache_schemas.errors import InputError

STATE_PARTS = ("exp_avg", "exp_avg_sq")  # of AdamW: as large as their parameter, so sharded with it


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of ``tensor``: itself unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor; every rank must ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``part`` as this rank's share of a tensor sharded like ``parameter``."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def part_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's share of a whole ``tensor`` sharded like ``parameter``, on its device."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements).to_local()


def is_sharded(model: nn.Module, optimizer: Any) -> bool:
    """Whether ranks hold different optimiser state."""
    return adamw_of(optimizer) is not _unwrapped(optimizer) or any(isinstance(p, DTensor) for p in model.parameters())


def adamw_of(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser under accelerate's and DeepSpeed's wrappers."""
    inner = _unwrapped(optimizer)
    while not isinstance(inner, torch.optim.AdamW):  # DeepSpeed's ZeRO optimiser, over flat partitions
        inner = inner.optimizer
    return inner


def _unwrapped(optimizer: Any) -> Any:
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """AdamW's state dict with this rank's parts as plain CPU tensors."""
    state = adamw_of(optimizer).state_dict()
    plain = {
        index: {
            name: local(value).detach().cpu() if isinstance(value, torch.Tensor) else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {"state": plain, "param_groups": state["param_groups"]}


def load_optimizer_state(optimizer: Any, state: dict[str, Any], where: str) -> None:
    """The inverse of ``optimizer_state``, after accelerate has prepared the optimiser.

    Raises:
        InputError: the state is that of other parameters or another sharding; ``where`` names its file.
    """
    adamw = adamw_of(optimizer)
    parameters = [parameter for group in adamw.param_groups for parameter in group["params"]]
    for index, entry in state["state"].items():
        known = parameters[int(index)] if int(index) < len(parameters) else None
        parts = [entry[name] for name in STATE_PARTS]
        if known is None or any(part.shape != local(known).shape for part in parts):
            raise InputError(
                f"{where} is the optimiser state of another network or another number of processes",
                expected=f"state shaped like the weights of {len(parameters)} tensors",
                found=f"tensor {index}: {[list(part.shape) for part in parts]}",
                fix="continue with as many processes and the strategy that it was saved with",
            )
        for name in STATE_PARTS:
            entry[name] = like(known, entry[name].to(local(known).device))
    adamw.load_state_dict(state)
