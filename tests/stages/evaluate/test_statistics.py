"""Intervals and tests against published values, against SciPy's, and against what they claim on simulated episodes."""

import math

import numpy as np
import pytest

from geomcache.stages.evaluate.live_policy import noise_seed
from geomcache.stages.evaluate.statistics import (
    bootstrap_interval,
    holm,
    least_discordant,
    mcnemar,
    mean_interval,
    paired_interval,
    pairs_needed,
    smallest_p,
    student_quantile,
    visible_difference,
    wilson_interval,
)


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


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (1, 9, 0.021484375),  # scipy 1.17.1: binomtest(1, 10).pvalue; by hand (1 + 10) * 2 / 1024
        (9, 1, 0.021484375),
        (40, 70, 0.005447429511444476),  # binomtest(40, 110)
        (12, 5, 0.143463134765625),
        (3000, 3200, 0.011488253770871584),  # 2^6200 has no float
        (4, 4, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-9)


def test_six_discordant_pairs_are_the_least_that_can_be_significant() -> None:
    assert (smallest_p(5), smallest_p(6)) == (2 / 32, 2 / 64)
    assert least_discordant() == 6
    assert least_discordant(0.01) == 8


def test_holm_by_hand() -> None:
    """Sorted 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1; none may be smaller than the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([]) == []


def test_paired_interval_by_hand() -> None:
    """None of 2: 0 +- 1.96 * sqrt(2/4 / 4). 20 of 20: 20/22 +- 1.96 * sqrt((1 - (20/22)^2) / 22), cut at 1."""
    assert paired_interval(0, 0, 2) == pytest.approx((-0.6929, 0.6929), abs=1e-4)
    assert paired_interval(0, 20, 20) == pytest.approx((0.7350, 1.0), abs=1e-4)
    assert paired_interval(20, 0, 20) == pytest.approx((-1.0, -0.7350), abs=1e-4)
    low, high = paired_interval(10, 30, 100_000)
    assert ((low + high) / 2, high - low) == pytest.approx((0.0002, 3.92 * math.sqrt(42) / 1e5), rel=1e-3)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_student_against_the_printed_table(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_interval_over_seeds_by_hand() -> None:
    """Mean 0.2, standard deviation 0.1: half width 4.303 * 0.1 / sqrt(3)."""
    assert mean_interval([0.1, 0.2, 0.3]) == pytest.approx((0.2, 0.2 - 0.2484, 0.2 + 0.2484), abs=1e-4)


@pytest.mark.parametrize(("difference", "share"), [(0.1, 0.3), (0.05, 0.2), (0.3, 0.4)])
def test_the_pairs_needed_give_the_power_promised(difference: float, share: float) -> None:
    """Exact power of the test with so many pairs, summed over every outcome, is about four in five."""
    pairs = pairs_needed(difference, share)
    assert pairs is not None
    power = 0.0
    for discordant in range(pairs + 1):
        weight = _binomial(pairs, discordant, share)
        if weight > 1e-9:
            better = (share + difference) / 2 / share
            won = [k for k in range(discordant + 1) if mcnemar(discordant - k, k) < 0.05]
            power += weight * sum(_binomial(discordant, k, better) for k in won)
    assert 0.74 < power < 0.83
    assert visible_difference(pairs, share) == pytest.approx(difference, rel=0.02)


def _binomial(trials: int, count: int, rate: float) -> float:
    ways = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
    return math.exp(ways + count * math.log(rate) + (trials - count) * math.log(1 - rate))


def test_what_no_number_of_pairs_shows() -> None:
    assert pairs_needed(0.0, 0.3) is None
    assert pairs_needed(1.0, 1.0) == 6  # always against never
    assert visible_difference(5, 1.0) is None
    assert visible_difference(500, 0.0) == pytest.approx(0.0157, abs=2e-4)  # if some do differ, all go one way


def test_the_bootstrap_of_one_task_is_that_of_its_initial_states() -> None:
    """400 independent differences: the interval of the normal approximation, centred on the mean."""
    values = np.random.default_rng(5).choice([-1.0, 0.0, 1.0], size=400, p=[0.1, 0.6, 0.3])
    low, high = bootstrap_interval({("s", 0, state): [value] for state, value in enumerate(values)})
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.012)
    assert (low, high) == bootstrap_interval({("s", 0, state): [value] for state, value in enumerate(values)})


def test_the_bootstrap_keeps_the_seeds_of_a_state_together_and_the_suites_apart() -> None:
    once = {("s", 0, state): [float(state % 2)] for state in range(20)}
    thrice = {unit: values * 3 for unit, values in once.items()}  # the same scene three times tells nothing new
    assert bootstrap_interval(thrice) == bootstrap_interval(once)
    suites = {("a", 0, 0): [1.0], ("b", 0, 0): [-1.0]}  # resampling must not draw suite a twice
    assert bootstrap_interval(suites) == (0.0, 0.0)
    assert bootstrap_interval({("a", 0, 0): [1.0], ("a", 1, 0): [-1.0]}) == (-1.0, 1.0)
    uneven = {("a", 0, 0): [1.0], **{("a", 1, state): [1.0] for state in range(9)}}
    assert bootstrap_interval(uneven) == (1.0, 1.0)  # a task with fewer states is not padded with zeros


@pytest.mark.parametrize("spread", [0.0, 0.15])
def test_the_bootstrap_holds_the_truth_as_often_as_it_says_or_more(spread: float) -> None:
    """Ten tasks of ten states, whose differences vary by ``spread`` around 0.1: 95 % or more, not absurdly wide."""
    generator = np.random.default_rng(11)
    held, width, trials = 0, 0.0, 60
    for _ in range(trials):
        effects = 0.1 + spread * generator.uniform(-1.7, 1.7, 10)
        draws = generator.random((10, 10))
        values = np.where(draws < (0.4 + effects[:, None]) / 2, 1.0, np.where(draws < 0.4, -1.0, 0.0))
        low, high = bootstrap_interval({("s", t, i): [float(values[t, i])] for t in range(10) for i in range(10)})
        held, width = held + (low <= 0.1 <= high), width + (high - low) / trials
    assert held / trials >= 0.93
    exact = 2 * 1.96 * math.sqrt(spread**2 * 1.7**2 / 3 / 10 + (0.4 - 0.01) / 100)
    assert exact < width < 1.5 * exact


def test_noise_is_keyed_on_seed_episode_and_query() -> None:
    keys = [noise_seed(*key) for key in ((7, "a/1", 0), (8, "a/1", 0), (7, "a/2", 0), (7, "a/1", 1))]
    assert len(set(keys)) == 4
    assert keys[0] == noise_seed(7, "a/1", 0)
    assert all(0 <= key < 2**63 for key in keys)
