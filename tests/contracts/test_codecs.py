"""What every codec must hold; a new file under pipeline/codecs is tested by being there."""

from typing import cast

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.layout import FILL_VALUES
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline import plugins
from geomcache.pipeline.interfaces import TokenCodec
from geomcache.pipeline.tokens import build_codec, round_trip

SPEC = TokenSpec(
    encoder="any",
    tap="any",
    cameras=("a", "b"),
    grid=(3, 4),
    dim=16,
    image_size=(42, 56),
    encoder_batch_size=2,
)


@pytest.fixture(params=plugins.names("codec"))
def codec(request: pytest.FixtureRequest) -> TokenCodec:
    return build_codec(cast(str, request.param))


def tokens(rows: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, *SPEC.row_shape), generator=generator) * 3 + 1


def test_is_named_after_its_file(codec: TokenCodec) -> None:
    assert isinstance(codec, TokenCodec)
    assert codec.name in plugins.names("codec")


def test_arrays_are_what_it_says(codec: TokenCodec) -> None:
    said, made = codec.arrays(SPEC), codec.encode(tokens())
    assert said.keys() == made.keys()
    for name, spec in said.items():
        assert spec.dtype in FILL_VALUES, f"{name}: the store has no fill value for {spec.dtype}"
        assert made[name].dtype == np.dtype(spec.dtype)
        assert made[name].shape == (5, *spec.row_shape)
        assert made[name].flags.c_contiguous


def test_error_stays_below_the_stated_bound(codec: TokenCodec) -> None:
    before = tokens()
    after = round_trip(codec, before)
    assert after.dtype == torch.float32
    assert after.shape == before.shape
    assert ((after - before).abs() <= codec.max_relative_error * before.abs()).all()


def test_rows_are_independent(codec: TokenCodec) -> None:
    before = tokens()
    alone = torch.cat([round_trip(codec, before[i : i + 1]) for i in range(5)])
    assert torch.equal(round_trip(codec, before), alone)


def test_a_second_round_trip_changes_nothing(codec: TokenCodec) -> None:
    once = round_trip(codec, tokens())
    assert torch.equal(round_trip(codec, once), once)


def test_what_is_not_finite_stays_not_finite(codec: TokenCodec) -> None:
    before = tokens(1)
    before.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    after = round_trip(codec, before).view(-1)
    assert after[0].isnan()
    assert after[1:3].tolist() == [float("inf"), float("-inf")]


def test_decodes_read_only_arrays_without_touching_them(codec: TokenCodec) -> None:
    stored = codec.encode(tokens())
    kept = {name: array.copy() for name, array in stored.items()}
    for array in kept.values():
        array.flags.writeable = False
    decoded = codec.decode(kept)
    decoded.zero_()
    assert all(np.array_equal(kept[name], stored[name]) for name in kept)
