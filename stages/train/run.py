"""Stage two: build everything from one config, train, measure the result on training frames.

Also the entry point of a distributed launch: ``torchrun --nproc_per_node N -m geomcache.stages.train.run CONFIG.yaml``.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import yaml

import geomcache
from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import ConfigError, GeomcacheError, InputError
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.files import (
    CONFIG_NAME,
    holds_config_of,
    remove_leftovers,
    require_own_folder,
    write_atomic,
    write_config,
)
from geomcache.stages.train.checkpoint import CheckpointCard, checkpoints_of, latest_checkpoint, read_card
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.loop import Progress, fit, make_accelerator
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.policy import PolicyNet

RESULT_NAME = "result.json"


class TrainResult(Schema):
    """result.json of a finished run."""

    run: str
    checkpoint: str
    steps: int
    rows: int
    parameters: int
    trainable_parameters: int
    open_loop_error: float  # mean |predicted - demonstrated| over normalised action dimensions and real chunk steps
    mean_action_error: float  # the same for always predicting the training rows' mean action
    open_loop_rows: int

    @property
    def open_loop_ratio(self) -> float:
        """1 = as bad as the mean action, 0 = perfect."""
        return self.open_loop_error / self.mean_action_error


def run(config: TrainConfig, progress: Progress) -> tuple[TrainResult, bool]:
    """Train to the end; returns (result, True when the run had been finished before).

    Raises:
        GeomcacheError: bad data, a changed config on resume, a non-finite loss; by name, data errors before step 1.
    """
    accelerator = make_accelerator(config)
    data = TrainingData(config)
    with accelerator.main_process_first():  # the others find the folder as the first left it
        require_own_folder(config.out, lambda folder: holds_config_of(folder, TrainConfig), "a training run")
        _require_same_config(config)
        _require_same_data(config, data)
        result_path = config.out / RESULT_NAME
        if result_path.exists():
            return TrainResult.parse(result_path.read_bytes(), str(result_path), InputError), True
    normaliser = Normaliser.fit(data.states(), data.actions(), config.normalisation)
    statistics = data.token_statistics()
    policy = PolicyNet(
        config.policy,
        data.recipe.spec if data.recipe else None,
        *((torch.tensor(values) for values in (statistics.mean, statistics.std)) if statistics else ()),
    )
    card = CheckpointCard(
        step=0,
        policy=policy.config,
        contract=data.contract,
        recipe=data.recipe,
        normaliser=normaliser,
        packs=tuple(pack.info.digest for pack in data.packs),
        mixed_precision=config.mixed_precision,
        geomcache_version=geomcache.__version__,
    )
    _require_float32(policy)
    maker = BatchMaker(data, policy.backbone.packer, normaliser, config, rank=accelerator.process_index)
    if accelerator.is_main_process:  # only now: what was refused before has not claimed the folder
        write_config(config.out, config)
        remove_leftovers(config.out)
    policy = fit(config, policy, maker, card, accelerator, progress)
    error, baseline, rows = open_loop_error(policy, maker, data, config, accelerator.device)
    result = TrainResult(
        run=str(config.out),
        checkpoint=latest_checkpoint(config.out).name,
        steps=config.steps,
        rows=len(data),
        parameters=sum(p.numel() for p in policy.parameters()),
        trainable_parameters=sum(p.numel() for p in policy.parameters() if p.requires_grad),
        open_loop_error=error,
        mean_action_error=baseline,
        open_loop_rows=rows,
    )
    if accelerator.is_main_process:
        write_atomic(result_path, result.model_dump_json(indent=2))
    return result, False


def open_loop_error(
    policy: PolicyNet, maker: BatchMaker, data: TrainingData, config: TrainConfig, device: torch.device
) -> tuple[float, float, int]:
    """Mean absolute error of predicted action chunks on training rows, beside that of the mean action.

    Both in normalised action units, averaged over real (not padded) chunk steps and all action dimensions.
    Returns (error, error of the mean action, number of rows).
    """
    count = min(config.open_loop_rows, len(data))
    rows = np.unique(np.linspace(0, len(data) - 1, count).astype(np.int64))
    mean_A = maker.normalise_actions(data.actions()).mean(axis=0)
    error, baseline, real = 0.0, 0.0, 0
    policy.eval()
    for start in range(0, len(rows), config.batch_size):
        part = rows[start : start + config.batch_size]
        batch = maker.batch(part).to(device)
        assert batch.actions_BTA is not None
        assert batch.action_mask_BT is not None
        noise = torch.stack([policy.draw_noise(int(row)) for row in part])
        with policy.autocast(config.mixed_precision):
            predicted = policy.sample(batch, noise_BTA=noise)
        mask = batch.action_mask_BT
        error += float((predicted - batch.actions_BTA).abs()[mask].sum())
        baseline += float((torch.from_numpy(mean_A).to(device) - batch.actions_BTA).abs()[mask].sum())
        real += int(mask.sum()) * len(mean_A)
    return error / real, baseline / real, len(rows)


def _require_same_config(config: TrainConfig) -> None:
    if not checkpoints_of(config.out):
        return  # nothing would be lost
    standing = read_config(config.out)
    if differences := standing.identity().describe_difference(config.identity()):
        raise InputError(
            f"{config.out} is a run with another configuration",
            expected="the same configuration, to continue it",
            found="; ".join(differences),
            fix="choose another --out, or give back the changed keys",
        )


def read_config(run: Path) -> TrainConfig:
    """The resolved settings of a run; ``ConfigError`` when they cannot be read."""
    path = run / CONFIG_NAME
    return parse_config(TrainConfig, yaml.safe_load(path.read_bytes()), str(path))


def _require_float32(policy: PolicyNet) -> None:
    """AdamW's small steps vanish in bfloat16's 8 bits: most weights would never move."""
    wrong = [name for name, p in policy.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if wrong:
        raise ConfigError(
            "weights in bfloat16 cannot be trained",
            expected="trainable weights in float32",
            found=f"{len(wrong)} tensors such as {wrong[0]}",
            fix="--set mixed_precision=bf16 and leave the backbone's dtype float32, or freeze the VLM (freeze: all)",
        )


def _require_same_data(config: TrainConfig, data: TrainingData) -> None:
    found = checkpoints_of(config.out)
    if not found:
        return
    card = read_card(found[-1])
    packs = tuple(pack.info.digest for pack in data.packs)
    differences = [] if packs == card.packs else ["packs: their digests differ"]
    if card.recipe is not None and data.recipe is not None:
        differences += card.recipe.describe_difference(data.recipe)
    if differences:
        raise InputError(
            f"{config.out} was trained on other data",
            expected="the same packs and caches, to continue it",
            found="; ".join(differences),
            fix="choose another --out",
        )


def main(arguments: list[str]) -> None:
    """Entry point of torchrun and accelerate launch: one resolved YAML."""
    (file,) = arguments
    try:
        config = parse_config(TrainConfig, yaml.safe_load(Path(file).read_text()), file)
        run(config, lambda _done, _total, _text: None)
    except GeomcacheError as problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
