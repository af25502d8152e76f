"""The only way an encoder is called, by stage one and by the live path: at its own batch size, the last one padded.

Some kernels round differently at another batch size or number of threads. So the batch size belongs to the TokenSpec
and every call has it, and on a CPU every call runs on one thread (stage one uses more cores by more workers).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.interfaces import GeometryEncoder


def encode_padded(encoder: GeometryEncoder, frames: FrameBatch) -> torch.Tensor:
    """Tokens of any number of time steps.

    Splits into batches of ``spec.encoder_batch_size``, repeats the last row to fill the last batch, drops the
    padding.

    Args:
        encoder: loaded.
        frames: N >= 0 rows.

    Returns:
        [N, V, G, D] float32 on the CPU.
    """
    spec = encoder.spec
    size = spec.encoder_batch_size
    tokens = torch.empty((len(frames), *spec.row_shape), dtype=torch.float32)
    for start in range(0, len(frames), size):
        batch = frames[start : start + size]
        with one_thread():
            tokens_BVGD = encoder.encode(pad_rows(batch, size))
        assert tuple(tokens_BVGD.shape) == (size, *spec.row_shape), (
            f"encoder {spec.encoder} gave {tuple(tokens_BVGD.shape)}, its spec says {(size, *spec.row_shape)}"
        )
        assert tokens_BVGD.dtype == torch.float32, f"encoder {spec.encoder} gave {tokens_BVGD.dtype}"
        tokens[start : start + len(batch)] = tokens_BVGD[: len(batch)]
    return tokens


def slot_deviation(encoder: GeometryEncoder, frames: FrameBatch) -> float:
    """Largest difference of a token when its frame has another slot of the batch and other neighbours.

    0.0 on a CPU; the largest float32 where only one of the two is a number (JSON knows no infinity). A GPU may pick
    another kernel or order of sums only for another batch size, but promises nothing.

    Args:
        encoder: loaded.
        frames: 1 to ``encoder_batch_size`` rows.
    """
    straight = encode_padded(encoder, frames)
    back = np.arange(len(frames) - 1, -1, -1)
    turned = encode_padded(encoder, frames[back])[torch.from_numpy(back.copy())]
    alone = torch.cat([encode_padded(encoder, frames[row : row + 1]) for row in range(min(len(frames), 2))])
    largest = 0.0
    for one, other in ((turned, straight), (alone, straight[: len(alone)])):
        if not torch.equal(one.isnan(), other.isnan()):
            return torch.finfo(torch.float32).max
        largest = max(largest, float((one - other).abs().nan_to_num(0.0).max()))
    return largest


def gflop_per_row(encoder: GeometryEncoder, frames: FrameBatch) -> float:
    """Floating point operations of a time step in 10^9 (a multiplication and an addition are two), of matrix products,
    convolutions and attention.

    Args:
        encoder: loaded.
        frames: ``encoder_batch_size`` rows.
    """
    # The counter does not see a CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encode_padded(encoder, frames)
    return float(counter.get_total_flops()) / encoder.spec.encoder_batch_size / 1e9


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU kernels inside run on one thread; what was set before holds again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pad_rows(frames: FrameBatch, rows: int) -> FrameBatch:
    """Repeat the last row until there are ``rows``; the batch itself when there already are."""
    missing = rows - len(frames)
    assert missing >= 0, f"{len(frames)} rows do not fit into a batch of {rows}"
    if missing == 0:
        return frames

    def pad(field: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([field, np.repeat(field[-1:], missing, axis=0)])

    return FrameBatch(
        pad(frames.images_BVHWC),
        None if frames.depth_BVHW is None else pad(frames.depth_BVHW),
        None if frames.intrinsics_BV33 is None else pad(frames.intrinsics_BV33),
        None if frames.extrinsics_BV44 is None else pad(frames.extrinsics_BV44),
    )
