"""A checkpoint is a folder that appears whole: weights, optimiser, and the card from which everything is rebuilt.

``policy.safetensors`` weights · ``optimizer.pt`` AdamW state (tensors and numbers only, read with weights_only) ·
``card.json`` everything the live path is built from · ``backbone/`` tokenizer and model configuration.
"""

import json
import shutil
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from geomcache.cache_schemas.base import VersionedSchema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.cache_schemas.manifest import TokenRecipe
from geomcache.pipeline.files import sync_file, sync_folder, temporary_name, write_atomic
from geomcache.stages.train.config import MixedPrecision
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.policy import PolicyConfig, PolicyNet

_CARD, _WEIGHTS, _OPTIMIZER, _BACKBONE = "card.json", "policy.safetensors", "optimizer.pt", "backbone"


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
    return sorted(path for path in (run / "checkpoints").glob("step_*") if (path / _CARD).exists())


def latest_checkpoint(path: Path) -> Path:
    """``path`` itself when it is a checkpoint, else the newest one of the run ``path``.

    Raises:
        InputError: there is none.
    """
    if (path / _CARD).exists():
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
    return CheckpointCard.read(checkpoint / _CARD, InputError)


def save_checkpoint(
    run: Path, card: CheckpointCard, policy: PolicyNet, optimizer: torch.optim.Optimizer, *, keep_last: int
) -> Path:
    """Write ``run/checkpoints/step_<n>`` whole (temporary folder, then rename); drop all but the newest few."""
    final = run / "checkpoints" / f"step_{card.step:08d}"
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(final)
    try:
        temporary.mkdir()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}
        try:
            save_file(state, temporary / _WEIGHTS)
            torch.save(optimizer.state_dict(), temporary / _OPTIMIZER)
        except (SafetensorError, RuntimeError) as problem:  # both libraries hide the system's error
            raise InputError(
                f"the checkpoint {final} could not be written",
                expected="room on the disk",
                found=str(problem).splitlines()[0],
                fix="make room, then run the same command again; it continues from the last checkpoint",
            ) from problem
        for name in (_WEIGHTS, _OPTIMIZER):
            sync_file(temporary / name)
        digests = {name: digest_file(temporary / name) for name in (_WEIGHTS, _OPTIMIZER)}
        policy.save_backbone(temporary / _BACKBONE)
        write_atomic(temporary / _CARD, card.model_copy(update={"digests": digests}).model_dump_json(indent=2))
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(final.parent)
    for old in checkpoints_of(run)[:-keep_last]:
        shutil.rmtree(old)
    return final


def load_policy(checkpoint: Path, card: CheckpointCard) -> PolicyNet:
    """The policy with the checkpoint's weights, strictly loaded."""
    policy = PolicyNet(card.policy, card.recipe.spec if card.recipe else None, backbone_folder=checkpoint / _BACKBONE)
    load_weights(policy, checkpoint)
    return policy


def load_weights(policy: nn.Module, checkpoint: Path) -> None:
    """Load ``policy.safetensors``; a missing or unexpected tensor is an error."""
    _require_whole(checkpoint, _WEIGHTS)
    problems = policy.load_state_dict(load_file(checkpoint / _WEIGHTS), strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise InputError(
            f"{checkpoint / _WEIGHTS} does not fit the policy of its card",
            expected="exactly the policy's tensors",
            found=f"missing {problems.missing_keys[:3]}, unexpected {problems.unexpected_keys[:3]}",
        )


def _require_whole(checkpoint: Path, name: str) -> None:
    """Raise ``InputError`` unless a file's bytes are those that were saved."""
    path, expected = checkpoint / name, read_card(checkpoint).digests.get(name)
    found = digest_file(path) if path.exists() else "no file"
    if found != expected:
        raise InputError(
            f"{path} is damaged",
            expected=f"the bytes that were saved (SHA-256 {str(expected)[:16]}...)",
            found=found[:16],
            fix=f"delete {checkpoint}; training continues from the checkpoint before it",
        )


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Restore AdamW's moments and step counts."""
    _require_whole(checkpoint, _OPTIMIZER)
    optimizer.load_state_dict(torch.load(checkpoint / _OPTIMIZER, weights_only=True, map_location="cpu"))


def write_json(path: Path, value: object) -> None:
    """A result file, atomically."""
    write_atomic(path, json.dumps(value, indent=2))
