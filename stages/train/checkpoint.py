"""A checkpoint is a folder that appears whole: weights, optimiser, and the card from which everything is rebuilt.

``policy.safetensors`` weights · ``ema.safetensors`` the averaged trainable weights, which act · ``optimizer.pt`` AdamW
state (tensors and numbers only, read with weights_only; one file a rank where ranks hold different parts) ·
``card.json`` everything the live path is built from · ``backbone/`` tokenizer and model configuration.

What ``geomcache export`` writes (shipping.py) is such a folder with ``export.json`` and one set of weights, without an
optimiser: it acts like any checkpoint, and cannot be trained further.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from geomcache.cache_schemas.base import VersionedSchema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.fingerprint import digest_file, digest_json
from geomcache.cache_schemas.manifest import TokenRecipe
from geomcache.pipeline.files import sync_file, sync_folder, temporary_name, write_atomic
from geomcache.stages.train.config import MixedPrecision
from geomcache.stages.train.ema import Ema
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.policy import PolicyConfig, PolicyNet
from geomcache.stages.train.sharding import is_sharded, load_optimizer_state, optimizer_state, whole

CARD_NAME, WEIGHTS_NAME, BACKBONE_NAME, EXPORT_NAME = "card.json", "policy.safetensors", "backbone", "export.json"
_AVERAGES = "ema.safetensors"


class CheckpointCard(VersionedSchema):
    """What the weights mean; evaluation is built from this, not from the command line."""

    step: int = Field(ge=0)  # optimiser steps done
    policy: PolicyConfig
    contract: Contract  # of the frames it was trained on
    recipe: TokenRecipe | None  # how its geometry tokens were made; None without geometry
    normaliser: Normaliser
    packs: tuple[str, ...]  # digests of the packs it was trained on
    digests: dict[str, str] = Field(default_factory=dict)  # file of the checkpoint -> SHA-256
    mixed_precision: MixedPrecision = "no"  # autocast of the VLM, in training and when it acts
    geomcache_version: str


def checkpoints_of(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if (path / CARD_NAME).exists())


def latest_checkpoint(path: Path) -> Path:
    """``path`` itself when it is a checkpoint, else the newest one of the run ``path``.

    Raises:
        InputError: there is none.
    """
    if (path / CARD_NAME).exists():
        return path
    found = checkpoints_of(path)
    if not found:
        raise InputError(
            f"{path} holds no checkpoint",
            expected="a run folder of geomcache train, or one checkpoint of it",
            found="no such folder" if not path.exists() else "no checkpoints/step_*",
            fix=f"geomcache train --out {path} ...",
        )
    return found[-1]


def read_card(checkpoint: Path) -> CheckpointCard:
    """The card of a checkpoint; a newer schema or damage is an error by name."""
    return CheckpointCard.read(checkpoint / CARD_NAME, InputError)


def save_checkpoint(
    run: Path,
    card: CheckpointCard,
    policy: PolicyNet,
    optimizer: Any,
    ema: Ema | None,
    accelerator: Accelerator,
    *,
    keep_last: int,
    keep_every: int | None,
) -> Path:
    """Write ``run/checkpoints/step_<n>`` whole (temporary folder, then rename); drop what need not be kept.

    Every rank calls it. The main one writes the weights, as whole tensors; where ranks hold different optimiser state,
    each writes its own.
    """
    final = run / "checkpoints" / f"step_{card.step:08d}"
    main = accelerator.is_main_process
    temporary = temporary_name(final)
    if main:
        temporary.mkdir(parents=True)
    temporary = Path(broadcast_object_list([str(temporary)])[0])
    try:
        _save_tensors(dict(policy.state_dict()), temporary / WEIGHTS_NAME, final, main)
        if ema is not None:
            _save_tensors(ema.as_tensors(), temporary / _AVERAGES, final, main)
        sharded = is_sharded(policy, optimizer)
        if main or sharded:
            state = optimizer_state(optimizer)
            path = temporary / _optimizer_name(accelerator.process_index if sharded else None)
            with named_errors(final):
                torch.save(state, path)
        accelerator.wait_for_everyone()
        if main:
            policy.save_backbone(temporary / BACKBONE_NAME)
            write_card(temporary, card)
            if final.exists():
                remove_whole(final)
            temporary.rename(final)
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
    if main:
        sync_folder(final.parent)
        for old in checkpoints_of(run)[:-keep_last]:
            if keep_every is None or step_of(old) % keep_every:
                remove_whole(old)
    accelerator.wait_for_everyone()
    return final


def write_card(folder: Path, card: CheckpointCard) -> CheckpointCard:
    """Make all that stands in ``folder`` durable and write the card last, with its digests; returns that card."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for name in names:
        sync_file(folder / name)
    card = card.model_copy(update={"digests": {name: digest_file(folder / name) for name in names}})
    write_atomic(folder / CARD_NAME, card.model_dump_json(indent=2))
    return card


