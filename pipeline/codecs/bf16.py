"""Tokens as bfloat16: the upper 16 bits of float32, rounded to nearest, ties to even.

Zarr has no bfloat16, so the bits are stored as uint16. What is kept: zeros with their sign, infinities, and
that a value is NaN. 0x7FC0 (the array's fill value) means "this row was never written", so a NaN that an
encoder really made is stored as 0x7FC1. Done with integer operations in numpy: several times faster on a CPU
than torch's cast, and the same bits for every number (a test compares them).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.manifest import ArraySpec
from geomcache.cache_schemas.token_spec import TokenSpec

NAN_BITS = 0x7FC1  # a NaN that was computed; 0x7FC0 is the fill value


class Config(Schema):
    """bf16 has no settings."""


class Codec:
    """float32 tokens <-> ``{"tokens": uint16}``."""

    name = "bf16"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()

    @property
    def max_relative_error(self) -> float:
        """2^-8 of the value's magnitude.

        8 significant bits: values in [2^e, 2^(e+1)) lie 2^(e-7) apart, so rounding moves a value by at most
        2^(e-8) <= 2^-8 |x|. Holds for 2^-126 <= |x| <= 3.39e38: below, the spacing stays 2^-133; above, it
        rounds to infinity.
        """
        return 2.0**-8

    def arrays(self, spec: TokenSpec) -> dict[str, ArraySpec]:
        """One uint16 array of the tokens' shape."""
        return {"tokens": ArraySpec(dtype="uint16", row_shape=spec.row_shape, logical_dtype="bfloat16")}

    def encode(self, tokens_BVGD: torch.Tensor) -> dict[str, NDArray[Any]]:
        """[B, V, G, D] float32 on any device -> the same shape in uint16."""
        assert tokens_BVGD.dtype == torch.float32, f"tokens are {tokens_BVGD.dtype}, expected float32"
        values: NDArray[np.float32] = np.ascontiguousarray(tokens_BVGD.detach().cpu().numpy())
        bits = values.view(np.uint32)
        # Adding 0x7FFF plus the lowest kept bit carries exactly when the dropped half is > 1/2, or = 1/2 and
        # odd.
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        stored = rounded.astype(np.uint16)
        nan = np.isnan(values)
        if nan.any():
            stored[nan] = NAN_BITS
        return {"tokens": stored}

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> torch.Tensor:
        """uint16 bits -> float32, exact; takes read-only and strided arrays, shares no memory."""
        stored = arrays["tokens"]
        assert stored.dtype == np.uint16, f"stored tokens are {stored.dtype}, expected uint16"
        bits = stored.astype(np.uint32, order="C")
        bits <<= np.uint32(16)
        return torch.from_numpy(bits.view(np.float32))
