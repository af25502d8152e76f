"""The same bits as codec bf16, each row packed without loss (byte shuffle + zstd, by blosc inside the sharding codec).

About 0.7 of bf16's bytes on network features, for 0.16 GB/s of packing and 1 GB/s or more of unpacking per core: worth
it where storage gives a few hundred MB/s, not on a local NVMe disk. "Lossless" is said of bf16's bits: the rounding
from float32 to bfloat16 is the same as codec bf16's, and so are the tokens, bit for bit.
"""

from geomcache.cache_schemas.manifest import ArraySpec
from geomcache.pipeline.codecs import bf16


class Codec(bf16.Codec):
    """float32 tokens <-> ``{"tokens": uint16}``, compressed by the store."""

    name = "lossless"

    def arrays(self) -> dict[str, ArraySpec]:
        """One compressed uint16 array of the tokens' shape."""
        return {name: array.model_copy(update={"compression": "blosc"}) for name, array in super().arrays().items()}
