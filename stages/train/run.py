"""Stage two: build everything from one config, train, measure the result on training frames.

Also the entry point of a distributed launch: ``accelerate launch -m geomcache.stages.train.run CONFIG.yaml``.
"""

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

import geomcache
from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import ConfigError, GeomcacheError, InputError
from geomcache.cache_schemas.manifest import TokenRecipe
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.files import (
    CONFIG_NAME,
    holds_config_of,
    locked_folder,
    remove_leftovers,
    require_own_folder,
    storage_fault,
    write_atomic,
    write_config,
)
from geomcache.pipeline.pack.reader import PackReader
from geomcache.stages.train import validation
from geomcache.stages.train.checkpoint import (
    BACKBONE_NAME,
    CheckpointCard,
    checkpoints_of,
    is_exported,
    latest_checkpoint,
    read_card,
)
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.loop import Progress, Trainer
from geomcache.stages.train.metrics import require_trackers
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.policy import PolicyNet
from geomcache.stages.train.ranks import make_accelerator
from geomcache.stages.train.stopping import TrainingStopped
from geomcache.stages.train.validation import Validation

RESULT_NAME = "result.json"
MAP_ANYTHING = "map_anything"
LOCK_PATIENCE = 10.0  # seconds; loader processes of a killed run notice within 5


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
    validation: Validation | None = None  # on held-out episodes; None where none are held out

    @property
    def open_loop_ratio(self) -> float:
        """1 = as bad as the mean action, 0 = perfect."""
        return self.open_loop_error / self.mean_action_error


def run(config: TrainConfig, progress: Progress) -> tuple[TrainResult, bool]:
    """Train to the end; returns (result, True when the run had been finished before).

    Raises:
        GeomcacheError: bad data, a changed config on resume, a non-finite loss; by name, data errors before step 1.
    """
    require_trackers(config.trackers)
    accelerator = make_accelerator(config)
    data = TrainingData(config)
    with accelerator.main_process_first():  # the others find the folder as the first left it
        require_startable(config, data)
        if (finished := read_result(config.out)) is not None:
            return finished, True
    trained = data.training_rows
    normaliser = Normaliser.fit(data.states()[trained], data.labels(trained), config.normalisation, config.gripper)
    _require_same_statistics(config, normaliser)
    policy = build_policy(config, data, _standing_backbone(config))
    card = CheckpointCard(
        step=0,
        policy=policy.config,
        contract=data.contract,
        recipe=_recipe(config, data),
        normaliser=normaliser,
        packs=tuple(pack.info.digest for pack in data.packs),
        mixed_precision=config.mixed_precision,
        geomcache_version=geomcache.__version__,
    )
    _require_float32(policy)
    policy.backbone.packer.require_fitting(data.instructions(), len(data.contract.camera_names))
    maker = BatchMaker(data, policy.backbone.packer, normaliser, config, rank=accelerator.process_index)
    main = accelerator.is_main_process
    # only now: what was refused before has not claimed the folder
    with locked_folder(config.out, patience=LOCK_PATIENCE) if main else nullcontext():
        if main:
            write_config(config.out, config)
            remove_leftovers(config.out)
        result = _train_and_measure(config, data, policy, maker, card, accelerator, progress)
    return result, False


def _train_and_measure(
    config: TrainConfig,
    data: TrainingData,
    policy: PolicyNet,
    maker: BatchMaker,
    card: CheckpointCard,
    accelerator: Accelerator,
    progress: Progress,
) -> TrainResult:
    trainer = Trainer(config, policy, maker, card, accelerator)
    trainer.fit(progress)
    rows = validation.spread(data.training_rows, config.open_loop_rows)
    with trainer.acting():
        found = validation.measure(policy, maker, rows, config, accelerator)
        held_out = validation.spread(data.validation_rows, config.validation_rows)
        validated = validation.measure(policy, maker, held_out, config, accelerator) if len(held_out) else None
    result = TrainResult(
        run=str(config.out),
        checkpoint=latest_checkpoint(config.out).name,
        steps=config.steps,
        rows=len(data.training_rows),
        parameters=sum(p.numel() for p in policy.parameters()),
        trainable_parameters=sum(p.numel() for p in policy.parameters() if p.requires_grad),
        open_loop_error=found.open_loop_error,
        mean_action_error=found.mean_action_error,
        open_loop_rows=found.rows,
        validation=validated,
    )
    if accelerator.is_main_process:
        write_atomic(config.out / RESULT_NAME, result.model_dump_json(indent=2))
    return result


