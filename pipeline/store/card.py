"""The data card that stands in a cache as README.md."""

import re

from geomcache.cache_schemas.manifest import Manifest

# The text is all that a cache's record holds, also in caches that stand already; a test holds every encoder's
# checkpoints to it.
_NON_COMMERCIAL = re.compile(r"\bNC\b|non-?commercial", re.IGNORECASE)


def names_non_commercial(license_text: str) -> bool:
    """Whether a licence says by its name that it forbids commercial use: "CC BY-NC 4.0", "... (non-commercial)"."""
    return _NON_COMMERCIAL.search(license_text) is not None


def data_card(manifest: Manifest) -> str:
    """A page a person can read: what made the tokens, their shape, how they are kept, how to open them."""
    recipe, spec = manifest.recipe, manifest.recipe.spec
    arrays = "\n".join(
        f"| `{name}` | {array.dtype} (meaning {array.logical_dtype}"
        + (f", {array.compression}" if array.compression else "")
        + f") | {manifest.rows} x "
        + " x ".join(str(size) for size in array.row_shape)
        + " |"
        for name, array in manifest.arrays.items()
    )
    return f"""# Geometry token cache `{recipe.fingerprint.cache_id}`

Encoder **{spec.encoder}**, tap `{spec.tap}`, licence of its weights: {recipe.encoder.license}.{_warning(manifest)}
{manifest.rows} rows (time steps) x {spec.views} views ({", ".join(spec.cameras)}) x {spec.tokens_per_view} tokens
({spec.grid[0]} x {spec.grid[1]} grid) x {spec.dim} numbers, codec `{spec.codec}`.
{_history(manifest)}
| array | stored as | shape |
|---|---|---|
{arrays}

Plain Zarr v3 with the sharding codec ({manifest.rows_per_shard} rows a shard, one row a chunk, crc32c):
`zarr.open("<this folder>/tokens")` reads it; `bfloat16` arrays are kept as uint16 bit patterns.{_int8(manifest)}
Row i is row i of the pack `{recipe.fingerprint.pack}`. A shard counts only with its record in `commits/`,
which also says how far the stored tokens are from the encoder's: `geomcache cache info`, `geomcache cache verify`.
"""


def _warning(manifest: Manifest) -> str:
    if not names_non_commercial(manifest.recipe.encoder.license):
        return ""
    return (
        "\n\n**NON-COMMERCIAL**: the licence of these weights forbids commercial use. It may reach tokens made with"
        "\nthem and policies trained on those tokens.\n"
    )


def _history(manifest: Manifest) -> str:
    spec, lines = manifest.recipe.spec, []
    if spec.pooled_to is not None:
        lines.append(
            f"Of a row's {spec.views * spec.tokens_per_view} tokens (view, row, column order) only the means of "
            f"{spec.pooled_to} consecutive groups are kept: for the compressors `pool` and `per_layer`."
        )
    if manifest.derived_from is not None:
        lines.append(f"Made from the cache `{manifest.derived_from}`, which keeps its tokens as `{spec.source_codec}`.")
    return "".join(f"\n{line}\n" for line in lines)


def _int8(manifest: Manifest) -> str:
    if manifest.recipe.spec.codec != "int8":
        return ""
    return (
        "\nA token is `code * scale * std + mean`, with `std` and `mean` of each channel from `manifest.json`"
        "\n(`channel_statistics`); code -128 is NaN."
    )
