"""Tokens as they are: float32, exact, twice the bytes of bf16. For metric coordinates and pooled tokens, and to
measure other codecs against.

Bits are kept, NaN payloads included. An encoder's NaN and the fill value (NaN, "this row was never written")
cannot be told apart here; the shard index can.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.manifest import ArraySpec
from geomcache.cache_schemas.token_spec import TokenSpec


class Codec:
    """float32 tokens <-> ``{"tokens": float32}``."""

    name = "fp32"
    needs_statistics = False

    def __init__(self, spec: TokenSpec) -> None:
        self._spec = spec

    def arrays(self) -> dict[str, ArraySpec]:
        """One float32 array of the tokens' shape."""
        return {"tokens": ArraySpec(dtype="float32", row_shape=self._spec.row_shape, logical_dtype="float32")}

    def error_bound(self, tokens_BVGD: torch.Tensor) -> torch.Tensor:
        """Nothing is rounded."""
        return torch.zeros_like(tokens_BVGD)

    def encode(self, tokens_BVGD: torch.Tensor) -> dict[str, NDArray[Any]]:
        """[B, V, G, D] float32, any device -> the same values; contiguous CPU tokens share memory."""
        assert tokens_BVGD.dtype == torch.float32, f"tokens are {tokens_BVGD.dtype}, expected float32"
        return {"tokens": np.ascontiguousarray(tokens_BVGD.detach().cpu().numpy())}

    def decode(self, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A copy of the stored values on their device."""
        stored = arrays["tokens"]
        assert stored.dtype == torch.float32, f"stored tokens are {stored.dtype}, expected float32"
        return stored.clone(memory_format=torch.contiguous_format)