def require_startable(config: TrainConfig, data: TrainingData) -> None:
    """Refuse a folder of something else, changed settings or data of the run in it, weights that made no such cache."""
    require_own_folder(config.out, lambda folder: holds_config_of(folder, TrainConfig), "a training run")
    _require_same_config(config)
    _require_same_data(config, data)
    _recipe(config, data)


def read_result(run: Path) -> TrainResult | None:
    """result.json of a finished run."""
    path = run / RESULT_NAME
    return TrainResult.parse(path.read_bytes(), str(path), InputError) if path.exists() else None


def build_policy(config: TrainConfig, data: TrainingData, backbone_folder: Path | None = None) -> PolicyNet:
    """The policy with its initial weights, standardising tokens by the data's statistics.

    Args:
        config: of the run.
        data: its rows.
        backbone_folder: of a checkpoint whose weights will be loaded; ``base_vlm`` is not asked for then.
    """
    statistics = data.token_statistics()
    return PolicyNet(
        config.policy,
        data.recipe.spec if data.recipe else None,
        *((torch.tensor(values) for values in (statistics.mean, statistics.std)) if statistics else ()),
        backbone_folder=backbone_folder,
    )


def _standing_backbone(config: TrainConfig) -> Path | None:
    found = checkpoints_of(config.out)
    return found[-1] / BACKBONE_NAME if found else None


def _recipe(config: TrainConfig, data: TrainingData) -> TokenRecipe | None:
    """The caches' recipe; with ``mapanything_model_path`` the live encoder looks there for its weights."""
    recipe, path = data.recipe, config.mapanything_model_path
    if recipe is None or path is None:
        return recipe
    if recipe.encoder.name != MAP_ANYTHING:
        raise ConfigError(
            "mapanything_model_path is given, and the cache was not made by MapAnything",
            expected=f"a cache of encoder {MAP_ANYTHING}",
            found=recipe.encoder.name,
            fix="--set mapanything_model_path=null, or name a cache of MapAnything",
        )
    encoder = recipe.encoder.model_copy(update={"config": {**recipe.encoder.config, "weights": path}})
    return recipe.model_copy(update={"encoder": encoder})


def _require_same_config(config: TrainConfig) -> None:
    if not checkpoints_of(config.out) and not (config.out / RESULT_NAME).exists():
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


def run_of(checkpoint: Path) -> tuple[Path, TrainConfig]:
    """The run folder that a checkpoint lies in, and its settings.

    Raises:
        InputError: it does not lie where it was written, or is an exported policy.
        ConfigError: the settings cannot be read.
    """
    if is_exported(checkpoint):
        raise InputError(
            f"{checkpoint} is an exported policy: what it was trained on is not with it",
            expected="a run folder of geomcache train, with its packs where config.yaml says",
            found="weights and cards alone",
            fix="name the run that it was exported from",
        )
    run = checkpoint.parent.parent
    if not (run / CONFIG_NAME).exists():
        raise InputError(
            f"{run} does not say which data the run was trained on",
            expected=f"{CONFIG_NAME}, as geomcache train wrote it",
            found="no such file",
            fix="name the run's folder, or a checkpoint where it was written",
        )
    return run, read_config(run)


