"""Intervals against published values."""

import pytest

from geomcache.stages.evaluate.live_policy import noise_seed
from geomcache.stages.evaluate.statistics import wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (18, 20, 0.6990, 0.9721),  # R: binom::binom.confint(18, 20, methods = "wilson")
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I
        (15, 148, 0.0624, 0.1605),  # the same
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)


def test_noise_is_keyed_on_seed_episode_and_query() -> None:
    keys = [noise_seed(*key) for key in ((7, "a/1", 0), (8, "a/1", 0), (7, "a/2", 0), (7, "a/1", 1))]
    assert len(set(keys)) == 4
    assert keys[0] == noise_seed(7, "a/1", 0)
    assert all(0 <= key < 2**63 for key in keys)
