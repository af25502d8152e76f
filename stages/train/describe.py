"""The module table of ``geomcache train --describe``: every part of the policy at its true size, without any weights.

The policy is built on torch's meta device, where a tensor has a shape and a dtype and no memory, from the VLM's
config.json alone; so a 7B model is described in seconds, on a laptop, without network.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline import plugins
from geomcache.stages.train.building import parse_options
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.optim import ADAPTER, make_optimizer
from geomcache.stages.train.policy import PolicyConfig, PolicyNet

ASSUMED_TOKENS = "2x16x16x1536"  # MapAnything v1.1 on two views of 224 px
TOTAL = "total"

_PATH_PARTS = {"backbone": 4, "dit": 2, "compressor": 1}  # how much of a parameter's path names its line
_EMA_BYTES = 4  # averages are kept in float32


class ModuleInfo(NamedTuple):
    """One line of the table. Bytes are of one process that shares nothing, without activations."""

    module: str
    parameters: int
    trainable: int
    learning_rate: float | None  # the peak; None where nothing is trained, and in the total
    dtype: str  # of the weights
    weight_bytes: int
    training_bytes: int  # gradients, AdamW's two moments, and the average (EMA) of what is trained


def describe(config: TrainConfig, token_spec: TokenSpec | None) -> list[ModuleInfo]:
    """The parts of the policy in the order in which they are built, and a last line ``total``.

    Args:
        config: of the run; its data are not looked at.
        token_spec: of the cache, or of ``assumed_tokens``; None only without geometry.

    Raises:
        GeomcacheError: whatever building the policy would raise about the configuration.
    """
    policy = build_architecture(config.policy, token_spec, "meta")
    peaks = {id(p): group["peak"] for group in make_optimizer(policy, config).param_groups for p in group["params"]}
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in policy.named_parameters():
        parts.setdefault(_line_of(name), []).append(parameter)
    lines = [_describe(name, parameters, peaks, config.ema_decay is not None) for name, parameters in parts.items()]
    return [*lines, _total(lines)]


def build_architecture(config: PolicyConfig, token_spec: TokenSpec | None, device: str) -> PolicyNet:
    """The policy at its true size with random weights, or on device ``meta`` with none; the VLM's are not looked for.

    Its tokenizer is the tiny one, so it takes batches and answers nonsense.
    """
    backbone_class = plugins.load("backbone", config.backbone.name)
    backbone_config = parse_options("backbone", config.backbone.name, config.backbone.config)
    with tempfile.TemporaryDirectory() as name:
        backbone_class.write_architecture(backbone_config, Path(name))
        with torch.device(device):
            return PolicyNet(config, token_spec, backbone_folder=Path(name)).to(device)


def assumed_tokens(shape: str = ASSUMED_TOKENS) -> TokenSpec:
    """Tokens of that shape, for a policy whose cache does not exist yet.

    Args:
        shape: VxROWSxCOLUMNSxD, views and the grid and width of their tokens.

    Raises:
        InputError: it is no such shape.
    """
    sizes = shape.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(
            "the shape of the geometry tokens cannot be read",
            expected=f"views x token rows x token columns x width, such as {ASSUMED_TOKENS}",
            found=shape,
            fix=f"leave it out for {ASSUMED_TOKENS} (MapAnything v1.1), or name a cache",
        )
    views, rows, columns, dim = map(int, sizes)
    return TokenSpec(
        encoder="assumed",
        tap="assumed",
        cameras=tuple(f"view{view}" for view in range(views)),
        grid=(rows, columns),
        dim=dim,
        image_size=(rows, columns),
        encoder_batch_size=1,
    )


def _line_of(name: str) -> str:
    path = name.split(".")
    line = ".".join(path[: _PATH_PARTS[path[0]]])
    return f"{line} (LoRA)" if ADAPTER in name else line


def _describe(name: str, parameters: list[torch.nn.Parameter], peaks: dict[int, float], averaged: bool) -> ModuleInfo:
    trained = [p for p in parameters if p.requires_grad]
    rates = {peaks[id(p)] for p in trained}
    assert len(rates) <= 1, f"{name} is trained at several rates: {rates}"
    return ModuleInfo(
        name,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in trained),
        next(iter(rates), None),
        "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        sum(p.nbytes for p in parameters),
        sum(3 * p.nbytes + _EMA_BYTES * p.numel() * averaged for p in trained),
    )


def _total(lines: list[ModuleInfo]) -> ModuleInfo:
    return ModuleInfo(
        TOTAL,
        sum(line.parameters for line in lines),
        sum(line.trainable for line in lines),
        None,
        "+".join(sorted({dtype for line in lines for dtype in line.dtype.split("+")})),
        sum(line.weight_bytes for line in lines),
        sum(line.training_bytes for line in lines),
    )
