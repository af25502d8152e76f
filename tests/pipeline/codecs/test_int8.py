"""int8 by hand, and why its two scales are both needed."""

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.errors import ConfigError
from geomcache.cache_schemas.token_spec import ChannelStatistics
from geomcache.pipeline.codecs.int8 import Codec
from geomcache.pipeline.tokens import as_tensors
from tests.contracts.test_codecs import SPEC


def _codec(mean: tuple[float, ...], std: tuple[float, ...]) -> Codec:
    statistics = ChannelStatistics(mean=mean, std=std, rows=1)
    return Codec(SPEC.model_copy(update={"codec": "int8", "dim": len(mean), "channel_statistics": statistics}))


def test_one_token_by_hand() -> None:
    """(11, 0, -25) with means (1, 0, 5) and stds (10, 4, 10): (1, 0, -3) std, so the scale is 3 / 127."""
    codec = _codec((1.0, 0.0, 5.0), (10.0, 4.0, 10.0))
    stored = codec.encode(torch.tensor([[[[11.0, 0.0, -25.0]]]]))
    assert stored["tokens"].tolist() == [[[[42, 0, -127]]]]  # 127 / 3 = 42.33
    assert stored["scale"].dtype == np.float16
    assert float(stored["scale"][0, 0, 0]) == np.float16(3 / 127)
    step = float(np.float16(3 / 127))
    expected = torch.tensor([[[[1 + 42 * step * 10, 0.0, 5 - 127 * step * 10]]]])
    torch.testing.assert_close(codec.decode(as_tensors(stored)), expected)


def _channel_error(codec: Codec, tokens: torch.Tensor) -> float:
    """Root mean square over the normal channels, in their own std."""
    error = codec.decode(as_tensors(codec.encode(tokens))) - tokens
    return float((error / tokens.flatten(0, 2).std(dim=0))[..., 4:].square().mean().sqrt())


def test_statistics_take_the_massive_channels_out_of_every_tokens_scale() -> None:
    """Four channels at 30 times the others: 14 % wrong by token alone, below 1 % with channel statistics."""
    tokens = torch.randn(16, 2, 12, 256, generator=torch.Generator().manual_seed(0))
    tokens[..., :4] *= 30
    flat = tokens.flatten(0, 2)
    with_statistics = _codec(tuple(flat.mean(dim=0).tolist()), tuple(flat.std(dim=0).tolist()))
    by_token_alone = _codec((0.0,) * 256, (1.0,) * 256)
    assert _channel_error(with_statistics, tokens) < 0.01
    assert _channel_error(by_token_alone, tokens) > 0.1


def test_a_constant_channel_and_an_all_mean_token_are_exact() -> None:
    codec = _codec((7.0, -2.0), (0.0, 1.0))
    tokens = torch.tensor([[[[7.0, -2.0], [7.0, 3.5]]]])
    assert torch.equal(codec.decode(as_tensors(codec.encode(tokens)))[0, 0, 0], tokens[0, 0, 0])
    assert float(codec.decode(as_tensors(codec.encode(tokens)))[0, 0, 1, 0]) == 7.0


def test_decoding_is_the_same_in_any_batch_and_type_of_memory() -> None:
    codec = _codec((0.5,) * 8, (2.0,) * 8)
    stored = as_tensors(codec.encode(torch.randn(6, 2, 3, 8)))
    part = {name: tensor[::2] for name, tensor in stored.items()}
    assert torch.equal(codec.decode(part), codec.decode(stored)[::2])


def test_without_statistics_it_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="channel_statistics"):
        Codec(SPEC.model_copy(update={"channel_statistics": None}))
