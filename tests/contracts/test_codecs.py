"""What every codec must hold; a new file under pipeline/codecs is tested by being there."""

from typing import cast

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.layout import FILL_VALUES
from geomcache.cache_schemas.token_spec import ChannelStatistics, TokenSpec
from geomcache.pipeline import plugins
from geomcache.pipeline.interfaces import TokenCodec
from geomcache.pipeline.tokens import as_tensors, build_codec, round_trip

DIM = 16
SPEC = TokenSpec(
    encoder="any",
    tap="any",
    cameras=("a", "b"),
    grid=(3, 4),
    dim=DIM,
    image_size=(42, 56),
    encoder_batch_size=2,
    channel_statistics=ChannelStatistics(mean=(1.0,) * DIM, std=(3.0,) * (DIM - 1) + (90.0,), rows=1),
)


@pytest.fixture(params=plugins.names("codec"))
def codec(request: pytest.FixtureRequest) -> TokenCodec:
    return build_codec(SPEC.model_copy(update={"codec": cast(str, request.param)}))


def tokens(rows: int = 5, seed: int = 0) -> torch.Tensor:
    """With a massive last channel."""
    values = torch.randn((rows, *SPEC.row_shape), generator=torch.Generator().manual_seed(seed)) * 3
    values[..., -1] *= 30
    return values + 1


def test_is_named_after_its_file(codec: TokenCodec) -> None:
    assert isinstance(codec, TokenCodec)
    assert codec.name in plugins.names("codec")


def test_arrays_are_what_it_says(codec: TokenCodec) -> None:
    said, made = codec.arrays(), codec.encode(tokens())
    assert said.keys() == made.keys()
    for name, spec in said.items():
        assert spec.dtype in FILL_VALUES, f"{name}: the store has no fill value for {spec.dtype}"
        assert made[name].dtype == np.dtype(spec.dtype)
        assert made[name].shape == (5, *spec.row_shape)
        assert made[name].flags.c_contiguous


def test_arrays_of_a_pooled_spec_are_smaller(codec: TokenCodec) -> None:
    pooled = build_codec(SPEC.model_copy(update={"codec": codec.name, "pooled_to": 6}))
    assert pooled.arrays()["tokens"].row_shape == (1, 6, DIM)
    assert round_trip(pooled, tokens()[:, :1, :6].contiguous()).shape == (5, 1, 6, DIM)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e6, 1e30])
def test_error_stays_below_the_stated_bound(codec: TokenCodec, scale: float) -> None:
    before = tokens() * scale
    after = round_trip(codec, before)
    assert after.dtype == torch.float32
    assert after.shape == before.shape
    assert ((after - before).abs() <= codec.error_bound(before)).all()


def test_the_bound_says_something(codec: TokenCodec) -> None:
    """Below 2 % of each channel's spread, the massive one's too."""
    before = tokens(50)
    std_D = before.flatten(0, 2).std(dim=0)
    assert (codec.error_bound(before) <= 0.02 * std_D * (1 + before.abs() / std_D)).all()


def test_rows_are_independent(codec: TokenCodec) -> None:
    before = tokens()
    alone = torch.cat([round_trip(codec, before[i : i + 1]) for i in range(5)])
    assert torch.equal(round_trip(codec, before), alone)


def test_a_second_round_trip_changes_nothing(codec: TokenCodec) -> None:
    """Derived caches and their live twins rely on it."""
    once = round_trip(codec, tokens(40))
    assert torch.equal(round_trip(codec, once), once)


def test_what_is_not_finite_stays_not_finite_and_alone(codec: TokenCodec) -> None:
    before = tokens(1)
    clean = round_trip(codec, before).view(-1)
    before.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    after = round_trip(codec, before).view(-1)
    assert after[0].isnan()
    assert not after[1:3].isfinite().any()
    assert after[3:].isfinite().all()
    assert torch.equal(after[DIM:], clean[DIM:])  # of the other tokens


def test_decodes_without_touching_or_sharing_what_is_stored(codec: TokenCodec) -> None:
    stored = codec.encode(tokens())
    kept = {name: array.copy() for name, array in stored.items()}
    codec.decode(as_tensors(kept)).zero_()
    assert all(np.array_equal(kept[name], stored[name]) for name in kept)


def test_the_fill_value_reads_as_nan(codec: TokenCodec) -> None:
    """What another Zarr reader gets for a row that is not there must never look like a token."""
    lost = {
        name: np.full((1, *array.row_shape), FILL_VALUES[array.dtype], dtype=array.dtype)
        for name, array in codec.arrays().items()
    }
    assert codec.decode(as_tensors(lost)).isnan().all()
