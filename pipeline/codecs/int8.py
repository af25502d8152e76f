"""Tokens in 8 bits: each channel standardised by frozen statistics, then one float16 scale per token.

code = round((x - mean_D) / std_D / scale), scale = max over the token of |(x - mean_D) / std_D| / 127.

Why both: a few massive channels (30 times the others and more; Sun et al. 2024, "Massive Activations in Large Language
Models", arXiv:2402.17762) would set every token's scale, and the normal channels would lose 14 % (shared measurement);
standardised first, the error is below 1 % of a channel's std. The statistics come from a fixed sample of rows, are part
of the TokenSpec and travel with the cache and every checkpoint. Code -128 means "not finite" and reads as NaN; it is
also the arrays' fill value, so that a lost row reads as NaN, never as 0.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import ConfigError
from geomcache.cache_schemas.manifest import ArraySpec
from geomcache.cache_schemas.token_spec import TokenSpec

_LARGEST, _NOT_FINITE = 127, -128
_FLOAT16_MAX = 65504.0
_FLOAT16_ROUNDING, _FLOAT16_TINIEST = 2.0**-11, 2.0**-24
_SMALLEST_RELATIVE_STD = 1e-5  # of the channel's mean: below, float32 could not hold the difference


class Codec:
    """float32 tokens <-> ``{"tokens": int8, "scale": float16}``."""

    name = "int8"
    needs_statistics = True

    def __init__(self, spec: TokenSpec) -> None:
        if spec.channel_statistics is None:
            raise ConfigError(
                "codec int8 needs channel statistics",
                expected="a TokenSpec with channel_statistics, as `geomcache extract --codec int8` makes it",
                found="none",
            )
        self._spec = spec
        mean_D = torch.tensor(spec.channel_statistics.mean, dtype=torch.float32)
        std_D = torch.tensor(spec.channel_statistics.std, dtype=torch.float32)
        constant_D = std_D <= mean_D.abs() * _SMALLEST_RELATIVE_STD
        self._mean_D, self._std_D = mean_D, torch.where(constant_D, mean_D.abs().clamp(min=1.0), std_D)

    def arrays(self) -> dict[str, ArraySpec]:
        """Codes of the tokens' shape, and one scale per token."""
        shape = self._spec.row_shape
        return {
            "tokens": ArraySpec(dtype="int8", row_shape=shape, logical_dtype="int8"),
            "scale": ArraySpec(dtype="float16", row_shape=shape[:2], logical_dtype="float16"),
        }

    def error_bound(self, tokens_BVGD: torch.Tensor) -> torch.Tensor:
        """Half a step of the token's scale, in units of the channel's std; the scale itself is rounded to 11 bits.

        None (infinity) for tokens farther than 8 million std from the mean: float16 cannot hold their scale.
        """
        scale_BVG1 = self._standardise(tokens_BVGD).abs().amax(dim=-1, keepdim=True) / _LARGEST
        scale_BVG1 = torch.where(scale_BVG1 <= _FLOAT16_MAX, scale_BVG1, torch.inf)
        step = 0.5 + _LARGEST * 2 * _FLOAT16_ROUNDING
        rounding = tokens_BVGD.abs() + self._mean_D.abs()  # of the float32 arithmetic
        return (scale_BVG1 * step + _LARGEST * _FLOAT16_TINIEST) * self._std_D + rounding * 2.0**-21

    def encode(self, tokens_BVGD: torch.Tensor) -> dict[str, NDArray[Any]]:
        """[B, V, G, D] float32 on any device -> codes and scales."""
        assert tokens_BVGD.dtype == torch.float32, f"tokens are {tokens_BVGD.dtype}, expected float32"
        codes_BVGD = np.empty(tokens_BVGD.shape, dtype=np.int8)
        scales_BVG = np.empty(tokens_BVGD.shape[:3], dtype=np.float16)
        for row, tokens_VGD in enumerate(tokens_BVGD.detach().cpu()):  # a row at a time stays in the CPU's cache
            values_VGD = self._standardise(tokens_VGD)
            finite_VGD = torch.isfinite(values_VGD)
            values_VGD = torch.where(finite_VGD, values_VGD, 0.0)
            scale_VG = (values_VGD.abs().amax(dim=-1) / _LARGEST).clamp(max=_FLOAT16_MAX).half()
            divisor_VG1 = torch.where(scale_VG > 0, scale_VG.float(), 1.0)[..., None]
            codes_VGD = (values_VGD / divisor_VG1).round().clamp(-_LARGEST, _LARGEST)
            codes_BVGD[row] = torch.where(finite_VGD, codes_VGD, float(_NOT_FINITE)).to(torch.int8).numpy()
            scales_BVG[row] = scale_VG.numpy()
        return {"tokens": codes_BVGD, "scale": scales_BVG}

    def decode(self, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Codes and scales -> float32 on their device."""
        codes_BVGD, scale_BVG = arrays["tokens"], arrays["scale"]
        assert codes_BVGD.dtype == torch.int8, f"stored tokens are {codes_BVGD.dtype}, expected int8"
        mean_D, std_D = self._mean_D.to(codes_BVGD.device), self._std_D.to(codes_BVGD.device)
        tokens_BVGD = codes_BVGD.float() * scale_BVG.float()[..., None] * std_D + mean_D
        return tokens_BVGD.masked_fill_(codes_BVGD == _NOT_FINITE, float("nan"))

    def _standardise(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens - self._mean_D.to(tokens.device)) / self._std_D.to(tokens.device)
