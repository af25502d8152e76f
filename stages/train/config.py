"""The configuration of stage two."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from geomcache.cache_schemas.base import Schema
from geomcache.stages.train.normalise import NormalisationMode
from geomcache.stages.train.policy import PolicyConfig

MixedPrecision = Literal["no", "bf16"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class DataPair(Schema):
    """One pack and the token cache made from it."""

    pack: Path
    cache: Path | None = None  # None only for geom_compression_type "none"


class LearningRates(Schema):
    """Per module; every group ends at ``TrainConfig.min_learning_rate``."""

    vlm: float = Field(default=1e-5, gt=0)
    head: float = Field(default=1e-4, gt=0)  # DiT, compressor and everything else


class TrainConfig(Schema):
    """``geomcache train``: Qwen2.5-VL + DiT action head on cached geometry tokens."""

    out: Path  # the run's folder
    data: tuple[DataPair, ...]  # rows of all pairs are trained on together
    policy: PolicyConfig = PolicyConfig()
    normalisation: NormalisationMode = "min_max"
    seed: int = Field(default=0, ge=0)
    steps: int = Field(default=100_000, ge=1)  # optimiser steps
    batch_size: int = Field(default=16, ge=1)  # samples per process and optimiser step part
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: LearningRates = LearningRates()
    min_learning_rate: float = Field(default=5e-7, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=1e-8, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    gradient_clip: float = Field(default=1.0, gt=0)
    mixed_precision: MixedPrecision = "no"  # bf16: autocast over float32 weights; the DiT stays float32
    processes: int = Field(default=1, ge=1)  # ranks that must be running; checked against what was launched
    data_workers: int = Field(default=0, ge=0)  # processes that decode images
    save_every: int = Field(default=1000, ge=1)  # optimiser steps between checkpoints
    keep_last: int = Field(default=2, ge=1)
    log_every: int = Field(default=10, ge=1)
    open_loop_rows: int = Field(default=128, ge=1)  # training rows on which the finished policy is measured
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def identity(self) -> Self:
        """Without what changes no number: where things lie (their digests are compared), workers, logging."""
        free = ("out", "data", "data_workers", "save_every", "keep_last", "log_every")
        fields = type(self).model_fields
        same = {name: Path() if name == "out" else () if name == "data" else fields[name].default for name in free}
        return self.model_copy(update=same)