def remove_whole(checkpoint: Path) -> None:
    """Under a temporary name first: a kill in between leaves nothing that looks like a checkpoint."""
    doomed = temporary_name(checkpoint)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def step_of(checkpoint: Path) -> int:
    """Optimiser steps done, from the folder's name."""
    return int(checkpoint.name.removeprefix("step_"))


def is_exported(checkpoint: Path) -> bool:
    """Whether ``geomcache export`` wrote this folder, not training."""
    return (checkpoint / EXPORT_NAME).exists()


@contextmanager
def named_errors(final: Path) -> Iterator[None]:
    """What saving tensors into ``final`` raises, as ``InputError``."""
    try:
        yield
    except (SafetensorError, RuntimeError) as problem:  # both libraries hide the system's error
        raise InputError(
            f"the checkpoint {final} could not be written",
            expected="room on the disk",
            found=str(problem).splitlines()[0],
            fix="make room, then run the same command again; it continues from the last checkpoint",
        ) from problem


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path, final: Path, main: bool) -> None:
    state = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())  # every rank takes part
        if main:
            state[name] = value.cpu().contiguous()
    if main:
        with named_errors(final):
            save_file(state, path)


def _optimizer_name(rank: int | None) -> str:
    return "optimizer.pt" if rank is None else f"optimizer_rank{rank}.pt"


def load_policy(checkpoint: Path, card: CheckpointCard, *, averaged: bool = True) -> PolicyNet:
    """The policy with the checkpoint's weights, strictly loaded: the averaged ones where there are any."""
    saved = {name for name in card.digests if name.startswith(f"{BACKBONE_NAME}/")}
    there = {str(path.relative_to(checkpoint)) for path in (checkpoint / BACKBONE_NAME).glob("*")}
    for name in sorted(saved | there):  # what was not saved with it is refused too: transformers would read it
        require_whole(checkpoint, name)
    policy = PolicyNet(
        card.policy, card.recipe.spec if card.recipe else None, backbone_folder=checkpoint / BACKBONE_NAME
    )
    load_weights(policy, checkpoint)
    if averaged and has_averages(card):
        policy.load_state_dict(read_averages(checkpoint), strict=False)
    return policy


def has_averages(card: CheckpointCard) -> bool:
    """Whether averaged weights lie beside the last ones."""
    return _AVERAGES in card.digests


def weights_digest(card: CheckpointCard) -> str:
    """Of a checkpoint's weights, the averaged ones included."""
    return digest_json({name: card.digests[name] for name in (WEIGHTS_NAME, _AVERAGES) if name in card.digests})


def read_averages(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averaged weights (EMA) of a checkpoint, by name."""
    require_whole(checkpoint, _AVERAGES)
    return load_file(checkpoint / _AVERAGES)


def load_weights(policy: nn.Module, checkpoint: Path) -> None:
    """Load ``policy.safetensors``; a missing or unexpected tensor is an error."""
    require_whole(checkpoint, WEIGHTS_NAME)
    problems = policy.load_state_dict(load_file(checkpoint / WEIGHTS_NAME), strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise InputError(
            f"{checkpoint / WEIGHTS_NAME} does not fit the policy of its card",
            expected="exactly the policy's tensors",
            found=f"missing {problems.missing_keys[:3]}, unexpected {problems.unexpected_keys[:3]}",
        )


def require_whole(checkpoint: Path, name: str) -> None:
    """Raise ``InputError`` unless a file's bytes are those that were saved."""
    path, expected = checkpoint / name, read_card(checkpoint).digests.get(name)
    found = digest_file(path) if path.is_file() else "no file"
    if found != expected:
        raise InputError(
            f"{path} is damaged",
            expected=f"the bytes that were saved (SHA-256 {str(expected)[:16]}...)",
            found=found[:16],
            fix="export it again, or reinstall geomcache if it came with it"
            if is_exported(checkpoint)
            else f"delete {checkpoint}; training continues from the checkpoint before it",
        )


def load_optimizer(optimizer: Any, policy: nn.Module, checkpoint: Path, rank: int) -> None:
    """Restore AdamW's moments and step counts, after accelerate has prepared both.

    Raises:
        InputError: an exported policy, which has none; or a damaged file.
    """
    if is_exported(checkpoint):
        raise InputError(
            f"{checkpoint} is an exported policy: it acts, and cannot be trained further",
            expected="a checkpoint as geomcache train writes it",
            found="weights without the optimiser's state",
            fix="continue the run that it was exported from",
        )
    name = _optimizer_name(rank if is_sharded(policy, optimizer) else None)
    require_whole(checkpoint, name)
    state = torch.load(checkpoint / name, weights_only=True, map_location="cpu")
    load_optimizer_state(optimizer, state, str(checkpoint / name))
