"""pack.json: what a frame pack is. Written last; a pack without it is not finished."""

from typing import Any

from pydantic import Field

from geomcache.cache_schemas.base import Schema, VersionedSchema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.fingerprint import digest_json

PACK_NAME = "pack.json"
ROWS_NAME = "rows.arrow"
EPISODES_NAME = "episodes.arrow"


class SourceRecord(Schema):
    """One data set that went into the pack."""

    kind: str  # plug-in name
    location: str  # file, folder or data set name, without the machine's path
    revision: str  # digest of its bytes and of how they are read
    settings: dict[str, Any] = Field(default_factory=dict)  # the plug-in's, without the path
    details: dict[str, str] = Field(default_factory=dict)  # what the data set is: format, image codec, decoder


class NoOpFilter(Schema):
    """Rows and episodes to leave out, as the community's "no-noops" data sets do; see pipeline/no_ops.py."""

    threshold: float = Field(default=1e-4, gt=0.0)  # of the norm of an action's six motion numbers
    success_only: bool = True  # leave out episodes that the data set says failed


class PackFile(Schema):
    """A file of the pack, with what its bytes must be."""

    name: str
    bytes: int
    sha256: str


class PackRequest(Schema):
    """What was asked for; equal requests give byte-identical packs."""

    sources: tuple[SourceRecord, ...]
    contract: Contract
    rows_per_shard: int = Field(ge=1)
    no_ops: NoOpFilter | None = None  # None: every row is packed
    skip_damaged: bool = False


class EpisodeLeftOut(Schema):
    """An episode of a source that is not in the pack."""

    source: int  # its number in the request
    episode: int  # its number in the source
    where: str  # file and episode as a person finds them
    why: str


class PackSteps(Schema):
    """Control steps behind the rows, where rows lie several apart or some steps' executed actions carried pushes."""

    per_row: int = Field(ge=1)  # k: row r of an episode is its control step r * k and holds k actions
    total: int  # of all episodes
    perturbed: int | None = None  # steps whose executed action carried a push; None: no source says


class PackInfo(VersionedSchema):
    """The pack's card for machines."""

    # 2: settings and details of sources, no-op filter, episodes left out; 3: packs with `steps`, all others stay 2
    schema_version: int = 3
    request: PackRequest
    rows: int
    episodes: int
    shards: tuple[PackFile, ...]
    index: tuple[PackFile, ...]  # rows.arrow, episodes.arrow
    left_out: tuple[EpisodeLeftOut, ...] = ()  # damaged (with --on-error skip) or failed (no_ops.success_only)
    no_op_rows: int = 0  # rows that the filter left out
    steps: PackSteps | None = Field(default=None, exclude_if=lambda steps: steps is None)  # None: every row is a step

    @property
    def steps_per_row(self) -> int:
        """Control steps from one row of an episode to the next."""
        return 1 if self.steps is None else self.steps.per_row

    @property
    def contract(self) -> Contract:
        """Conventions of the packed frames."""
        return self.request.contract

    @property
    def digest(self) -> str:
        """Identity of the pack's content; caches are made from exactly this."""
        return digest_json([self.request.model_dump(mode="json"), [f.sha256 for f in (*self.shards, *self.index)]])
