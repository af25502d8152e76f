"""What the tokens of a cache look like as numbers: channels, norms, dead rows, shards that drift.

Everything is measured on an even sample of rows of every shard; tokens with a value that is not finite are counted and
left out of the rest.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import CacheIncomplete, InputError
from geomcache.cache_schemas.layout import shard_rows
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.statistics import even_rows

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# "Massive activations" (Sun et al. 2024, arXiv 2402.17762) are single values of about 1,000 x the median magnitude,
# always in the same few channels. Asked here of whole channels: a root mean square spreads such values over all tokens.
MASSIVE_TIMES_MEDIAN = 10.0
# Modified z-score (Iglewicz and Hoaglin 1993: distance from the median in units of the median distance). Their limit of
# 3.5 is for one value; it would accuse a third of all caches whose shards differ by chance alone. 6 accuses 4 % of
# those with 12 shards and 1 % with 20 (simulated); with fewer than 10 there is no telling which shard is the odd one.
DRIFT_Z = 6.0
_LEAST_SHARDS = 10
_MAD_TO_STD = 1.4826
_LEAST_SPREAD = 0.02  # shards that agree within a few hundredths do not drift, however alike the others are
_BLOCK_VALUES = 1 << 20  # read at once; larger blocks leave the CPU's caches and take up to four times as long
_BINS = 60
_EXAMPLES = 8


class ChannelTable(Schema):
    """Every channel [D] over the finite tokens of the sample."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]


class MassiveChannel(Schema):
    """A channel whose root mean square is more than ``MASSIVE_TIMES_MEDIAN`` times the median channel's."""

    channel: int
    mean: float
    std: float
    times_median: float


class ViewNorms(Schema):
    """Norms of one view's tokens."""

    view: str  # camera name; "pooled" for pooled tokens
    quantiles: tuple[float, ...]  # at QUANTILES; empty when the view has no finite token
    histogram: tuple[int, ...]  # tokens in each bin of norm_edges
    grid: tuple[tuple[float | None, ...], ...] | None  # mean norm at each place; None for pooled tokens: no places


class ShardDrift(Schema):
    """One shard against the whole sample."""

    shard: int
    mean_shift: float  # root mean square over channels of (shard's mean - mean) / std
    std_ratio: float  # root mean square over channels of shard's std / std
    norm_ratio: float  # shard's mean norm / mean norm
    z: float  # the largest modified z-score of the three among all shards


class TokenStatistics(Schema):
    """What ``channel_stats`` found."""

    cache_id: str
    what: str  # encoder, tap, shape, codec in words
    rows: int  # of the whole cache
    sampled_rows: int
    shards: int  # committed, all of them in the sample
    non_finite: int  # values of the sample
    non_finite_share: float
    non_finite_rows: tuple[int, ...]  # the first few; likewise below
    non_finite_row_count: int
    dead_rows: tuple[int, ...]  # all tokens of the row are the same
    dead_row_count: int
    repeated_rows: tuple[tuple[int, int], ...]  # (row, an earlier row of the sample with the same bits)
    repeated_row_count: int
    channels: ChannelTable
    massive_channels: tuple[MassiveChannel, ...]  # largest first
    constant_channels: tuple[int, ...]  # never change
    norm_edges: tuple[float, ...]  # borders of the histograms' bins
    norms: tuple[ViewNorms, ...]
    drift: tuple[ShardDrift, ...]  # shards with a finite token

    @property
    def drifting(self) -> list[ShardDrift]:
        """Shards that deviate from the others, the worst first."""
        return sorted((shard for shard in self.drift if shard.z > DRIFT_Z), key=lambda shard: -shard.z)

    def findings(self) -> list[str]:
        """What a person should know first, one sentence each; empty when there is nothing to say."""
        lines = []
        if self.non_finite:
            lines.append(
                f"{self.non_finite_share:.3%} of the values are not finite, in {self.non_finite_row_count} of "
                f"{self.sampled_rows} rows ({_such_as(self.non_finite_rows)})"
            )
        if self.dead_row_count:
            lines.append(
                f"{self.dead_row_count} rows hold one and the same token everywhere ({_such_as(self.dead_rows)}): "
                "a blank picture or a dead encoder"
            )
        if self.repeated_row_count:
            pairs = [f"{row} = {earlier}" for row, earlier in self.repeated_rows]
            lines.append(f"{self.repeated_row_count} rows repeat another one bit for bit ({_such_as(pairs)})")
        if self.drifting:
            shown = [
                f"{one.shard}: channel means shifted by {one.mean_shift:.2f} std, std x {one.std_ratio:.2f}, "
                f"norm x {one.norm_ratio:.2f}, z {one.z:.1f}"
                for one in self.drifting[:3]
            ]
            lines.append(
                f"{len(self.drifting)} of {self.shards} shards deviate from the others ({_such_as(shown, '; ')}): "
                "other scenes, or a worker with another model or pictures"
            )
        if self.constant_channels:
            lines.append(
                f"{len(self.constant_channels)} of {len(self.channels.mean)} channels never change "
                f"({_such_as(self.constant_channels[:_EXAMPLES])})"
            )
        if self.massive_channels:
            shown = [
                f"{one.channel}: {one.mean:.3g} ± {one.std:.3g}, x {one.times_median:.0f}"
                for one in self.massive_channels[:4]
            ]
            lines.append(
                f"{len(self.massive_channels)} massive channels, root mean square > {MASSIVE_TIMES_MEDIAN:.0f} x the "
                f"median channel's ({_such_as(shown, '; ')})"
            )
        return lines


