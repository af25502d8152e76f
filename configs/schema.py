"""The configuration class behind every command and every preset folder, and the settings that span stages."""

from pathlib import Path
from typing import Any

from pydantic import Field

from geomcache.cache_schemas.base import Schema
from geomcache.pipeline.sim.recorder import Config as DemosConfig
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.extract.plan import ExtractConfig
from geomcache.stages.train.config import TrainConfig


class PackConfig(Schema):
    """``geomcache pack build``: data sets -> one frame pack."""

    sources: tuple[Path, ...]
    out: Path
    kind: str = "libero_hdf5"  # source plug-in
    source: dict[str, Any] = Field(default_factory=dict)  # the plug-in's own settings, e.g. cameras
    rows_per_shard: int = Field(default=256, ge=1)  # also the rows of a cache's shard


class QuickstartConfig(Schema):
    """``geomcache quickstart``: the whole chain. Every section is that command's settings without its paths."""

    out: Path = Path("runs/quickstart")
    demos: dict[str, Any]
    pack: dict[str, Any]
    extract: dict[str, dict[str, Any]]  # encoder -> settings of its extraction
    train: dict[str, "QuickstartRun"]  # name -> run
    eval: dict[str, Any]
    largest_open_loop_ratio: float = 0.5  # the chain fails unless every policy's error is below this share


class QuickstartRun(Schema):
    """One policy of the quickstart."""

    cache: str | None = None  # encoder whose tokens it reads; None: no geometry
    settings: dict[str, Any]


# Folder of presets -> what its YAML files are.
PRESET_CLASSES: dict[str, type[Schema]] = {
    "demos": DemosConfig,
    "pack": PackConfig,
    "extract": ExtractConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "quickstart": QuickstartConfig,
}