def require_packs(run: Path, config: TrainConfig, digests: tuple[str, ...]) -> None:
    """The packs of a run must still lie where its settings say, and be those that it was trained on.

    Args:
        run: its folder.
        config: its settings.
        digests: of the packs, as its checkpoint's card has them.

    Raises:
        InputError: one is gone or another.
    """
    if missing := [str(pair.pack) for pair in config.data if not pair.pack.exists()]:
        raise InputError(
            f"the packs of {run} are gone, and with them what it was trained on",
            expected=f"the packs that {run / CONFIG_NAME} names",
            found=f"no {', '.join(missing)}",
            fix="put them back there (a link will do)",
        )
    found = []
    for pair in config.data:
        with PackReader(pair.pack) as pack:
            found.append(pack.info.digest)
    if tuple(found) != digests:
        raise InputError(
            f"the packs of {run} are no longer those that it was trained on",
            expected=", ".join(digest[:16] for digest in digests),
            found=", ".join(digest[:16] for digest in found),
            fix="put the old ones back, or train on the new ones: geomcache train --out OTHER",
        )


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
    if differences := describe_data_difference(read_card(found[-1]), data):
        raise InputError(
            f"{config.out} was trained on other data",
            expected="the same packs and caches, to continue it",
            found="; ".join(differences),
            fix="choose another --out",
        )


def _require_same_statistics(config: TrainConfig, normaliser: Normaliser) -> None:
    """Another geomcache may count another set of actions; a run's target must not change half way."""
    found = checkpoints_of(config.out)
    if found and (differences := read_card(found[-1]).normaliser.describe_difference(normaliser)):
        raise InputError(
            f"{config.out} was trained with other statistics of states and actions",
            expected="the same statistics, to continue it",
            found="; ".join(differences[:2]),
            fix="choose another --out, or continue it with the geomcache that began it",
        )


def describe_data_difference(card: CheckpointCard, data: TrainingData) -> list[str]:
    """How the packs and caches differ from those that a checkpoint was trained on; where they lie is none."""
    packs = tuple(pack.info.digest for pack in data.packs)
    differences = [] if packs == card.packs else ["packs: their digests differ"]
    if card.recipe is not None and data.recipe is not None:
        differences += card.recipe.describe_difference(data.recipe)
    return differences


def main(arguments: list[str]) -> None:
    """Entry point of every rank of ``accelerate launch`` and torchrun: one resolved YAML."""
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        run(_read_resolved(arguments), _line_now_and_then() if speaks else lambda *_: None)
    except GeomcacheError as problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)
    except OSError as problem:
        text = storage_fault(problem)
        if text is None:
            raise
        sys.stderr.write(f"error: {text}\n")
        sys.exit(2)
    except RuntimeError as problem:  # gloo, when another rank has ended; NCCL waits until the launcher ends it
        if "by peer" not in str(problem):
            raise
        sys.stderr.write("this rank lost its connection to another one, which has ended\n")
        sys.exit(1)
    except TrainingStopped as ending:
        if speaks:
            sys.stderr.write(f"{ending.text}\n")
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _read_resolved(arguments: list[str]) -> TrainConfig:
    usage = "python -m geomcache.stages.train.run RUN.yaml, such as the config.yaml of a run"
    if len(arguments) != 1:
        raise ConfigError("one file of settings is expected", found=" ".join(arguments) or "nothing", fix=usage)
    try:
        values = yaml.safe_load(Path(arguments[0]).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise ConfigError(f"{arguments[0]} cannot be read", found=str(problem).splitlines()[0], fix=usage) from problem
    return parse_config(TrainConfig, values, arguments[0])


def _line_now_and_then(seconds: float = 20.0) -> Progress:
    told = time.monotonic()

    def progress(done: int, total: int, text: str) -> None:
        nonlocal told
        if time.monotonic() - told >= seconds or done == total:
            told = time.monotonic()
            sys.stderr.write(f"{done}/{total} {text}\n")

    return progress


if __name__ == "__main__":
    main(sys.argv[1:])
