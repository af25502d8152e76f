"""pack.json: what a frame pack is. Written last; a pack without it is not finished."""

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
    location: str  # file or folder name, without the machine's path
    revision: str  # digest of its bytes


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


class PackInfo(VersionedSchema):
    """The pack's card for machines."""

    request: PackRequest
    rows: int
    episodes: int
    shards: tuple[PackFile, ...]
    index: tuple[PackFile, ...]  # rows.arrow, episodes.arrow

    @property
    def contract(self) -> Contract:
        """Conventions of the packed frames."""
        return self.request.contract

    @property
    def digest(self) -> str:
        """Identity of the pack's content; caches are made from exactly this."""
        return digest_json([self.request.model_dump(mode="json"), [f.sha256 for f in (*self.shards, *self.index)]])
