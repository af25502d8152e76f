"""The data card that stands in a cache as README.md."""

from geomcache.cache_schemas.manifest import Manifest


def data_card(manifest: Manifest) -> str:
    """A page a person can read: what made the tokens, their shape, how to open them."""
    recipe, spec = manifest.recipe, manifest.recipe.spec
    arrays = "\n".join(
        f"| `{name}` | {array.dtype} (meaning {array.logical_dtype}) | {manifest.rows} x "
        + " x ".join(str(size) for size in array.row_shape)
        + " |"
        for name, array in manifest.arrays.items()
    )
    return f"""# Geometry token cache `{recipe.fingerprint.cache_id}`

Encoder **{spec.encoder}**, tap `{spec.tap}`, licence of its weights: {recipe.encoder.license}.
{manifest.rows} rows (time steps) x {spec.views} views ({", ".join(spec.cameras)}) x {spec.tokens_per_view} tokens
({spec.grid[0]} x {spec.grid[1]} grid) x {spec.dim} numbers, codec `{spec.codec}`.

| array | stored as | shape |
|---|---|---|
{arrays}

Plain Zarr v3 with the sharding codec ({manifest.rows_per_shard} rows a shard, one row a chunk, crc32c):
`zarr.open("<this folder>/tokens")` reads it; `bfloat16` arrays are kept as uint16 bit patterns.
Row i is row i of the pack `{recipe.fingerprint.pack}`. A shard counts only with its record in `commits/`.
"""
