"""Evaluations compared pair by pair: the same suite, task, initial state and seed, met by two policies.

The first evaluation is the baseline of all others. What can be said, and what cannot, is docs/report.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Literal

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError
from geomcache.stages.evaluate.report.inputs import Evaluation
from geomcache.stages.evaluate.results import EpisodeKey, EpisodeResult
from geomcache.stages.evaluate.statistics import (
    LEVEL,
    Unit,
    bootstrap_interval,
    holm,
    least_discordant,
    mcnemar,
    mean_interval,
    paired_interval,
    pairs_needed,
    smallest_p,
    visible_difference,
)

FEWEST_SEEDS = 3  # for an interval over them

Arm = tuple[str, str | None]  # what was trained, and the digest of the other settings


class Pairs(Schema):
    """How the pairs of A and B ended."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def count(self) -> int:
        """Pairs."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def discordant(self) -> int:
        """Pairs that ended differently."""
        return self.only_a + self.only_b

    @property
    def difference(self) -> float:
        """Success rate of B less that of A."""
        return (self.only_b - self.only_a) / self.count


class TaskPairs(Pairs):
    """The pairs of one task."""

    suite: str
    task: int
    instruction: str


class OverSeeds(Schema):
    """Mean difference over seeds, with the 95 % interval of Student's t: how far another seed may be from it."""

    seeds: tuple[int, ...]
    mean: float
    low: float
    high: float


class Comparison(Schema):
    """B against A."""

    a: str
    b: str
    pairs: Pairs
    difference: float  # success rate of B less that of A, over all pairs
    low: float  # 95 % interval: hierarchical bootstrap over tasks and states, no narrower than of the pairs alone
    high: float
    p: float  # McNemar's exact test
    p_holm: float  # the same, corrected for the number of comparisons in this report
    comparisons: int
    verdict: Literal["resolved", "resolved on these tasks", "not resolved"]
    sentence: str
    only_in_a: int  # episodes without a partner
    only_in_b: int
    unpaired: tuple[str, ...]  # the same by name
    notes: tuple[str, ...]  # other differences between the two
    evaluation_seeds: OverSeeds | None  # with at least 3
    tasks: tuple[TaskPairs, ...]


class TrainingSeeds(OverSeeds):
    """An arm against the baseline's, trained with several seeds each: differences of equal training seeds."""

    a: str
    b: str


def compare(evaluations: Sequence[Evaluation]) -> tuple[Comparison, ...]:
    """The first against each other one.

    Raises:
        InputError: two of them have no episode in common, or played under rules that make pairs meaningless.
    """
    first, *others = evaluations
    found = [_compare(first, other) for other in others]
    return tuple(
        each.model_copy(update=_judged(each, p, len(found)))
        for each, p in zip(found, holm([each.p for each in found]), strict=True)
    )


def compare_training_seeds(evaluations: Sequence[Evaluation]) -> tuple[TrainingSeeds, ...]:
    """For every arm that was trained with at least 3 seeds, as was the baseline's: the difference over those seeds."""
    arms: dict[Arm, dict[int, Evaluation]] = {}  # other steps or data make another arm
    for each in evaluations:
        if each.policy is not None and each.policy.training_seed is not None:
            arms.setdefault(_arm(each), {}).setdefault(each.policy.training_seed, each)
    baseline = _arm(evaluations[0])
    found = []
    for arm, trained in arms.items():
        seeds = sorted(trained.keys() & arms.get(baseline, {}).keys())
        if arm != baseline and len(seeds) >= FEWEST_SEEDS:
            values = [_count(_paired(arms[baseline][seed], trained[seed])).difference for seed in seeds]
            mean, low, high = mean_interval(values)
            a, b = (_arm_name(one, arms) for one in (baseline, arm))
            found.append(TrainingSeeds(a=a, b=b, seeds=tuple(seeds), mean=mean, low=low, high=high))
    return tuple(found)


def _arm_name(arm: Arm, arms: Mapping[Arm, Mapping[int, Evaluation]]) -> str:
    """With a run's name where the same arm was trained with other settings too."""
    alike = [one for one in arms if one[0] == arm[0]]
    return arm[0] if len(alike) == 1 else f"{arm[0]} as {next(iter(arms[arm].values())).name}"


def _arm(evaluation: Evaluation) -> Arm:
    return evaluation.arm, evaluation.policy.settings if evaluation.policy is not None else None


