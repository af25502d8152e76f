"""pack.json: what a frame pack is. Written last; a pack without it is not finished."""

from pydantic import Field

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import PackDamaged, SchemaTooNew
from geomcache.cache_schemas.fingerprint import digest_json
from geomcache.cache_schemas.manifest import SchemaVersion

PACK_SCHEMA_VERSION = 1
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


class PackInfo(Schema):
    """The pack's card for machines."""

    schema_version: int = PACK_SCHEMA_VERSION
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

    @classmethod
    def read(cls, text: bytes, where: str) -> "PackInfo":
        """Parse ``pack.json``; a newer schema and damage are errors by name."""
        version = SchemaVersion.parse(text, where, PackDamaged).schema_version
        if version > PACK_SCHEMA_VERSION:
            raise SchemaTooNew(
                f"{where} was written by a newer geomcache",
                expected=f"schema version <= {PACK_SCHEMA_VERSION}",
                found=f"schema version {version}",
                fix="pip install --upgrade geomcache",
            )
        return cls.parse(text, where, PackDamaged)
