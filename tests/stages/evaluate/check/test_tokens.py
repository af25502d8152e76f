"""Cached tokens of another encoder, tap, order, codec or picture are named; so is a live encoder that changed."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.errors import ConfigError
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.statistics import channel_statistics
from geomcache.pipeline.tokens import build_codec, build_encoder, round_trip
from geomcache.stages.evaluate.check.finding import Finding
from geomcache.stages.evaluate.check.opened import open_run
from geomcache.stages.evaluate.check.tokens import check_tokens
from tests.stages.evaluate.check.conftest import run_on, the_episode, write_cache
from tests.stages.evaluate.check.test_frames_and_states import assert_named

pytestmark = [pytest.mark.sim, pytest.mark.slow]
STEPS = [0, 40, 41, 100]
DA3 = "depth_anything3"


def _encoded(frames: FrameBatch, contract: Any, **settings: Any) -> torch.Tensor:
    config = {"model": "tiny", "process_size": [28, 28], "batch_size": 3} | settings
    return encode_padded(build_encoder(DA3, config, contract), frames)


def _swapped(frames: FrameBatch) -> FrameBatch:
    return FrameBatch(frames.images_BVHWC[:, ::-1])


def _mirrored(frames: FrameBatch) -> FrameBatch:
    return FrameBatch(np.ascontiguousarray(frames.images_BVHWC[:, :, :, ::-1]))


PLANTED: dict[str, tuple[str, Callable[[FrameBatch, Any], torch.Tensor]]] = {
    "weights": ("other encoder weights", lambda frames, contract: _encoded(frames, contract, seed=5)),
    "tap": ("other tap", lambda frames, contract: _encoded(frames, contract, tap="features.local")),
    "order": ("other camera order", lambda frames, contract: _encoded(_swapped(frames), contract)),
    "mirror": ("horizontal mirror", lambda frames, contract: _encoded(_mirrored(frames), contract)),
}


def test_intact_tokens_pass(folder: Path) -> None:
    run = open_run(folder / "pool", "cpu")
    assert check_tokens(run, the_episode(run), STEPS, "cpu").passed


@pytest.mark.parametrize("name", PLANTED)
def test_tokens_of_another_origin_are_named(name: str, folder: Path, tmp_path: Path) -> None:
    fault, make = PLANTED[name]
    with PackReader(folder / "pack") as pack:
        contract = pack.info.contract
        found = _check_written(folder, tmp_path, lambda _, rows: make(pack.frames(rows), contract))
    assert_named(found, fault)


def test_tokens_that_went_through_int8_are_named(folder: Path, tmp_path: Path) -> None:
    """The cache says bf16; its statistics are of all rows, the check's of few."""
    with CachedTokens(folder / "caches" / DA3) as cache, PackReader(folder / "pack") as pack:
        contract = pack.info.contract
        statistics = channel_statistics(iter(cache.tokens(range(len(cache)))))
        codec = build_codec(cache.spec.model_copy(update={"codec": "int8", "channel_statistics": statistics}))
        found = _check_written(
            folder, tmp_path, lambda _, rows: round_trip(codec, _encoded(pack.frames(rows), contract))
        )
    assert_named(found, "other codec")


def test_a_small_difference_that_is_no_rounding_is_not_called_int8(folder: Path, tmp_path: Path) -> None:
    def noisy(tokens: torch.Tensor, _: list[int]) -> torch.Tensor:
        return tokens + 0.01 * tokens.std() * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))

    assert_named(_check_written(folder, tmp_path, noisy), "unexplained difference")


def test_a_live_codec_that_is_not_the_cache_s_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(folder / "pool", "cpu")
    contract = run.policy.card.contract
    monkeypatch.setattr(run.policy, "live_tokens", lambda frames: _encoded(frames, contract))
    assert_named(check_tokens(run, the_episode(run), STEPS, "cpu"), "other codec")
    with pytest.raises(ConfigError, match="nonsense"):  # the encoder built anew takes the same changes as the live one
        check_tokens(replace(run, encoder_changes={"nonsense": 1}), the_episode(run), STEPS, "cpu")


def test_a_live_encoder_whose_weights_changed_after_their_digest_is_named(folder: Path) -> None:
    run = open_run(folder / "pool", "cpu")
    encoder: Any = run.policy._live._encoder  # type: ignore[union-attr]
    modules = [value for value in vars(encoder).values() if isinstance(value, torch.nn.Module)]
    with torch.no_grad():
        for parameter in itertools.chain.from_iterable(module.parameters() for module in modules):
            parameter.mul_(1.3)
    found = check_tokens(run, the_episode(run), STEPS, "cpu")
    assert_named(found, "other encoder weights")
    assert "live ones" in found.found


def _check_written(folder: Path, tmp_path: Path, change: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> Finding:
    cache = write_cache(folder / "caches" / DA3, tmp_path / "cache", change)
    run = run_on(folder / "pool", tmp_path / "run", cache=cache)
    return check_tokens(run, the_episode(run), STEPS, "cpu")
