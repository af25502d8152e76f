"""The configuration class behind every command and every preset folder, and the settings that span stages."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.pack_info import NoOpFilter
from geomcache.pipeline.open_source import SourceRequest
from geomcache.pipeline.sim.recorder import Config as DemosConfig
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.extract.plan import ExtractConfig
from geomcache.stages.train.config import TrainConfig

Share = Annotated[float, Field(ge=0, le=1)]


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


class ChainConfig(Schema):
    """What the commands that run the whole chain share. Every section is that command's settings without its paths."""

    out: Path
    demos: dict[str, Any]
    pack: dict[str, Any]
    extract: dict[str, dict[str, Any]]  # cache -> settings of its extraction; without `encoder` its name is the encoder


class QuickstartConfig(ChainConfig):
    """``geomcache quickstart``."""

    out: Path = Path("runs/quickstart")
    probe: dict[str, str] = Field(default_factory=dict)  # cache -> the one that it must tell more than (cache probe)
    train: dict[str, "QuickstartRun"]  # name -> run
    eval: dict[str, Any]
    largest_open_loop_ratio: float = 0.5  # the chain fails unless every policy's error is below this share


class QuickstartRun(Schema):
    """One policy of the quickstart."""

    cache: str | None = None  # whose tokens it reads; None: no geometry
    settings: dict[str, Any]


class ProofConfig(ChainConfig):
    """``geomcache proof``: policies that differ in what they see, met by the same placements."""

    out: Path = Path("runs/proof")
    train: dict[str, Any]  # what all arms share
    arms: dict[str, "ProofArm"] = Field(min_length=1)  # name -> arm; the first is the baseline of the report pages
    core: tuple[str, ...] = Field(min_length=1)  # arms that are trained where none are asked for
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)  # of training: every arm is trained with each
    eval: dict[str, Any]  # what all cells share
    cells: dict[str, "ProofCell"] = Field(min_length=1)  # name -> conditions under which arms are evaluated
    comparisons: tuple[tuple[str, str], ...] = ()  # pairs of ARM/CELL named beforehand: the second against the first
    gate: "ProofGate | None" = None
    processes: int = Field(default=2, ge=1)  # arms side by side, one thread each

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        sides = [side for pair in self.comparisons for side in pair]
        if self.gate is not None:
            sides += [f"{arm}/{self.gate.cell}" for arm in (*self.gate.at_least, *self.gate.at_most)]
        known = {f"{arm}/{name}" for arm in self.arms for name, cell in self.cells.items() if cell.is_for(arm)}
        for what, names, among in (
            ("core", self.core, set(self.arms)),
            ("cells: only", [arm for cell in self.cells.values() for arm in cell.only or ()], set(self.arms)),
            ("arms: cache", [arm.cache for arm in self.arms.values() if arm.cache], set(self.extract)),
            ("comparisons and gate", sides, known),
        ):
            if missing := sorted(set(names) - among):
                raise ValueError(f"{what} may name {', '.join(sorted(among))}; there is no {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _one_way_to_seed(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: each once, not {list(self.seeds)}")
        if "seed" in self.train or any("seed" in arm.settings for arm in self.arms.values()):
            raise ValueError("seeds names the training seeds; leave seed out of train and arms")
        return self


class ProofArm(Schema):
    """One policy of the proof."""

    cache: str | None = None  # whose tokens it reads; None: no geometry
    settings: dict[str, Any] = Field(default_factory=dict)  # of its training, laid over the shared ones key by key


class ProofCell(Schema):
    """One condition of evaluation."""

    settings: dict[str, Any] = Field(default_factory=dict)  # laid over the shared ones of `eval`
    only: tuple[str, ...] | None = None  # arms that are evaluated here; None: all
    core: bool = True  # False: left out where no arms are asked for

    def is_for(self, arm: str) -> bool:
        """Whether ``arm`` is evaluated here."""
        return self.only is None or arm in self.only


class ProofGate(Schema):
    """What must come out in one cell, as shares of episodes over all training seeds."""

    cell: str
    at_least: dict[str, Share] = Field(default_factory=dict)  # arm -> success rate
    at_most: dict[str, Share] = Field(default_factory=dict)


# Folder of presets -> what its YAML files are.
PRESET_CLASSES: dict[str, type[Schema]] = {
    "demos": DemosConfig,
    "pack": PackConfig,
    "extract": ExtractConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "quickstart": QuickstartConfig,
    "tiny": ProofConfig,
}
