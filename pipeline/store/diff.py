"""How two caches differ: in what they say they are, and in their tokens."""

from collections.abc import Callable
from pathlib import Path

import torch

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.manifest import Manifest
from geomcache.pipeline.store.channel_stats import block_rows
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.statistics import even_rows

_PARTS = ("spec", "encoder", "contract", "fingerprint", "pack", "rows", "storage")
_LINE = 160  # characters; statistics of a thousand channels against none would fill pages


class TokenDistance(Schema):
    """Tokens of A against those of B in the same rows; distances are over values that are finite in both."""

    rows: int  # compared, an even sample of those that both have
    equal_rows: int  # bit for bit, decoded
    max_abs: float
    rms: float  # root mean square of A - B
    normalised_rms: float | None  # the same with each channel divided by A's std; None: no channel of A varies
    worst_row: int | None  # the row with the largest rms; None: all are equal
    worst_row_rms: float
    finite_in_one: int  # values that are finite in one of the two only


class CacheDifference(Schema):
    """What differs, part by part; parts that are the same are not there."""

    parts: dict[str, tuple[str, ...]]  # one of _PARTS -> lines that name what differs
    tokens: TokenDistance | None
    not_compared: str | None  # why there are no token distances
    shards: int  # committed in A or B
    equal_shards: int | None  # those with the same bytes in both, by digest; None: laid out differently

    @property
    def equal(self) -> bool:
        """Whether the two hold the same; certain, because every stored byte has gone into a digest."""
        return not self.parts and self.equal_shards == self.shards


def cache_difference(a: Path | str, b: Path | str, rows: int, progress: Callable[[int, int], None]) -> CacheDifference:
    """Compare two caches, finished or not; their tokens in ``rows`` evenly spread rows (0: only their records).

    Raises:
        CacheMissing, CacheDamaged, SchemaTooNew: one of them cannot be opened or read.
    """
    with CachedTokens(a, partial=True) as mine, CachedTokens(b, partial=True) as theirs:
        parts = _parts(mine.manifest, theirs.manifest)
        shapes = [cache.spec.row_shape for cache in (mine, theirs)]
        common = min(len(mine), len(theirs))
        sample = [row for row in even_rows(common, rows).tolist() if _has(mine, row) and _has(theirs, row)]
        tokens, why = None, None
        if rows == 0:
            why = "no rows were asked for"
        elif shapes[0] != shapes[1]:
            why = f"rows have other shapes: {shapes[0]} != {shapes[1]}"
        elif not sample:
            why = "no row stands in both"
        else:
            tokens = _token_distance(mine, theirs, sample, progress)
        shards = mine.commits.keys() | theirs.commits.keys()
        both = mine.commits.keys() & theirs.commits.keys()
        layouts = [(cache.manifest.rows_per_shard, cache.manifest.arrays) for cache in (mine, theirs)]
        same = sum(mine.commits[shard].digests == theirs.commits[shard].digests for shard in both)
        return CacheDifference(
            parts=parts,
            tokens=tokens,
            not_compared=why,
            shards=len(shards),
            equal_shards=same if layouts[0] == layouts[1] else None,
        )


def _has(cache: CachedTokens, row: int) -> bool:
    return row // cache.manifest.rows_per_shard in cache.commits


def _parts(a: Manifest, b: Manifest) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for line in a.describe_difference(b):
        part, rest = "storage", line
        if line.startswith("recipe."):
            part, rest = line.removeprefix("recipe.").split(".", 1)
            part = "pack" if (part, rest.split(":")[0]) == ("fingerprint", "pack") else part
        elif line.startswith("rows:"):
            part = "rows"
        found.setdefault(part, []).append(rest if len(rest) <= _LINE else f"{rest[: _LINE - 4]} ...")
    if any(line.startswith(("encoder_config:", "weights:")) for line in found.get("fingerprint", [])):
        # Digests say that settings differ, the records say which; where weights lie is no difference on its own.
        found["encoder"] = a.recipe.encoder.describe_difference(b.recipe.encoder)
    return {part: tuple(found[part]) for part in _PARTS if found.get(part)}


def _token_distance(
    a: CachedTokens, b: CachedTokens, sample: list[int], progress: Callable[[int, int], None]
) -> TokenDistance:
    dim = a.spec.dim
    count_D, squares_D, total_D, total_squares_D = (torch.zeros(dim, dtype=torch.float64) for _ in range(4))
    shift_D: torch.Tensor | None = None  # near the mean: std of a channel far from 0 would drown in rounding
    equal, largest, one_sided, worst_row, worst = 0, 0.0, 0, None, 0.0
    step = block_rows(a.spec.row_shape)
    for start in range(0, len(sample), step):
        rows = sample[start : start + step]
        x_BND, y_BND = (cache.tokens(rows).flatten(1, 2) for cache in (a, b))
        same_B = (x_BND.view(torch.int32) == y_BND.view(torch.int32)).flatten(1).all(dim=1)
        finite_x, finite_y = x_BND.isfinite(), y_BND.isfinite()
        both = finite_x & finite_y
        one_sided += int((finite_x ^ finite_y).sum())
        x_BND, y_BND = (torch.where(both, values, 0.0).double() for values in (x_BND, y_BND))
        apart = (x_BND - y_BND).square_()
        shift_D = x_BND[0].mean(dim=0) if shift_D is None else shift_D
        centred = torch.where(both, x_BND - shift_D, 0.0)
        count_D += both.sum(dim=(0, 1))
        squares_D += apart.sum(dim=(0, 1))
        total_D += centred.sum(dim=(0, 1))
        total_squares_D += centred.square().sum(dim=(0, 1))
        equal += int(same_B.sum())
        largest = max(largest, float(apart.max()) ** 0.5)
        of_row = (apart.sum(dim=(1, 2)) / both.sum(dim=(1, 2)).clamp(min=1)).sqrt()
        if float(of_row.max()) > worst:
            worst, worst_row = float(of_row.max()), rows[int(of_row.argmax())]
        progress(min(start + step, len(sample)), len(sample))
    seen_D = count_D.clamp(min=1)
    variance_D = (total_squares_D / seen_D - (total_D / seen_D) ** 2).clamp(min=0)
    varies_D = variance_D > 0
    relative_D = squares_D[varies_D] / seen_D[varies_D] / variance_D[varies_D]
    return TokenDistance(
        rows=len(sample),
        equal_rows=equal,
        max_abs=largest,
        rms=float(squares_D.sum() / count_D.sum().clamp(min=1)) ** 0.5,
        normalised_rms=float(relative_D.mean()) ** 0.5 if len(relative_D) else None,
        worst_row=worst_row,
        worst_row_rms=worst,
        finite_in_one=one_sided,
    )
