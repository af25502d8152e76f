"""Pure functions of shape: where a row lies, and the Zarr v3 metadata of a token array.

Layout (see docs/design.md): one Zarr v3 array per stored field, rows x row shape, one inner chunk per row,
one shard per pack shard, shard index at the end, crc32c on every inner chunk and on the index.
Specification: zarr-specs "sharding_indexed" 1.0 and "crc32c" 1.0.
"""

import math
from typing import Any

EMPTY = 2**64 - 1  # index entry of a row that was not written
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16

# What a row that was never written reads as: NaN where the type has one, never 0.
FILL_VALUES: dict[str, int | str] = {"uint16": 32704, "float32": "NaN", "float16": "NaN", "int8": -128}
DTYPE_BYTES = {"uint16": 2, "float32": 4, "float16": 2, "int8": 1}

# Zarr v3's own blosc codec, so that every reader knows it. Blocks of a whole row: with blosc's own small blocks the
# result is 10 % larger; it then packs as well as numcodecs' separate shuffle filter, which tensorstore refuses.
BLOSC: dict[str, Any] = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 20}


def shard_of(row: int, rows_per_shard: int) -> tuple[int, int]:
    """Row -> (shard number, row inside the shard)."""
    return divmod(row, rows_per_shard)


def shard_count(rows: int, rows_per_shard: int) -> int:
    """Number of shards that hold ``rows`` rows; the last may be short."""
    return math.ceil(rows / rows_per_shard)


def shard_rows(shard: int, rows: int, rows_per_shard: int) -> range:
    """The rows that shard ``shard`` holds."""
    return range(shard * rows_per_shard, min((shard + 1) * rows_per_shard, rows))


def shard_path(array: str, shard: int, row_dims: int) -> str:
    """Path of a shard file inside the store, e.g. ``tokens/c/3/0/0/0``."""
    return "/".join([array, "c", str(shard), *["0"] * row_dims])


def commit_path(shard: int) -> str:
    """Path of a shard's commit record inside the store."""
    return f"commits/{shard:06d}.json"


def array_metadata(
    *,
    rows: int,
    rows_per_shard: int,
    row_shape: tuple[int, ...],
    dtype: str,
    compressed: bool,
    attributes: dict[str, Any],
) -> dict[str, Any]:
    """The ``zarr.json`` of a token array (Zarr v3), as any Zarr v3 reader understands it."""
    plain: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc: dict[str, Any] = {"name": "blosc", "configuration": {"typesize": DTYPE_BYTES[dtype], **BLOSC}}
    checked = {"name": "crc32c"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, *row_shape],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows_per_shard, *row_shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": FILL_VALUES[dtype],
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *row_shape],
                    "codecs": [plain, blosc, checked] if compressed else [plain, checked],
                    "index_codecs": [plain, checked],
                    "index_location": "end",
                },
            }
        ],
        "attributes": attributes,
        "storage_transformers": [],
    }


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """The ``zarr.json`` of the store's root group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}
