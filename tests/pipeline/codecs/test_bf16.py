import numpy as np
import pytest
import torch

from geomcache.cache_schemas.layout import FILL_VALUES
from geomcache.pipeline.codecs.bf16 import NAN_BITS, RELATIVE_ERROR, Codec
from geomcache.pipeline.tokens import as_tensors
from tests.contracts.test_codecs import SPEC

TINY = 2.0**-126  # smallest normal number
LARGEST = float(torch.finfo(torch.bfloat16).max)


def round_trip(values: torch.Tensor) -> torch.Tensor:
    return Codec(SPEC).decode(as_tensors(Codec(SPEC).encode(values)))


def all_bit_patterns(seed: int = 0) -> torch.Tensor:
    """Every upper half once, with lower halves that sit below, on and above the tie, and random ones."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.random.default_rng(seed).integers(0, 2**16, 2**16, dtype=np.uint32)
    bits = np.concatenate([upper | k for k in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)] + [upper | lower])
    return torch.from_numpy(bits.view(np.float32))


def test_equals_torch_for_every_number() -> None:
    values = all_bit_patterns()
    mine, theirs = round_trip(values), values.to(torch.bfloat16).float()
    number = ~values.isnan()
    assert torch.equal(mine[number].view(torch.int32), theirs[number].view(torch.int32))
    assert mine[~number].isnan().all()


def test_stated_bound_holds_and_is_tight() -> None:
    bound = RELATIVE_ERROR
    values = torch.cat([all_bit_patterns(), torch.randn(100_000), torch.randn(1000) * 1e30])
    values = values[values.isfinite() & (values.abs() >= TINY) & (values.abs() <= LARGEST)].double()
    error = (round_trip(values.float()).double() - values).abs() / values.abs()
    assert error.max() <= bound
    assert error.max() > 0.98 * bound  # half-way above a power of two: 2^-8 / (1 + 2^-8)


def test_ties_go_to_even_by_hand() -> None:
    # In [1, 2) neighbours lie 2^-7 apart: 1 + 2^-8 is half-way to an odd last bit, 1 + 3 * 2^-8 half-way to
    # an even one.
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -(1 + 2.0**-8)])
    assert round_trip(values).tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7, -1.0]


def test_a_second_round_trip_changes_nothing() -> None:
    once = round_trip(torch.randn(4096))
    assert torch.equal(round_trip(once), once)


def test_zero_sign_infinity_and_overflow() -> None:
    values = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 3.4028235e38])
    out = round_trip(values)
    assert out.tolist() == [0.0, 0.0, float("inf"), float("-inf"), float("inf")]
    assert out.signbit().tolist() == [False, True, False, True, False]


def test_a_computed_nan_is_not_the_fill_value() -> None:
    patterns = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000], dtype=np.uint32)
    stored = Codec(SPEC).encode(torch.from_numpy(patterns.view(np.float32)))["tokens"]
    assert FILL_VALUES["uint16"] == 0x7FC0
    assert (stored == NAN_BITS).all()
    assert Codec(SPEC).decode({"tokens": torch.tensor([0x7FC0, NAN_BITS], dtype=torch.uint16)}).isnan().all()


def test_reads_strided_tensors() -> None:
    tokens = torch.randn(4, 2, 3, 8)
    stored = torch.from_numpy(Codec(SPEC).encode(tokens)["tokens"])
    assert torch.equal(Codec(SPEC).decode({"tokens": stored[::2]}), tokens.to(torch.bfloat16).float()[::2])


def test_refuses_other_types() -> None:
    with pytest.raises(AssertionError, match="float64"):
        Codec(SPEC).encode(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(AssertionError, match="int64"):
        Codec(SPEC).decode({"tokens": np.zeros(1, dtype=np.int64)})
