"""The configuration of stage two."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from geomcache.cache_schemas.base import Schema
from geomcache.pipeline.store.rows import Check
from geomcache.stages.train.augment import Augmentation
from geomcache.stages.train.normalise import GripperRule, NormalisationMode
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.row_order import RowOrder

MixedPrecision = Literal["no", "bf16"]
Strategy = Literal["ddp", "fsdp2", "zero2"]
Tracker = Literal["tensorboard", "wandb"]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _as_text(location: object) -> object:
    """Absolute unless it is a URL, so that a run can be continued and diagnosed from anywhere."""
    text = str(location) if isinstance(location, Path) else location
    return str(Path(text).absolute()) if isinstance(text, str) and "://" not in text else text


def _absolute(location: object) -> object:
    return Path(location).absolute() if isinstance(location, str | Path) else location


class DataPair(Schema):
    """One pack and the token cache made from it."""

    pack: Annotated[Path, BeforeValidator(_absolute)]
    # Folder, or URL such as s3://bucket/cache; None only for geom_compression_type "none".
    cache: Annotated[str | None, BeforeValidator(_as_text)] = None


class LearningRates(Schema):
    """Per module; every group ends at ``TrainConfig.min_learning_rate``."""

    vlm: float = Field(default=1e-5, gt=0)
    lora: float = Field(default=1e-4, gt=0)  # adapters of the VLM
    head: float = Field(default=1e-4, gt=0)  # DiT, compressor and everything else


class TrainConfig(Schema):
    """``geomcache train``: Qwen2.5-VL + DiT action head on cached geometry tokens."""

    out: Path  # the run's folder
    data: tuple[DataPair, ...] = ()  # rows of all pairs are trained on together
    policy: PolicyConfig = PolicyConfig()
    normalisation: NormalisationMode = "min_max"
    gripper: GripperRule = "binarise"  # to -1 and 1, in training and when acting | leave
    mapanything_model_path: str | None = None  # where eval finds MapAnything's weights; None: where extract did
    seed: int = Field(default=0, ge=0)

    steps: int = Field(default=100_000, ge=1)  # optimiser steps
    batch_size: int = Field(default=16, ge=1)  # samples per process and part of an optimiser step
    gradient_accumulation_steps: int = Field(default=1, ge=1)  # parts of an optimiser step
    learning_rate: LearningRates = LearningRates()
    min_learning_rate: float = Field(default=5e-7, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=1e-8, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    gradient_clip: float = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=0.999, gt=0, lt=1)  # averaged weights act and are validated; None: none
    augment: Augmentation = Augmentation()  # of training images: {shift: 4, brightness: 0.15}; tokens stay as cached
    geom_dropout: float = Field(default=0.0, ge=0, lt=1)  # share of training samples whose geometry is masked

    row_order: RowOrder = "global"  # shard: shuffle within a window of shards, for slow or remote storage
    check_tokens: Check = "every"  # read of a row is compared with its checksum: every | first | never
    data_workers: int = Field(default=0, ge=0)  # processes that decode images
    validation_share: float = Field(default=0.05, ge=0, lt=1)  # of the episodes held out, rounded down
    validate_every: int = Field(default=1000, ge=1)  # optimiser steps
    validation_rows: int = Field(default=128, ge=1)  # held-out rows, evenly spread, for each validation
    diagnose_every: int | None = Field(default=None, ge=1)  # steps between looks at whether geometry is used

    device: Literal["auto", "cpu", "cuda"] = "auto"
    mixed_precision: MixedPrecision = "no"  # bf16: autocast over float32 weights; the DiT stays float32
    gradient_checkpointing: bool = False  # layers are computed again in backward: less memory, about a third slower
    processes: int = Field(default=1, ge=1)  # ranks that must be running; checked against what was launched
    strategy: Strategy = "ddp"  # of several ranks; fsdp2 and zero2 need GPUs

    save_every: int = Field(default=1000, ge=1)  # optimiser steps between checkpoints
    keep_last: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)  # checkpoints at multiples of this stay for good
    log_every: int = Field(default=10, ge=1)
    trackers: tuple[Tracker, ...] = ("tensorboard",)  # beside metrics.jsonl, which is always written
    open_loop_rows: int = Field(default=128, ge=1)  # training rows on which the finished policy is measured

    @model_validator(mode="after")
    def _intervals_fit(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise ValueError(f"keep_every {self.keep_every} must be a multiple of save_every {self.save_every}")
        return self

    @model_validator(mode="after")
    def _whole_weights_for_a_diagnosis(self) -> Self:
        if self.strategy == "fsdp2" and self.diagnose_every is not None:
            raise ValueError(
                "diagnose_every needs whole weights on each rank: set it to null with strategy fsdp2, "
                "and run geomcache diagnose on a checkpoint"
            )
        return self

    def identity(self) -> Self:
        """Without what changes no weight: where things lie (their digests are compared), workers, logging."""
        free = (
            *("out", "data", "check_tokens", "data_workers", "validate_every", "validation_rows", "diagnose_every"),
            *("gradient_checkpointing", "save_every", "keep_last", "keep_every", "log_every", "trackers"),
            "mapanything_model_path",
        )
        fields = type(self).model_fields
        same = {name: Path() if name == "out" else () if name == "data" else fields[name].default for name in free}
        return self.model_copy(update=same)
