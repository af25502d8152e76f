"""Numbers about tokens: of a shard, for its commit record; of every channel, for standardising and for codec int8."""

from collections.abc import Iterable

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
    codec: TokenCodec, given_NVGD: torch.Tensor, stored: dict[str, NDArray[np.generic]]
) -> ShardStatistics:
    """Summary of a shard's tokens as a reader gets them, and how far they are from what the codec was given.

    Args:
        codec: the cache's.
        given_NVGD: float32, what ``codec.encode`` took.
        stored: what it gave.
    """
    valid = np.zeros(len(given_NVGD), dtype=bool)
    lowest, highest, largest_error, non_finite = np.inf, -np.inf, 0.0, 0
    dim = given_NVGD.shape[-1]
    error_D, total_D, square_D = (torch.zeros(dim, dtype=torch.float64) for _ in range(3))
    norm, tokens, count = 0.0, 0, 0
    for row, given_VGD in enumerate(given_NVGD):  # a row at a time stays in the CPU's cache
        read_VGD = codec.decode(as_tensors({name: array[row : row + 1] for name, array in stored.items()}))[0]
        finite_VGD = torch.isfinite(read_VGD)
        valid[row] = bool(finite_VGD.all())
        if not valid[row]:
            non_finite += int((~finite_VGD).sum())
            count_row = int(finite_VGD.sum())
            error_VGD = torch.where(finite_VGD & torch.isfinite(given_VGD), read_VGD - given_VGD, 0.0)
            values = read_VGD[finite_VGD]
            read_VGD = torch.where(finite_VGD, read_VGD, 0.0)
        else:
            count_row, error_VGD, values = read_VGD.numel(), read_VGD - given_VGD, read_VGD
        if values.numel():
            low, high = values.aminmax()
            lowest, highest = min(lowest, float(low)), max(highest, float(high))
            if max(abs(lowest), abs(highest)) > _SQUARE_FITS_FLOAT32:
                read_VGD, error_VGD = read_VGD.double(), error_VGD.double()
        largest_error = max(largest_error, float(error_VGD.abs().max()))
        error_D += error_VGD.square().sum(dim=(0, 1))
        total_D += read_VGD.sum(dim=(0, 1))
        square_D += read_VGD.square().sum(dim=(0, 1))
        norm += float(read_VGD.norm(dim=-1).sum())
        tokens, count = tokens + read_VGD[..., 0].numel(), count + count_row
    if count == 0:
        lowest = highest = 0.0
    per_channel = max(count / dim, 1.0)
    variance_D = (square_D / per_channel - (total_D / per_channel) ** 2).clamp(min=0)
    varies_D = variance_D > 0
    relative_D = (error_D / per_channel)[varies_D] / variance_D[varies_D]
    mean = float(total_D.sum()) / max(count, 1)
    return ShardStatistics(
        min=lowest,
        max=highest,
        mean_norm=norm / max(tokens, 1),
        non_finite=non_finite,
        mean=mean,
        std=max(float(square_D.sum()) / max(count, 1) - mean**2, 0.0) ** 0.5,
        valid_rows=np.packbits(valid).tobytes().hex(),
        codec_max_error=largest_error,
        codec_rms_error=float(relative_D.mean().sqrt()) if len(relative_D) else 0.0,
    )
