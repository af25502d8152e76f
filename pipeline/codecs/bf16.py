"""Tokens as bfloat16: the upper 16 bits of float32, rounded to nearest, ties to even.

Zarr has no bfloat16, so the bits are stored as uint16. What is kept: zeros with their sign, infinities, and
that a value is NaN. 0x7FC0 (the array's fill value) means "this row was never written", so a NaN that an
encoder really made is stored as 0x7FC1. Encoding uses integer operations in numpy: several times faster on a CPU
than torch's cast, and the same bits for every number (a test compares them).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.manifest import ArraySpec
from geomcache.cache_schemas.token_spec import TokenSpec

NAN_BITS = 0x7FC1  # a NaN that was computed; 0x7FC0 is the fill value
RELATIVE_ERROR = 2.0**-8
_SMALLEST_NORMAL = 2.0**-126


class Codec:
    """float32 tokens <-> ``{"tokens": uint16}``."""

    name = "bf16"
    needs_statistics = False

    def __init__(self, spec: TokenSpec) -> None:
        self._spec = spec

    def arrays(self) -> dict[str, ArraySpec]:
        """One uint16 array of the tokens' shape."""
        return {"tokens": ArraySpec(dtype="uint16", row_shape=self._spec.row_shape, logical_dtype="bfloat16")}

    def error_bound(self, tokens_BVGD: torch.Tensor) -> torch.Tensor:
        """2^-8 of each value's magnitude.

        8 significant bits: values in [2^e, 2^(e+1)) lie 2^(e-7) apart, so rounding moves a value by at most
        2^(e-8) <= 2^-8 |x|; below 2^-126 the spacing stays 2^-133. Above 3.39e38 it rounds to infinity.
        """
        return tokens_BVGD.abs().clamp(min=_SMALLEST_NORMAL) * RELATIVE_ERROR

    def encode(self, tokens_BVGD: torch.Tensor) -> dict[str, NDArray[Any]]:
        """[B, V, G, D] float32 on any device -> the same shape in uint16."""
        return {"tokens": bfloat16_bits(tokens_BVGD)}

    def decode(self, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """uint16 bits -> float32 on the bits' device, exact; shares no memory."""
        stored = arrays["tokens"]
        assert stored.dtype == torch.uint16, f"stored tokens are {stored.dtype}, expected uint16"
        return stored.contiguous().view(torch.bfloat16).float()


def bfloat16_bits(tokens: torch.Tensor) -> NDArray[np.uint16]:
    """float32 on any device -> bfloat16 bit patterns of the same shape."""
    assert tokens.dtype == torch.float32, f"tokens are {tokens.dtype}, expected float32"
    values: NDArray[np.float32] = np.ascontiguousarray(tokens.detach().cpu().numpy())
    bits = values.view(np.uint32)
    # Adding 0x7FFF plus the lowest kept bit carries exactly when the dropped half is > 1/2, or = 1/2 and odd.
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    stored: NDArray[np.uint16] = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        stored[nan] = NAN_BITS
    return stored
