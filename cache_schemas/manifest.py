"""manifest.json of a cache, and the commit record that stands beside every finished shard."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from geomcache.cache_schemas.base import Schema, VersionedSchema, is_sealed, unseal
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import CacheDamaged
from geomcache.cache_schemas.fingerprint import Fingerprint
from geomcache.cache_schemas.layout import shard_count
from geomcache.cache_schemas.token_spec import TokenSpec

MANIFEST_NAME = "manifest.json"
EXTRACTION_NAME = "extraction.json"
Hex = Annotated[str, Field(pattern="^[0-9a-f]*$")]
ArrayName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]  # becomes a path: never one that climbs


class ArraySpec(Schema):
    """One stored array of a codec."""

    dtype: str  # Zarr data type on disk, e.g. "uint16"
    row_shape: tuple[int, ...]
    logical_dtype: str  # what the bits mean, e.g. "bfloat16"
    compression: Literal["blosc"] | None = None  # of each row inside the shard: byte shuffle + zstd, lossless


class EncoderRecord(Schema):
    """How to build the encoder again: the live path is made from this, not from the command line."""

    name: str
    config: dict[str, Any]
    license: str


class TokenRecipe(Schema):
    """All that makes tokens what they are; travels with the cache and with every checkpoint."""

    spec: TokenSpec
    contract: Contract
    fingerprint: Fingerprint
    encoder: EncoderRecord

    def describe_difference(self, other: Self) -> list[str]:
        """Differences of what the tokens are; where the encoder's weights lie on a machine is none."""
        return [
            f"{name}.{line}"
            for name in ("spec", "contract", "fingerprint")
            for line in getattr(self, name).describe_difference(getattr(other, name))
        ]


class Manifest(VersionedSchema):
    """What a cache is. Written once, before the first shard; never changed."""

    sealed_since: ClassVar[int | None] = 2
    schema_version: int = 2  # 2: sealed, pooled and int8 tokens; 1 can still be read
    recipe: TokenRecipe
    rows: int = Field(ge=0, le=10**9)
    rows_per_shard: int = Field(ge=1, le=10**6)
    arrays: dict[ArrayName, ArraySpec]
    geomcache_version: str
    derived_from: str | None = None  # id of the cache it was made from by `cache derive`

    def describe_difference(self, other: Self) -> list[str]:
        """Differences of what the cache holds; the version that wrote it is none."""
        same = {name: getattr(other, name) for name in ("recipe", "geomcache_version", "schema_version")}
        rest = super(Manifest, self.model_copy(update=same)).describe_difference(other)
        return [f"recipe.{line}" for line in self.recipe.describe_difference(other.recipe)] + rest

    @property
    def shards(self) -> int:
        """Number of shards of the complete cache."""
        return shard_count(self.rows, self.rows_per_shard)


class ShardStatistics(Schema):
    """Of one shard's tokens as a reader gets them, over finite tokens; what schema version 1 lacks is None."""

    min: float | None  # None: no token is finite
    max: float | None
    mean_norm: float  # of a token
    non_finite: int  # values
    mean: float | None = None
    std: float | None = None
    valid_rows: Hex | None = None  # hex, first row = highest bit: 1 where every value of the row is finite
    codec_max_error: float | None = None  # largest |stored - encoder's|
    codec_rms_error: float | None = None  # root mean square of the same, each channel divided by its std


class ShardCommit(Schema):
    """Written after a shard's bytes are on disk; a shard without one does not exist."""

    shard: int
    first_row: int
    rows: int
    cache_id: str  # of the fingerprint, so that a shard from another cache is recognised
    digests: dict[str, str]  # array name -> SHA-256 of the shard file
    sizes: dict[str, int]  # array name -> bytes of the shard file
    # array name -> hex of each row's crc32c (little-endian, 8 characters a row): a row that is whole but lies in the
    # wrong place, shard or cache fails its check. Empty in schema version 1.
    row_crc32c: dict[str, str] = Field(default_factory=dict)
    statistics: ShardStatistics
    seconds: dict[str, float]  # busy: decode, encode, store, write (earlier: read, encode, write); wall: all of it

    @property
    def invalid_rows(self) -> int:
        """Rows with a value that is not finite; 0 where schema version 1 does not say."""
        mask = self.statistics.valid_rows
        return 0 if mask is None else self.rows - int(mask or "0", 16).bit_count()

    @classmethod
    def read(cls, data: bytes, where: str, manifest: Manifest) -> Self:
        """Parse a record's bytes; ``CacheDamaged`` when they are not those that were written."""
        if manifest.schema_version >= 2 or is_sealed(data):
            data = unseal(
                data, where, CacheDamaged, "geomcache cache verify CACHE --repair, then the same command again"
            )
        return cls.parse(data, where, CacheDamaged)


class ExtractionRecord(Schema):
    """extraction.json: what the last run of ``geomcache extract`` that encoded anything did, and how fast."""

    cache: str
    cache_id: str
    rows: int
    shards: int
    shards_done_before: int
    rows_encoded: int
    masked_rows: dict[int, str]  # of this run: row -> why its tokens are NaN
    rows_not_finite: int  # of this run: with a value that is not finite, masked ones among them
    workers: int
    device: str
    seconds: float  # all
    start_seconds: float  # of them until every worker was ready
    rows_per_second: float  # after that
    busy_seconds: dict[str, float]  # decode, encode, store (codec and statistics), write; over all workers
    slot_deviation: float | None  # CUDA: largest difference of a token in another slot, beside other frames
