"""manifest.json of a cache, and the commit record that stands beside every finished shard."""

from typing import Any, Self

from pydantic import Field

from geomcache.cache_schemas.base import Schema, VersionedSchema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.fingerprint import Fingerprint
from geomcache.cache_schemas.layout import shard_count
from geomcache.cache_schemas.token_spec import TokenSpec

MANIFEST_NAME = "manifest.json"


class ArraySpec(Schema):
    """One stored array of a codec."""

    dtype: str  # Zarr data type on disk, e.g. "uint16"
    row_shape: tuple[int, ...]
    logical_dtype: str  # what the bits mean, e.g. "bfloat16"


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

    recipe: TokenRecipe
    rows: int = Field(ge=0)
    rows_per_shard: int = Field(ge=1)
    arrays: dict[str, ArraySpec]
    geomcache_version: str

    def describe_difference(self, other: Self) -> list[str]:
        """Differences of what the cache holds; the version that wrote it is none."""
        same = {"recipe": other.recipe, "geomcache_version": other.geomcache_version}
        rest = super(Manifest, self.model_copy(update=same)).describe_difference(other)
        return [f"recipe.{line}" for line in self.recipe.describe_difference(other.recipe)] + rest

    @property
    def shards(self) -> int:
        """Number of shards of the complete cache."""
        return shard_count(self.rows, self.rows_per_shard)


class ShardCommit(Schema):
    """Written after a shard's bytes are on disk; a shard without one does not exist."""

    shard: int
    first_row: int
    rows: int
    cache_id: str  # of the fingerprint, so that a shard from another cache is recognised
    digests: dict[str, str]  # array name -> SHA-256 of the shard file
    sizes: dict[str, int]  # array name -> bytes of the shard file
    statistics: dict[str, float]  # min, max, mean_norm, non_finite
    seconds: dict[str, float]  # read, encode, write
