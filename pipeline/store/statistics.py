"""Numbers about tokens: of a shard, for its commit record; of every channel, for standardising and for codec int8."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.manifest import ShardStatistics
from geomcache.cache_schemas.token_spec import ChannelStatistics
from geomcache.pipeline.interfaces import TokenCodec
from geomcache.pipeline.tokens import as_tensors

_SQUARE_FITS_FLOAT32 = 1e15  # sums of squares too
STATISTICS_ROWS = 2048  # of a cache, evenly spread, from which a run's channel statistics are made


def even_rows(rows: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of ``rows`` row numbers, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(np.int64))


def rows_in_blocks(
    tokens: Callable[[list[int]], torch.Tensor], rows: NDArray[np.int64], block: int = 64
) -> Iterator[torch.Tensor]:
    """Tokens of one row after the other, read many at a time: behind a network each reading costs a latency."""
    for start in range(0, len(rows), block):
        yield from tokens(rows[start : start + block].tolist())


def channel_statistics(tokens: Iterable[torch.Tensor]) -> ChannelStatistics:
    """Mean and standard deviation of every channel over the finite tokens of one row [..., D] after the other.

    Raises:
        InputError: there is no finite token.
    """
    total, square, count, rows = torch.zeros(1), torch.zeros(1), 0, 0
    for row in tokens:
        values_ND = row.double().flatten(0, -2)
        values_ND = values_ND[torch.isfinite(values_ND).all(dim=-1)]
        total, square, count = total + values_ND.sum(0), square + (values_ND**2).sum(0), count + len(values_ND)
        rows += 1
    if count == 0:
        raise InputError("there is no finite token", fix="geomcache cache verify CACHE")
    mean_D = total / count
    std_D = (square / count - mean_D**2).clamp(min=0).sqrt()
    return ChannelStatistics(mean=tuple(mean_D.float().tolist()), std=tuple(std_D.float().tolist()), rows=rows)


def shard_statistics(
    codec: TokenCodec, given_NVGD: torch.Tensor, stored: Mapping[str, NDArray[np.generic]]
) -> ShardStatistics:
    """Summary of a shard's tokens as a reader gets them, and how far they are from what the codec was given.

    Over tokens whose every channel is finite. Channels that do not vary have no part in ``codec_rms_error``.

    Args:
        codec: the cache's.
        given_NVGD: float32, what ``codec.encode`` took.
        stored: what it gave.
    """
    return TokenSums.of(codec, given_NVGD, stored).statistics()


@dataclass(frozen=True)
class _Moments:
    """Number, mean and sum of squared deviations of some tokens, for each channel; float64."""

    count: int
    mean_D: torch.Tensor
    squares_D: torch.Tensor

    def __add__(self, other: "_Moments") -> "_Moments":
        """Of both together (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        if not self.count or not other.count:
            return self if self.count else other
        count, apart_D = self.count + other.count, other.mean_D - self.mean_D
        mean_D = self.mean_D + apart_D * (other.count / count)
        squares_D = self.squares_D + other.squares_D + apart_D**2 * (self.count * other.count / count)
        return _Moments(count, mean_D, squares_D)

    @property
    def variance_D(self) -> torch.Tensor:
        return self.squares_D.clamp(min=0) / max(self.count, 1)


@dataclass(frozen=True)
class TokenSums:
    """What ``ShardStatistics`` needs of some rows. Made block by block, in any thread; blocks are added in order."""

    valid: tuple[bool, ...]  # of each row: every value is finite
    non_finite: int
    lowest: float
    highest: float
    largest_error: float
    norms: float
    error_D: torch.Tensor
    read: _Moments
    given: _Moments

    @classmethod
    def of(cls, codec: TokenCodec, given_NVGD: torch.Tensor, stored: Mapping[str, NDArray[np.generic]]) -> "TokenSums":
        """Of a block; arguments as of ``shard_statistics``."""
        valid, non_finite = np.zeros(len(given_NVGD), dtype=bool), 0
        lowest, highest, largest_error, norms, count = np.inf, -np.inf, 0.0, 0.0, 0
        shift_D = torch.zeros(1)  # near the mean: the spread of a channel far from 0 would drown in rounding
        error_D, read_D, read_squares_D, given_D, given_squares_D = torch.zeros(5, given_NVGD.shape[-1]).double()
        for row, given_VGD in enumerate(given_NVGD):  # a row at a time stays in the CPU's cache
            read_VGD = codec.decode(as_tensors({name: array[row : row + 1] for name, array in stored.items()}))[0]
            finite_VGD = torch.isfinite(read_VGD)
            there_VG = finite_VGD.all(dim=-1)
            valid[row] = bool(there_VG.all())
            read_ND, given_ND = read_VGD.flatten(0, 1), given_VGD.flatten(0, 1)
            if not valid[row]:
                non_finite += int((~finite_VGD).sum())
                read_ND, given_ND = read_VGD[there_VG], given_VGD[there_VG]
            if not len(read_ND):
                continue
            low, high = (float(value) for value in read_ND.aminmax())
            lowest, highest = min(lowest, low), max(highest, high)
            if max(-low, high) > _SQUARE_FITS_FLOAT32:
                read_ND, given_ND = read_ND.double(), given_ND.double()
            if not count:
                shift_D = given_ND.double().mean(dim=0).to(given_ND.dtype)
            error_ND = read_ND - given_ND
            largest_error = max(largest_error, float(error_ND.abs().max()))
            error_D += error_ND.square().sum(dim=0)
            for values_ND, total_D, square_D in (
                (read_ND - shift_D, read_D, read_squares_D),
                (given_ND - shift_D, given_D, given_squares_D),
            ):
                total_D += values_ND.sum(dim=0)
                square_D += values_ND.square().sum(dim=0)
            norms += float(read_ND.norm(dim=-1).sum())
            count += len(read_ND)
        n = max(count, 1)
        read = _Moments(count, shift_D + read_D / n, read_squares_D - read_D**2 / n)
        given = _Moments(count, shift_D + given_D / n, given_squares_D - given_D**2 / n)
        valid_rows = tuple(valid.tolist())
        return cls(valid_rows, non_finite, lowest, highest, largest_error, norms, error_D, read, given)

    def __add__(self, other: "TokenSums") -> "TokenSums":
        return TokenSums(
            valid=self.valid + other.valid,
            non_finite=self.non_finite + other.non_finite,
            lowest=min(self.lowest, other.lowest),
            highest=max(self.highest, other.highest),
            largest_error=max(self.largest_error, other.largest_error),
            norms=self.norms + other.norms,
            error_D=self.error_D + other.error_D,
            read=self.read + other.read,
            given=self.given + other.given,
        )

    @classmethod
    def total(cls, blocks: Sequence["TokenSums"]) -> "TokenSums":
        """Of all blocks, in their order; at least one."""
        return functools.reduce(cls.__add__, blocks)

    def statistics(self) -> ShardStatistics:
        """The summary, when these are all rows of the shard."""
        count, mean_D = max(self.read.count, 1), self.read.mean_D
        varies_D = self.given.variance_D > 0
        relative_D = (self.error_D / count)[varies_D] / self.given.variance_D[varies_D]
        return ShardStatistics(
            min=self.lowest if self.read.count else None,
            max=self.highest if self.read.count else None,
            mean_norm=self.norms / count,
            non_finite=self.non_finite,
            mean=float(mean_D.mean()),
            std=float((self.read.variance_D + (mean_D - mean_D.mean()) ** 2).mean().sqrt()),
            valid_rows=np.packbits(self.valid).tobytes().hex(),
            codec_max_error=self.largest_error,
            codec_rms_error=float(relative_D.mean().sqrt()) if len(relative_D) else 0.0,
        )
