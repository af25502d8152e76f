"""What ``geomcache proof`` found: success of arms by cell, comparisons named beforehand, the gate.

A cell is a condition of evaluation; a side of a comparison is ARM/CELL. Pairs are (training seed, suite, task, initial
state, evaluation seed), met by both sides. Over several training seeds they are counted together, and the differences
by seed stand beside them: McNemar's test speaks about these trained policies, the interval over seeds about the method.
"""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import geomcache
from geomcache.cache_schemas.base import Schema, VersionedSchema
from geomcache.stages.evaluate.report.comparison import (
    FEWEST_SEEDS,
    OverSeeds,
    Pairs,
    compare,
    difference_interval,
    over_seeds,
    power,
)
from geomcache.stages.evaluate.report.inputs import Evaluation
from geomcache.stages.evaluate.results import Success, told_results
from geomcache.stages.evaluate.statistics import LEVEL, Unit, holm, mcnemar
from geomcache.stages.train.run import TrainResult


class Cost(Schema):
    """What a part has taken so far, in seconds; repeated work after a kill counts again."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0  # of its own process: without those of simulators and encoders on Ray


@dataclass(frozen=True)
class Trained:
    """One finished training and its finished evaluations."""

    arm: str
    geometry: str  # the cache's name, or none
    seed: int  # of training
    result: TrainResult
    cost: Cost | None  # of the training
    evaluations: Mapping[str, Evaluation]  # cell -> evaluation


class CellOutcome(Success):
    """An arm in a cell, over all its training seeds."""

    told: Success | None = None  # of what it was told instead of its task (shuffle_instructions)
    by_seed: dict[int, Success]


class ArmOutcome(Schema):
    """One arm; what differs by training seed is a mean over them."""

    name: str
    geometry: str
    seeds: tuple[int, ...]
    parameters: int
    steps: int
    cpu_seconds: float | None  # of the training of one seed; None where that was not measured
    open_loop_error: float  # on training rows, normalised units
    held_out_error: float | None  # the same on held-out episodes
    mean_action_error: float
    cells: dict[str, CellOutcome]


class PairedOutcome(Schema):
    """The second side of a comparison against the first."""

    a: str
    b: str
    pairs: Pairs
    difference: float  # success rate of B less that of A
    low: float  # 95 %: bootstrap over tasks and states (their seeds stay together), no narrower than of the pairs alone
    high: float
    p: float  # McNemar's exact test over all pairs
    p_holm: float  # the same, corrected for the number of comparisons in this file
    by_seed: dict[int, float]  # training seed -> difference
    over_seeds: OverSeeds | None  # with at least 3 training seeds

    @property
    def supported(self) -> bool:
        """Corrected p below 0.05, and the same sign with each of at least 3 training seeds."""
        signs = {(value > 0) - (value < 0) for value in self.by_seed.values()}
        return self.p_holm < LEVEL and len(self.by_seed) >= FEWEST_SEEDS and signs in ({1}, {-1})

    @property
    def sentence(self) -> str:
        """For people."""
        said = "a difference is supported" if self.supported else "not resolved"
        text = f"{self.b} against {self.a}: {said} ({100 * self.difference:+.1f} pp, corrected p = {self.p_holm:.2g})."
        if self.supported:
            return text
        if self.p_holm < LEVEL:
            few = len(self.by_seed) < FEWEST_SEEDS
            return f"{text} " + (
                f"It takes {FEWEST_SEEDS} training seeds." if few else "The training seeds disagree about its sign."
            )
        return f"{text} {power(self.pairs)}."


class Judgement(Schema):
    """One line of the gate."""

    arm: str
    cell: str
    rule: Literal["at least", "at most"]
    limit: float
    found: Success | None  # None: not evaluated, so not judged

    @property
    def failed(self) -> bool:
        """Whether it does not hold; what was not evaluated has not failed."""
        if self.found is None:
            return False
        return self.found.rate < self.limit if self.rule == "at least" else self.found.rate > self.limit

    @property
    def sentence(self) -> str:
        """For people."""
        rule = f"{self.rule} {self.limit:.0%}"
        if self.found is None:
            return f"{self.arm} in {self.cell}: {rule} wanted, not evaluated"
        said = "does not hold" if self.failed else "holds"
        return f"{self.arm} in {self.cell}: {self.found.successes}/{self.found.episodes}, {rule} wanted: {said}"


class ProofResults(VersionedSchema):
    """results.json."""

    geomcache_version: str
    packages: dict[str, str]  # of the evaluations; several versions of one are joined by " and "
    machine: str
    evaluated: tuple[str, ...]  # suites, tasks, states and seeds, in words
    arms: tuple[ArmOutcome, ...]
    comparisons: tuple[PairedOutcome, ...]
    missing: tuple[tuple[str, str], ...]  # comparisons one side of which was not evaluated
    gate: tuple[Judgement, ...]
    costs: dict[str, Cost]  # of each part

    @property
    def passed(self) -> bool:
        """Whether nothing that was judged has failed."""
        return not any(line.failed for line in self.gate)


class Rule(NamedTuple):
    """A line of the gate, before it is judged."""

    arm: str
    cell: str
    rule: Literal["at least", "at most"]
    limit: float


def make_results(
    trained: Sequence[Trained],
    comparisons: Sequence[tuple[str, str]],
    rules: Sequence[Rule],
    costs: Mapping[str, Cost],
) -> ProofResults:
    """Sum up.

    Args:
        trained: in the order of the tables.
        comparisons: named beforehand, ARM/CELL against ARM/CELL.
        rules: the gate's.
        costs: of the parts, in the order in which they are shown.

    Raises:
        InputError: two sides cannot be paired (another horizon, no episode in common).
    """
    arms = tuple(
        _arm([one for one in trained if one.arm == name]) for name in dict.fromkeys(one.arm for one in trained)
    )
    cells = {(arm.name, cell): found for arm in arms for cell, found in arm.cells.items()}
    sides: dict[str, dict[int, Evaluation]] = {}
    for one in trained:
        for cell, evaluation in one.evaluations.items():
            sides.setdefault(f"{one.arm}/{cell}", {})[one.seed] = evaluation
    possible = [(a, b) for a, b in comparisons if sides.get(a, {}).keys() & sides.get(b, {}).keys()]
    paired = [_paired(a, b, sides[a], sides[b]) for a, b in possible]
    unknown = [1.0] * (len(comparisons) - len(paired))  # corrected for all that were named, not for those that stand
    corrected = holm([each.p for each in paired] + unknown)[: len(paired)]
    evaluations = [evaluation for one in trained for evaluation in one.evaluations.values()]
    return ProofResults(
        geomcache_version=geomcache.__version__,
        packages=_packages(evaluations),
        machine=f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}",
        evaluated=tuple(dict.fromkeys(map(_extent, evaluations))),
        arms=arms,
        comparisons=tuple(each.model_copy(update={"p_holm": p}) for each, p in zip(paired, corrected, strict=True)),
        missing=tuple(pair for pair in comparisons if pair not in possible),
        gate=tuple(
            Judgement(arm=arm, cell=cell, rule=rule, limit=limit, found=_success(cells.get((arm, cell))))
            for arm, cell, rule, limit in rules
        ),
        costs=dict(costs),
    )


def _arm(own: Sequence[Trained]) -> ArmOutcome:
    results = [one.result for one in own]
    measured = [one.cost.cpu_seconds for one in own if one.cost is not None]
    held_out = [result.validation.open_loop_error for result in results if result.validation is not None]
    cells = dict.fromkeys(cell for one in own for cell in one.evaluations)
    return ArmOutcome(
        name=own[0].arm,
        geometry=own[0].geometry,
        seeds=tuple(one.seed for one in own),
        parameters=results[0].parameters,
        steps=results[0].steps,
        cpu_seconds=_mean(measured) if len(measured) == len(own) else None,
        open_loop_error=_mean([result.open_loop_error for result in results]),
        held_out_error=_mean(held_out) if held_out else None,
        mean_action_error=_mean([result.mean_action_error for result in results]),
        cells={
            cell: _cell({one.seed: one.evaluations[cell] for one in own if cell in one.evaluations}) for cell in cells
        },
    )


def _cell(by_seed: Mapping[int, Evaluation]) -> CellOutcome:
    episodes = [episode for evaluation in by_seed.values() for episode in evaluation.results.episodes]
    return CellOutcome(
        **Success.counts(episodes),
        told=told_results(episodes),
        by_seed={seed: evaluation.results.overall for seed, evaluation in by_seed.items()},
    )


def _paired(a: str, b: str, mine: Mapping[int, Evaluation], theirs: Mapping[int, Evaluation]) -> PairedOutcome:
    seeds = sorted(mine.keys() & theirs.keys())
    found = {seed: compare([mine[seed], theirs[seed]])[0] for seed in seeds}  # refuses what cannot be paired
    total = {name: sum(getattr(each.pairs, name) for each in found.values()) for name in Pairs.model_fields}
    pairs = Pairs(**total)
    units: dict[Unit, list[float]] = {}
    for seed in seeds:
        left, right = mine[seed].by_key(), theirs[seed].by_key()
        for key in left.keys() & right.keys():
            difference = float(right[key].success) - float(left[key].success)
            units.setdefault(key[:3], []).append(difference)
    low, high = difference_interval(units, pairs)
    by_seed = {seed: each.difference for seed, each in found.items()}
    p = mcnemar(pairs.only_a, pairs.only_b)
    return PairedOutcome(
        a=a,
        b=b,
        pairs=pairs,
        difference=pairs.difference,
        low=low,
        high=high,
        p=p,
        p_holm=p,
        by_seed=by_seed,
        over_seeds=over_seeds(by_seed),
    )


def _success(found: CellOutcome | None) -> Success | None:
    return None if found is None else Success(**found.model_dump(include=set(Success.model_fields)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _packages(evaluations: Iterable[Evaluation]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for evaluation in evaluations:
        for episode in evaluation.results.episodes:
            for package, version in episode.versions.items():
                found.setdefault(package, set()).add(version)
    return {package: " and ".join(sorted(versions)) for package, versions in sorted(found.items())}


def _extent(evaluation: Evaluation) -> str:
    config, results = evaluation.results.config, evaluation.results
    suites = ", ".join(config.suites)
    tasks = ", ".join(str(task) for task in sorted({one.task for one in results.tasks}))
    states = f"{config.first_init_state} to {config.first_init_state + config.episodes - 1}"
    return f"{suites}, tasks {tasks}, initial states {states}, seeds {', '.join(map(str, config.seeds))}"
