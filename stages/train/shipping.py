"""``geomcache export``: a trained policy made ready to be given away, as a checkpoint of its own.

``policy.safetensors`` the weights that act, one set · ``card.json``, ``backbone/`` as in any checkpoint, so that the
same code loads it · ``export.json`` what it was trained on, the tasks it is for, what it was measured at ·
``README.md`` the same for people.

Non-obvious:
- Only parameters are rounded. Buffers (mean and deviation of the token channels) are few, and a mean of metres rounded
  to 8 bits could be off by more than a deviation.
- Loading copies tensors into the policy's own dtype: it acts in float32, with rounded weights.
- Equal weights give equal bytes, so an evaluation of an export fits the same export made again.
- No path of this machine: of a folder named in the settings only the last part is kept. Packs are named by digest.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.files import make_folder, require_own_folder, sync_folder, temporary_name, write_atomic
from geomcache.pipeline.pack.reader import PackReader
from geomcache.stages.train.checkpoint import (
    BACKBONE_NAME,
    CARD_NAME,
    EXPORT_NAME,
    WEIGHTS_NAME,
    CheckpointCard,
    has_averages,
    is_exported,
    latest_checkpoint,
    load_policy,
    named_errors,
    read_card,
    remove_whole,
    weights_digest,
    write_card,
)
from geomcache.stages.train.export_record import Dtype, ExportRecord, Measured, TrainedOn
from geomcache.stages.train.policy import PolicyNet
from geomcache.stages.train.run import require_packs, run_of
from geomcache.stages.train.shipping_card import data_card

README_NAME = "README.md"
FILES = frozenset({CARD_NAME, WEIGHTS_NAME, BACKBONE_NAME, EXPORT_NAME, README_NAME})  # all that is in an export


def export_policy(run: Path, out: Path, *, dtype: Dtype = "bf16", measured: Sequence[Measured] = ()) -> ExportRecord:
    """Write the policy of a run's newest checkpoint (or of one checkpoint) into ``out``; it appears whole.

    Args:
        run: run folder of ``geomcache train``, or one checkpoint of it; its packs must lie where its settings say.
        out: new folder, or an export that is replaced; its last part is the policy's name.
        dtype: of the parameters: bf16 rounds to 8 bits of precision; fp32 leaves them as they were trained.
        measured: evaluations of the checkpoint, or of what this export gives.

    Raises:
        InputError: no checkpoint, an exported one, packs that are gone or changed, figures of other weights, or an
            ``out`` that holds something else.
        GeomcacheError: what opening packs and weights raises.
    """
    out = out.absolute()
    require_own_folder(out, _is_nothing_but_an_export, "an exported policy")
    checkpoint = latest_checkpoint(run).resolve()
    if is_exported(checkpoint):
        raise InputError(
            f"{checkpoint} is an export already",
            expected="a run of geomcache train, or one checkpoint of it",
            found=EXPORT_NAME,
            fix="copy the folder, or export the run that it was made from",
        )
    card, (folder, config) = read_card(checkpoint), run_of(checkpoint)
    require_packs(folder, config, card.packs)
    trained_on = tuple(_pack_record(pair.pack) for pair in config.data)
    policy = load_policy(checkpoint, card)
    make_folder(out.parent)
    temporary = temporary_name(out)
    try:
        temporary.mkdir()
        shutil.copytree(checkpoint / BACKBONE_NAME, temporary / BACKBONE_NAME)
        with named_errors(out):
            save_file(_tensors(policy, dtype), temporary / WEIGHTS_NAME)
        # the library makes files that only their owner can read
        shutil.copymode(checkpoint / CARD_NAME, temporary / WEIGHTS_NAME)
        record = ExportRecord(
            name=out.name,
            dtype=dtype,
            weights_of=weights_digest(card),
            averaged=has_averages(card),
            parameters=sum(parameter.numel() for parameter in policy.parameters()),
            seed=config.seed,
            steps=card.step,
            planned_steps=config.steps,
            samples_per_step=config.batch_size * config.processes * config.gradient_accumulation_steps,
            trained_on=trained_on,
            measured=tuple(measured),
        )
        write_atomic(temporary / EXPORT_NAME, record.model_dump_json(indent=2))
        exported = write_card(temporary, _without_paths(card))
        _require_measured(record, exported)
        # after the card, which has no digest of it: people may edit it
        write_atomic(temporary / README_NAME, data_card(record, exported, (temporary / WEIGHTS_NAME).stat().st_size))
        if is_exported(out):
            remove_whole(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(out.parent)
    return record


def _is_nothing_but_an_export(folder: Path) -> bool:
    """Replacing must not delete what somebody put beside it, such as an evaluation."""
    return is_exported(folder) and {path.name for path in folder.iterdir()} <= FILES


def _tensors(policy: PolicyNet, dtype: Dtype) -> dict[str, torch.Tensor]:
    parameters = {name for name, _ in policy.named_parameters()} if dtype == "bf16" else set()
    return {
        name: (tensor.to(torch.bfloat16) if name in parameters else tensor).contiguous()
        for name, tensor in policy.state_dict().items()
    }


def _without_paths(card: CheckpointCard) -> CheckpointCard:
    """Folders of this machine out of the two settings that may name one."""
    backbone = card.policy.backbone
    changed = {"policy": card.policy.model_copy(update={"backbone": _neutral(backbone, "base_vlm")})}
    if card.recipe is None:
        return card.model_copy(update=changed)
    recipe = card.recipe.model_copy(update={"encoder": _neutral(card.recipe.encoder, "weights")})
    return card.model_copy(update={**changed, "recipe": recipe})


def _neutral(choice: Any, key: str) -> Any:
    """``choice`` (with a ``config``) whose ``key`` names no folder of this machine; hub ids stay."""
    value = choice.config.get(key)
    if not isinstance(value, str) or not (Path(value).is_absolute() or value.startswith("~")):
        return choice
    return choice.model_copy(update={"config": {**choice.config, key: Path(value).name}})


def _pack_record(path: Path) -> TrainedOn:
    with PackReader(path) as pack:
        info, tasks = pack.info, dict[str, dict[str, None]]()
        for episode in pack.episodes:
            tasks.setdefault(episode.suite, {})[episode.task] = None
        metadata = [json.loads(episode.metadata) for episode in pack.episodes]
        return TrainedOn(
            pack=info.digest,
            sources=tuple(source.location for source in info.request.sources),
            scripted=all("noise" in one for one in metadata),  # nobody but our recorder says
            tasks={suite: tuple(names) for suite, names in tasks.items()},
            episodes=info.episodes,
            rows=info.rows,
            control_steps=sum(episode.steps for episode in pack.episodes),
            noise=tuple(sorted({float(one["noise"]) for one in metadata if "noise" in one})),
            perturbed_steps=info.steps.perturbed if info.steps is not None else None,
        )


def _require_measured(record: ExportRecord, card: CheckpointCard) -> None:
    for one in record.measured:
        if one.weights not in (record.weights_of, weights_digest(card)):
            raise InputError(
                "an evaluation is of other weights",
                expected=f"{record.weights_of[:16]} (the checkpoint's) or {weights_digest(card)[:16]} (the export's)",
                found=f"{one.weights[:16]}: another run, checkpoint or dtype",
                fix="evaluate this one: geomcache eval RUN",
            )
