"""The configuration class behind every command and every preset folder, and the settings that span stages."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.pack_info import NoOpFilter
from geomcache.pipeline.open_source import SourceRequest
from geomcache.pipeline.sim.recorder import Config as DemosConfig
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.extract.plan import ExtractConfig
from geomcache.stages.train.config import TrainConfig


class PackConfig(Schema):
    """``geomcache pack build``: data sets -> one frame pack."""

    sources: tuple[SourceRequest, ...] = Field(min_length=1)  # paths or hub ids; in YAML also {path, kind, settings}
    out: Path
    kind: str | None = None  # source plug-in of all sources that name none; None: told by what is there
    source: dict[str, Any] = Field(default_factory=dict)  # the plug-in's settings for all sources, e.g. cameras
    rows_per_shard: int = Field(default=256, ge=1)  # also the rows of a cache's shard
    workers: int = Field(default=1, ge=1)  # processes that decode and encode side by side
    no_ops: NoOpFilter | None = None  # leave out no-ops as the community does: {} for its threshold
    on_error: Literal["stop", "skip"] = "stop"  # what a damaged episode does; skip lists it in the pack

    @field_validator("sources", mode="before")
    @classmethod
    def _paths_are_requests(cls, sources: Any) -> Any:
        if not isinstance(sources, list | tuple):
            return sources
        return tuple({"path": str(one)} if isinstance(one, str | Path) else one for one in sources)

    def requests(self) -> list[SourceRequest]:
        """The sources with the settings they share."""
        return [
            SourceRequest(path=one.path, kind=one.kind or self.kind, settings={**self.source, **one.settings})
            for one in self.sources
        ]


class QuickstartConfig(Schema):
    """``geomcache quickstart``: the whole chain. Every section is that command's settings without its paths."""

    out: Path = Path("runs/quickstart")
    demos: dict[str, Any]
    pack: dict[str, Any]
    extract: dict[str, dict[str, Any]]  # cache -> settings of its extraction; without `encoder` its name is the encoder
    probe: dict[str, str] = Field(default_factory=dict)  # cache -> the one that it must tell more than (cache probe)
    train: dict[str, "QuickstartRun"]  # name -> run
    eval: dict[str, Any]
    largest_open_loop_ratio: float = 0.5  # the chain fails unless every policy's error is below this share


class QuickstartRun(Schema):
    """One policy of the quickstart."""

    cache: str | None = None  # whose tokens it reads; None: no geometry
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