def block_rows(row_shape: Sequence[int]) -> int:
    """How many rows are read at once."""
    return max(1, _BLOCK_VALUES // int(np.prod(row_shape)))


def channel_stats(cache: CachedTokens, rows: int, progress: Callable[[int, int], None]) -> TokenStatistics:
    """Measure about ``rows`` rows of the cache, the same share of every committed shard and at least one of each.

    Raises:
        CacheIncomplete: no shard is committed yet.
        InputError: no token of the sample is finite.
        CacheDamaged: a row's bytes are not those that were written.
    """
    manifest, spec = cache.manifest, cache.spec
    if not cache.commits:
        raise CacheIncomplete(
            f"the cache {cache.location} holds no shard yet",
            expected=f"some of {manifest.shards} committed shards",
            found="none",
            fix="run the same geomcache extract again; it continues with the missing shards",
        )
    places = {k: shard_rows(k, manifest.rows, manifest.rows_per_shard) for k in sorted(cache.commits)}
    there = sum(map(len, places.values()))
    samples = {
        k: place.start + even_rows(len(place), max(1, round(rows * len(place) / there))) for k, place in places.items()
    }
    total = sum(map(len, samples.values()))
    count, shards, norms_NVG = _Counts(), {}, []
    for shard, sample in samples.items():
        shards[shard] = moments = _Moments(spec.dim)
        for start in range(0, len(sample), block_rows(spec.row_shape)):
            block = sample[start : start + block_rows(spec.row_shape)]
            tokens = cache.tokens(block.tolist())
            count.add(block, tokens)
            tokens = tokens.double()
            norms = tokens.norm(dim=-1)  # in float64: not finite exactly where the token is not
            moments.add(tokens[norms.isfinite()], float(norms[norms.isfinite()].sum()))
            norms_NVG.append(norms.numpy())
            progress(count.rows, total)
    whole = _Moments(spec.dim)
    for moments in shards.values():
        whole.join(moments)
    if whole.count == 0:
        raise InputError(
            f"no token of the cache {manifest.recipe.fingerprint.cache_id} is finite",
            expected="tokens that are numbers",
            found=f"{count.non_finite} values in {total} rows, none of them finite",
            fix="geomcache extract --pack PACK into a new folder, with an encoder and weights that work",
        )
    edges, views = _norms(np.concatenate(norms_NVG), cache)
    massive, constant = _odd_channels(whole)
    return TokenStatistics(
        cache_id=manifest.recipe.fingerprint.cache_id,
        what=describe_tokens(cache),
        rows=manifest.rows,
        sampled_rows=total,
        shards=len(shards),
        non_finite=count.non_finite,
        non_finite_share=count.non_finite / (total * int(np.prod(spec.row_shape))),
        non_finite_rows=tuple(count.non_finite_rows[:_EXAMPLES]),
        non_finite_row_count=len(count.non_finite_rows),
        dead_rows=tuple(count.dead[:_EXAMPLES]),
        dead_row_count=len(count.dead),
        repeated_rows=tuple(count.repeated[:_EXAMPLES]),
        repeated_row_count=len(count.repeated),
        channels=ChannelTable(
            mean=_short(whole.mean), std=_short(whole.std), min=_short(whole.min), max=_short(whole.max)
        ),
        massive_channels=massive,
        constant_channels=constant,
        norm_edges=edges,
        norms=views,
        drift=_drift({k: moments for k, moments in shards.items() if moments.count}, whole),
    )


def describe_tokens(cache: CachedTokens) -> str:
    """Encoder, tap, shape and codec of a cache in words."""
    spec = cache.spec
    shape = f"{spec.views} views x {spec.grid[0]} x {spec.grid[1]} tokens x {spec.dim}"
    if spec.pooled_to is not None:
        shape = f"{spec.pooled_to} pooled tokens x {spec.dim}"
    return f"{spec.encoder}, {spec.tap}, {shape}, codec {spec.codec}"


class _Moments:
    """Count, mean, squared deviations, extremes of every channel, and the sum of norms.

    Blocks are joined by Chan's formula: a large mean beside a small spread, as massive channels have, costs no digits.
    """

    def __init__(self, dim: int) -> None:
        self.count, self.norm_sum = 0, 0.0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._squares = torch.zeros(dim, dtype=torch.float64)
        self.min, self.max = torch.full_like(self.mean, torch.inf), torch.full_like(self.mean, -torch.inf)

    def add(self, tokens_ND: torch.Tensor, norm_sum: float) -> None:
        if len(tokens_ND) == 0:
            return
        block = _Moments(tokens_ND.shape[1])
        block.count, block.norm_sum = len(tokens_ND), norm_sum
        variance, block.mean = torch.var_mean(tokens_ND, dim=0, correction=0)
        block._squares = variance * block.count
        block.min, block.max = tokens_ND.amin(dim=0), tokens_ND.amax(dim=0)
        self.join(block)

    def join(self, other: "_Moments") -> None:
        count = self.count + other.count
        if count == 0:
            return
        apart, share = other.mean - self.mean, other.count / count
        self._squares = self._squares + other._squares + apart**2 * self.count * share
        self.mean = self.mean + apart * share
        self.min, self.max = torch.minimum(self.min, other.min), torch.maximum(self.max, other.max)
        self.count, self.norm_sum = count, self.norm_sum + other.norm_sum

    @property
    def std(self) -> torch.Tensor:
        return (self._squares / self.count).sqrt()


class _Counts:
    """Rows and values that are not as they should be."""

    def __init__(self) -> None:
        self.rows = self.non_finite = 0
        self.non_finite_rows: list[int] = []
        self.dead: list[int] = []
        self.repeated: list[tuple[int, int]] = []
        self._seen: dict[bytes, int] = {}

    def add(self, rows: NDArray[np.int64], tokens_BVGD: torch.Tensor) -> None:
        self.rows += len(rows)
        bad_B = (~tokens_BVGD.isfinite()).flatten(1).sum(dim=1)
        self.non_finite += int(bad_B.sum())
        self.non_finite_rows += rows[(bad_B > 0).numpy()].tolist()
        flat = tokens_BVGD.flatten(1, 2)
        if flat.shape[1] > 1:  # a row of one pooled token says nothing
            self.dead += rows[(flat == flat[:, :1]).flatten(1).all(dim=1).numpy()].tolist()
        for row, values in zip(rows.tolist(), tokens_BVGD.numpy(), strict=True):
            earlier = self._seen.setdefault(hashlib.blake2b(values.tobytes(), digest_size=16).digest(), row)
            self.repeated += [(row, earlier)] if earlier != row else []


def _odd_channels(whole: _Moments) -> tuple[tuple[MassiveChannel, ...], tuple[int, ...]]:
    size = (whole.mean**2 + whole.std**2).sqrt()
    times = (size / size.median().clamp(min=torch.finfo(torch.float64).tiny)).numpy()
    order = [int(channel) for channel in np.argsort(-times, kind="stable") if times[channel] > MASSIVE_TIMES_MEDIAN]
    massive = tuple(
        MassiveChannel(
            channel=channel,
            mean=_round(float(whole.mean[channel])),
            std=_round(float(whole.std[channel])),
            times_median=_round(float(times[channel])),
        )
        for channel in order
    )
    return massive, tuple((whole.min == whole.max).nonzero().flatten().tolist())


def _norms(norms_NVG: NDArray[np.float64], cache: CachedTokens) -> tuple[tuple[float, ...], tuple[ViewNorms, ...]]:
    """Bin edges, and each view's quantiles, histogram and heat map."""
    spec = cache.spec
    finite = np.isfinite(norms_NVG)
    low, high = norms_NVG[finite].min(), norms_NVG[finite].max()
    margin = 1e-6 * high or 0.5  # norms that are all the same need bins too
    edges = np.linspace(low - margin, high + margin, _BINS + 1)
    names = spec.cameras if spec.pooled_to is None else ("pooled",)
    found = []
    for view, name in enumerate(names):
        norms_NG, there_NG = norms_NVG[:, view], finite[:, view]
        values, seen_G = norms_NG[there_NG], there_NG.sum(axis=0)
        grid = None
        if spec.pooled_to is None:
            sums_G = np.where(there_NG, norms_NG, 0.0).sum(axis=0)
            means = [_round(total / seen) if seen else None for total, seen in zip(sums_G, seen_G, strict=True)]
            grid = tuple(tuple(means[start : start + spec.grid[1]]) for start in range(0, len(means), spec.grid[1]))
        found.append(
            ViewNorms(
                view=name,
                quantiles=_short(np.quantile(values, QUANTILES)) if len(values) else (),
                histogram=tuple(np.histogram(values, bins=edges)[0].tolist()),
                grid=grid,
            )
        )
    return tuple(edges.tolist()), tuple(found)


def _drift(shards: Mapping[int, _Moments], whole: _Moments) -> tuple[ShardDrift, ...]:
    std = torch.where(whole.std > 0, whole.std, torch.inf)  # a constant channel cannot drift
    varying = max(1, int((whole.std > 0).sum()))
    norm = max(whole.norm_sum / whole.count, float(np.finfo(np.float64).tiny))
    measures = np.array(
        [
            (
                float((((moments.mean - whole.mean) / std) ** 2).sum() / varying) ** 0.5,
                float(((moments.std / std) ** 2).sum() / varying) ** 0.5,
                moments.norm_sum / moments.count / norm,
            )
            for moments in shards.values()
        ]
    )
    apart = np.abs(measures - np.median(measures, axis=0))
    spread = np.maximum(_MAD_TO_STD * np.median(apart, axis=0), _LEAST_SPREAD)
    z = (apart / spread).max(axis=1) if len(shards) >= _LEAST_SHARDS else np.zeros(len(shards))
    return tuple(
        ShardDrift(
            shard=number,
            mean_shift=_round(measure[0]),
            std_ratio=_round(measure[1]),
            norm_ratio=_round(measure[2]),
            z=_round(score),
        )
        for number, measure, score in zip(shards, measures, z, strict=True)
    )


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def _short(values: "torch.Tensor | NDArray[np.float64]") -> tuple[float, ...]:
    return tuple(_round(value) for value in values.tolist())


def _such_as(examples: Sequence[object], between: str = ", ") -> str:
    return f"such as {between.join(map(str, examples))}"
