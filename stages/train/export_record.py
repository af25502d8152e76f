"""``export.json``: what an exported policy was trained on, the tasks it is for, what it was measured at."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from geomcache.cache_schemas.base import Schema, VersionedSchema
from geomcache.cache_schemas.errors import InputError
from geomcache.stages.train.checkpoint import EXPORT_NAME, require_whole

Dtype = Literal["bf16", "fp32"]


class TrainedOn(Schema):
    """One pack."""

    pack: str  # digest
    sources: tuple[str, ...]  # file, folder or data set names
    scripted: bool  # recorded by geomcache's scripted expert; else whatever the sources are
    tasks: dict[str, tuple[str, ...]]  # suite -> names of the tasks that it has episodes of
    episodes: int
    rows: int
    control_steps: int
    noise: tuple[float, ...]  # deviations of the white noise on executed actions, of scripted demonstrations
    perturbed_steps: int | None  # control steps whose executed action carried a push; None: not said


class Measured(Schema):
    """Closed-loop success in one suite."""

    weights: str  # digest of the weights that were evaluated
    suite: str
    tasks: tuple[int, ...]
    init_states: tuple[int, int]  # first and last
    seeds: tuple[int, ...]
    execute_steps: int
    changes: tuple[str, ...]  # what makes it another test than the plain one: camera orbit, rulers
    episodes: int
    successes: int
    low: float  # 95 % Wilson interval
    high: float


class ExportRecord(VersionedSchema):
    """export.json."""

    name: str
    dtype: Dtype  # of the parameters
    weights_of: str  # digest of the run's weights; those of the export are in card.json
    averaged: bool  # they are the run's averages
    parameters: int
    seed: int  # of training
    samples_per_step: int
    steps: int | None = None  # optimiser steps so far; None in exports of old, which were of finished runs
    planned_steps: int | None = None  # of the whole training
    trained_on: tuple[TrainedOn, ...] = Field(min_length=1)
    measured: tuple[Measured, ...] = ()

    @property
    def unfinished(self) -> str | None:
        """``step 400 of 500``; None of a finished training."""
        return None if self.steps == self.planned_steps else f"step {self.steps:,} of {self.planned_steps:,}"

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """Suite -> names of its tasks that it was trained on."""
        found: dict[str, dict[str, None]] = {}
        for pack in self.trained_on:
            for suite, names in pack.tasks.items():
                found.setdefault(suite, {}).update(dict.fromkeys(names))
        return {suite: tuple(names) for suite, names in found.items()}


def read_record(folder: Path) -> ExportRecord:
    """export.json of an exported policy; ``InputError`` when it is damaged."""
    require_whole(folder, EXPORT_NAME)
    return ExportRecord.read(folder / EXPORT_NAME, InputError)