def name_episodes(keys: Iterable[EpisodeKey]) -> list[str]:
    """``libero_object tasks 0-3: initial states 5-9, seed 7``; tasks that lack the same ones share a line."""
    states: dict[tuple[str, int, int], list[int]] = {}
    for suite, task, state, seed in sorted(keys):
        states.setdefault((suite, seed, task), []).append(state)
    tasks: dict[tuple[str, int, str], list[int]] = {}
    for (suite, seed, task), found in sorted(states.items()):
        tasks.setdefault((suite, seed, _ranges(found)), []).append(task)
    return [
        f"{suite} tasks {_ranges(found)}: initial states {shown}, seed {seed}"
        for (suite, seed, shown), found in tasks.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """``1, 3-5`` for 1 3 4 5."""
    runs = [[pair[1] for pair in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


_Pair = tuple[EpisodeResult, EpisodeResult]


def _paired(a: Evaluation, b: Evaluation) -> list[_Pair]:
    """Episodes that both have; ``InputError`` where there are none, or where they were not the same task."""
    mine, theirs = a.by_key(), b.by_key()
    common = [key for key in mine if key in theirs]
    if not common:
        raise InputError(
            f"{a.name} and {b.name} have no episode in common",
            expected="the same suites, tasks, initial states and seeds",
            found=f"{a.name}: {_extent(a)}; {b.name}: {_extent(b)}",
            fix="geomcache eval RUN with the same --suite, --tasks, --episodes and --seeds",
        )
    suites = {key[0] for key in common}
    limits = [{suite.suite: suite.horizon for suite in each.results.suites} for each in (a, b)]
    rules = {f"horizon of {suite}": (limits[0][suite], limits[1][suite]) for suite in sorted(suites)}
    rules["settle_steps"] = (a.results.config.settle_steps, b.results.config.settle_steps)
    differences = [
        f"{name}: {left} in {a.name}, {right} in {b.name}" for name, (left, right) in rules.items() if left != right
    ]
    if differences:
        raise InputError(
            f"{a.name} and {b.name} cannot be paired: they played by different rules",
            expected="the same horizon and settle_steps",
            found="; ".join(differences),
            fix="evaluate one of them again with the settings of the other",
        )
    pairs = [(mine[key], theirs[key]) for key in common]
    elsewhere = [
        left.key
        for left, right in pairs
        if None not in (left.init_state_digest, right.init_state_digest)
        and left.init_state_digest != right.init_state_digest
    ]
    if elsewhere:
        raise InputError(
            f"{a.name} and {b.name} cannot be paired: their initial states of the same number are others",
            expected="the same lists of initial states, so the same releases of LIBERO and geomcache",
            found="; ".join(name_episodes(elsewhere)),
            fix="evaluate one of them again",
        )
    return pairs


def _extent(evaluation: Evaluation) -> str:
    episodes = evaluation.results.episodes
    if not episodes:
        return "no finished episode"
    suites = ", ".join(sorted({episode.suite for episode in episodes}))
    tasks = _ranges(sorted({episode.task for episode in episodes}))
    states = _ranges(sorted({episode.init_state for episode in episodes}))
    seeds = _ranges(sorted({episode.seed for episode in episodes}))
    return f"{suites}, tasks {tasks}, initial states {states}, seeds {seeds}"


def _count(pairs: Iterable[_Pair]) -> Pairs:
    ends = [(left.success, right.success) for left, right in pairs]
    return Pairs(
        both=ends.count((True, True)),
        only_a=ends.count((True, False)),
        only_b=ends.count((False, True)),
        neither=ends.count((False, False)),
    )


def _compare(a: Evaluation, b: Evaluation) -> Comparison:
    pairs = _paired(a, b)
    counts = _count(pairs)
    units: dict[Unit, list[float]] = {}
    seeds: dict[int, list[float]] = {}
    tasks: dict[tuple[str, int], list[_Pair]] = {}
    for left, right in pairs:
        difference = float(right.success) - float(left.success)
        units.setdefault((left.suite, left.task, left.init_state), []).append(difference)
        seeds.setdefault(left.seed, []).append(difference)
        tasks.setdefault((left.suite, left.task), []).append((left, right))
    low, high = difference_interval(units, counts)
    p = mcnemar(counts.only_a, counts.only_b)
    only_a, only_b = a.by_key().keys() - b.by_key().keys(), b.by_key().keys() - a.by_key().keys()
    return Comparison(
        a=a.name,
        b=b.name,
        pairs=counts,
        difference=counts.difference,
        low=low,
        high=high,
        p=p,
        p_holm=p,
        comparisons=1,
        verdict="not resolved",
        sentence="",
        only_in_a=len(only_a),
        only_in_b=len(only_b),
        unpaired=tuple(
            f"only in {each.name}: {line}" for each, keys in ((a, only_a), (b, only_b)) for line in name_episodes(keys)
        ),
        notes=tuple(_notes(a, b)),
        evaluation_seeds=over_seeds({seed: sum(values) / len(values) for seed, values in seeds.items()}),
        tasks=tuple(
            TaskPairs(suite=suite, task=task, instruction=own[0][0].instruction, **_count(own).model_dump())
            for (suite, task), own in sorted(tasks.items())
        ),
    )


def difference_interval(units: Mapping[Unit, Sequence[float]], pairs: Pairs) -> tuple[float, float]:
    """95 % interval of a difference of success rates: hierarchical bootstrap, no narrower than of the pairs alone.

    Args:
        units: (suite, task, state) -> B's success less A's, of each of its seeds.
        pairs: the same, counted.
    """
    # with few pairs a bootstrap knows too little: of three equal ones it is certain
    intervals = bootstrap_interval(units), paired_interval(pairs.only_a, pairs.only_b, pairs.count)
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def over_seeds(differences: Mapping[int, float]) -> OverSeeds | None:
    """Of each seed's difference; None of fewer than 3."""
    if len(differences) < FEWEST_SEEDS:
        return None
    mean, low, high = mean_interval(list(differences.values()))
    return OverSeeds(seeds=tuple(differences), mean=mean, low=low, high=high)


def _notes(a: Evaluation, b: Evaluation) -> list[str]:
    """What differs beside the policy, and does not forbid the comparison."""
    notes = [f"{each.name} is unfinished" for each in (a, b) if not each.results.finished]
    left, right = a.results, b.results
    if left.conditions.checkpoint_weights == right.conditions.checkpoint_weights:
        notes.append("both acted with the same weights: what differs is the settings")
    mine = {name: getattr(left.config, name) for name in ("execute_steps", "averaged", "without_geometry")}
    theirs = {name: getattr(right.config, name) for name in mine}
    for name in ("mode", "device"):
        mine[name], theirs[name] = getattr(left.conditions, name), getattr(right.conditions, name)
    mine["under"], theirs["under"] = (", ".join(one.config.describe_changes()) or "nothing" for one in (left, right))
    notes += [
        f"{name}: {mine[name]} in {a.name}, {theirs[name]} in {b.name}" for name in mine if mine[name] != theirs[name]
    ]
    versions = [{package for one in each.episodes for package in one.versions.items()} for each in (left, right)]
    for package in sorted({package for package, _ in versions[0] ^ versions[1]}):
        shown = [", ".join(sorted(v for name, v in each if name == package)) or "none" for each in versions]
        notes.append(f"{package}: {shown[0]} in {a.name}, {shown[1]} in {b.name}")
    return notes


def _judged(found: Comparison, p_holm: float, comparisons: int) -> dict[str, object]:
    """The fields that depend on how many comparisons there are, and the sentence."""
    update: dict[str, object] = {"p_holm": p_holm, "comparisons": comparisons}
    better, worse = (found.b, found.a) if found.difference > 0 else (found.a, found.b)
    interval = f"95 % [{100 * found.low:+.0f}, {100 * found.high:+.0f}]"
    corrected = f" after Holm's correction for {comparisons} comparisons" if comparisons > 1 else ""
    test = f"p = {p_holm:.2g}{corrected}, {found.pairs.count} pairs"
    change = f"{100 * found.difference:+.1f} pp for {found.b}"
    if p_holm < LEVEL and (found.low > 0 or found.high < 0):
        text = f"resolved: {better} succeeds more often than {worse} ({change}, {interval}, {test})"
        return {**update, "verdict": "resolved", "sentence": text}
    if p_holm < LEVEL:
        text = (
            f"resolved on these tasks: {better} succeeds more often than {worse} on them ({change}, {test}), but tasks "
            f"differ so much that on others it may be nothing ({interval})"
        )
        return {**update, "verdict": "resolved on these tasks", "sentence": text}
    text = f"not resolved: {change}, {interval}, {test}. {power(found.pairs)}"
    return {**update, "verdict": "not resolved", "sentence": text}


def power(pairs: Pairs) -> str:
    """What these pairs could have shown, and how many would show the difference that they have."""
    share = pairs.discordant / pairs.count
    visible = visible_difference(pairs.count, share)
    if visible is None:
        return f"So few pairs resolve nothing: the least p they could give is {smallest_p(pairs.count):.2g}"
    text = f"With these {pairs.count} pairs a difference below about {100 * visible:.0f} pp cannot be seen"
    needed = pairs_needed(pairs.difference, share)
    if pairs.discordant < least_discordant():
        text += f" (only {pairs.discordant} ended differently; p < {LEVEL:g} takes {least_discordant()})"
    return text if needed is None else f"{text}; about {needed:,} pairs would be needed for this one"
