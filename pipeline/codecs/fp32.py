"""Tokens as they are: float32, exact, twice the bytes of bf16. For metric coordinates, and to measure other
codecs against.

Bits are kept, NaN payloads included. An encoder's NaN and the fill value (NaN, "this row was never written")
cannot be told apart here; the shard index can.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.manifest import ArraySpec
from geomcache.cache_schemas.token_spec import TokenSpec


class Config(Schema):
    """fp32 has no settings."""


class Codec:
    """float32 tokens <-> ``{"tokens": float32}``."""

    name = "fp32"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()

    @property
    def max_relative_error(self) -> float:
        """Nothing is rounded."""
        return 0.0

    def arrays(self, spec: TokenSpec) -> dict[str, ArraySpec]:
        """One float32 array of the tokens' shape."""
        return {"tokens": ArraySpec(dtype="float32", row_shape=spec.row_shape, logical_dtype="float32")}

    def encode(self, tokens_BVGD: torch.Tensor) -> dict[str, NDArray[Any]]:
        """[B, V, G, D] float32, any device -> the same values; contiguous CPU tokens share memory."""
        assert tokens_BVGD.dtype == torch.float32, f"tokens are {tokens_BVGD.dtype}, expected float32"
        return {"tokens": np.ascontiguousarray(tokens_BVGD.detach().cpu().numpy())}

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> torch.Tensor:
        """The stored values; a view where the array is writable and contiguous, else a copy."""
        stored = arrays["tokens"]
        assert stored.dtype == np.float32, f"stored tokens are {stored.dtype}, expected float32"
        shareable = stored.flags.writeable and stored.flags.c_contiguous
        return torch.from_numpy(stored if shareable else np.array(stored, order="C"))
