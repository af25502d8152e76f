"""Statistics of success: intervals of rates, tests of paired differences. In numpy: only the simulator brings SciPy.

Non-obvious:
- Two policies that meet the same scenes are compared episode by episode. Only episodes that end differently
  (discordant ones) tell them apart; McNemar's test looks at nothing else.
- McNemar's test takes the tasks as given. The bootstrap draws tasks too, so it answers for tasks like these.
- The bootstrap draws with replacement at both levels, which counts the spread within tasks twice: its 95 % intervals
  hold the truth in 96 to 100 of 100 cases where there are several tasks (docs/report.md). Drawing tasks alone is
  too narrow for the ten tasks of a suite, and impossible for one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05  # significance, two-sided; intervals are 95 % ones
POWER = 0.8  # of the planning figures
Z_95 = 1.959963984540054
_Z_POWER = 0.8416212335729143  # standard normal quantile of 0.8
_RESAMPLES = 5000
_SEED = 0

Unit = tuple[str, int, int]  # (suite, task, init state): what the bootstrap draws; its seeds stay together


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (E. B. Wilson, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate, scale = successes / trials, 1 + z**2 / trials
    centre = (rate + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of equal success (McNemar, 1947): binomial(only_a + only_b, 1/2) on discordant pairs.

    Args:
        only_a: pairs in which A alone succeeded.
        only_b: pairs in which B alone succeeded.

    Returns:
        p; 1 without discordant pairs.
    """
    pairs, fewer = only_a + only_b, min(only_a, only_b)
    ways, tail = 1, 1  # to choose none of the pairs, then one, ...; whole numbers: floats would underflow
    for k in range(fewer):
        ways = ways * (pairs - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << pairs))


def smallest_p(discordant: int) -> float:
    """What ``mcnemar`` would give if all discordant pairs went one way: no test of them can find less."""
    return mcnemar(0, discordant)


def least_discordant(level: float = LEVEL) -> int:
    """With fewer discordant pairs ``mcnemar`` cannot fall below ``level``: 6 for 0.05."""
    return next(pairs for pairs in range(1, 1 << 20) if smallest_p(pairs) < level)


def holm(values: Sequence[float]) -> list[float]:
    """p values of several tests, adjusted (S. Holm, 1979): below ``LEVEL`` by chance in at most 5 % of such reports."""
    adjusted, largest = [1.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def paired_interval(only_a: int, only_b: int, pairs: int) -> tuple[float, float]:
    """95 % interval of the difference of paired rates, B less A: Wald's after adding one pair of each discordant kind.

    D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", 2012. It has a width where no pair, or every pair, is discordant; a bootstrap has none there.
    """
    a, b = (only_a + 1) / (pairs + 2), (only_b + 1) / (pairs + 2)
    half = Z_95 * math.sqrt((a + b - (b - a) ** 2) / (pairs + 2))
    return max(-1.0, b - a - half), min(1.0, b - a + half)


def bootstrap_interval(differences: Mapping[Unit, Sequence[float]]) -> tuple[float, float]:
    """95 % percentile interval of the mean difference, by a hierarchical bootstrap with a fixed seed.

    Suites were chosen, so each stays. Of a suite's tasks as many are drawn as there are, and of each drawn task's
    initial states as many as it has, with replacement. Seeds of one initial state stay together: they share a scene.

    Args:
        differences: of every unit, the differences of its seeds, such as success of B less success of A (-1, 0, 1).
    """
    generator = np.random.default_rng(_SEED)
    sums, counts = np.zeros(_RESAMPLES), np.zeros(_RESAMPLES)
    for suite in sorted({unit[0] for unit in differences}):
        levels = _levels(differences, suite)
        tasks = len(levels.states)
        for _ in range(tasks):
            drawn = generator.integers(tasks, size=_RESAMPLES)
            states = levels.states[drawn, None]
            inner = (generator.random((_RESAMPLES, levels.sums.shape[1])) * states).astype(np.int64)
            there = np.arange(levels.sums.shape[1]) < states
            sums += (levels.sums[drawn[:, None], inner] * there).sum(1)
            counts += (levels.counts[drawn[:, None], inner] * there).sum(1)
    low, high = np.quantile(sums / counts, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class _Levels:
    """One suite: a line a task, a column an initial state, padded with zeros."""

    sums: NDArray[np.float64]  # of the differences of the state's seeds
    counts: NDArray[np.float64]
    states: NDArray[np.int64]  # initial states of each task


def _levels(differences: Mapping[Unit, Sequence[float]], suite: str) -> _Levels:
    tasks: dict[int, list[Sequence[float]]] = {}
    for (own, task, _), values in sorted(differences.items()):
        if own == suite:
            tasks.setdefault(task, []).append(values)
    sums = np.zeros((len(tasks), max(map(len, tasks.values()))))
    counts = np.zeros_like(sums)
    for line, states in enumerate(tasks.values()):
        sums[line, : len(states)] = [sum(values) for values in states]
        counts[line, : len(states)] = [len(values) for values in states]
    return _Levels(sums, counts, np.array([len(states) for states in tasks.values()]))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a few independent values, one a seed, with its 95 % interval by Student's t: (mean, low, high).

    Args:
        values: at least 3: two leave one degree of freedom, whose interval is 13 standard errors wide to each side.
    """
    assert len(values) >= 3, values
    mean = float(np.mean(values))
    half = student_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def student_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t with ``freedom`` degrees, by bisection of its probability.

    P(|t| < x) as a finite sum in theta = atan(x / sqrt(freedom)): Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 1 - LEVEL else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(theta: float, freedom: int) -> float:
    term = math.cos(theta) if freedom % 2 else 1.0
    total = 0.0
    for k in range(3 if freedom % 2 else 2, freedom + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    inner = math.sin(theta) * total
    return 2 / math.pi * (theta + inner) if freedom % 2 else inner


def pairs_needed(difference: float, discordant_share: float) -> int | None:
    """Pairs for which McNemar's test finds ``difference`` in 4 of 5 cases.

    n = (z_0.975 sqrt(psi) + z_0.8 sqrt(psi - d^2))^2 / d^2, with psi the share of discordant pairs (R. J. Connor,
    Biometrics 43, 1987).

    Returns:
        n; None where there is no difference.
    """
    if difference == 0:
        return None
    psi, square = max(discordant_share, abs(difference)), difference**2
    return max(
        least_discordant(), math.ceil((Z_95 * math.sqrt(psi) + _Z_POWER * math.sqrt(psi - square)) ** 2 / square)
    )


def visible_difference(pairs: int, discordant_share: float) -> float | None:
    """The least difference of rates that McNemar's test finds in 4 of 5 cases: ``pairs_needed`` the other way round.

    Returns:
        between 0 and 1; None where no difference would be found with so few pairs.
    """
    low, high = 0.0, 1.0  # with 6 pairs the difference between never and always is found
    if pairs < least_discordant():
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if (pairs_needed(middle, discordant_share) or 0) > pairs else (low, middle)
    return high
