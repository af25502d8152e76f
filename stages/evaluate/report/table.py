"""The ablation table: one line an evaluation, success beside how it moved and grasped; as cells and as Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from geomcache.cache_schemas.base import Schema
from geomcache.stages.evaluate.grasp import GraspRates, grasp_rates
from geomcache.stages.evaluate.motion import MotionMeans, motion_means
from geomcache.stages.evaluate.report.comparison import Comparison, TrainingSeeds, compare, compare_training_seeds
from geomcache.stages.evaluate.report.inputs import Evaluation, open_evaluations
from geomcache.stages.evaluate.results import EpisodeResult, SuiteResult

PLAN = ("none", "pool", "qformer", "per_layer", "gated")  # the order of the plan's ablation


class Line(Schema):
    """One evaluation, over all of its own episodes."""

    name: str
    arm: str  # compressor and encoder; "?" where the checkpoint was not found
    finished: bool
    suites: tuple[SuiteResult, ...]
    average: float | None  # mean of the suites' rates, as the field reports LIBERO; None: no episode
    motion: MotionMeans
    grasp: GraspRates


class Report(Schema):
    """Several evaluations: the table, and each against the first."""

    lines: tuple[Line, ...]
    comparisons: tuple[Comparison, ...]
    training_seeds: tuple[TrainingSeeds, ...]
    notes: tuple[str, ...]


def compare_folders(folders: Sequence[Path]) -> Report:
    """Open evaluation folders and compare the first with each other one.

    Raises:
        InputError: one cannot be read or is given twice, or two cannot be paired.
        SchemaTooNew: a newer geomcache wrote one.
    """
    return make_report(open_evaluations(folders))


def make_report(evaluations: Sequence[Evaluation]) -> Report:
    """The first is the baseline; lines stand in the plan's order, then in the given one."""
    return Report(
        lines=tuple(make_line(each) for each in sorted(evaluations, key=_place)),
        comparisons=compare(evaluations),
        training_seeds=compare_training_seeds(evaluations),
        notes=tuple(_notes(evaluations)),
    )


def make_line(evaluation: Evaluation) -> Line:
    """An evaluation's line."""
    results = evaluation.results
    rates = [suite.rate for suite in results.suites]
    return Line(
        name=evaluation.name,
        arm=evaluation.arm,
        finished=results.finished,
        suites=results.suites,
        average=sum(rates) / len(rates) if rates else None,
        motion=motion_means(episode.motion for episode in results.episodes),
        grasp=rates_of(results.episodes),
    )


def rates_of(episodes: Sequence[EpisodeResult]) -> GraspRates:
    """Grasp rates of episodes."""
    return grasp_rates((episode.grasp, episode.success) for episode in episodes)


class Table(NamedTuple):
    """For a terminal, a page or Markdown."""

    title: str
    columns: list[str]
    cells: list[list[str]]


def tables(report: Report) -> tuple[Table, Table]:
    """The ablation table in two halves, a line for each policy: success, and how it moved and grasped."""
    suites = list(dict.fromkeys(suite.suite for line in report.lines for suite in line.suites))
    shown = [*(f"{suite} %" for suite in suites), *(["average %"] if len(suites) > 1 else [])]
    columns = ["policy", "arm", "episodes", *shown, f"less {report.comparisons[0].a}, pp", "p"]
    success = Table("success with 95 % intervals; differences over pairs", columns, [])
    columns = [
        "policy",
        "LDLJ",
        "jerk m/s^3",
        "seam ratio",
        "path eff.",
        "grasp %",
        "first try %",
        "placed if grasped %",
    ]
    motion = Table("how they moved and grasped, over all episodes", columns, [])
    differences = {each.b: each for each in report.comparisons}
    for line in report.lines:
        name = line.name + ("" if line.finished else " (unfinished)")
        found = {suite.suite: suite for suite in line.suites}
        rates = [_rate(found.get(suite)) for suite in suites] + ([percent(line.average)] if len(suites) > 1 else [])
        episodes = str(sum(suite.episodes for suite in line.suites))
        success.cells.append([name, line.arm, episodes, *rates, *_difference(differences.get(line.name))])
        moved = [number(line.motion.ldlj, 1), number(line.motion.jerk_rms, 1), number(line.motion.seam_ratio)]
        grasped = [line.grasp.grasp_rate, line.grasp.first_attempt_rate, line.grasp.placed_given_grasped]
        motion.cells.append([name, *moved, number(line.motion.path_efficiency), *map(percent, grasped)])
    return success, motion


def markdown(table: Table) -> str:
    """For a README."""
    rows = [table.columns, ["---"] * len(table.columns), *table.cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def number(value: float | None, digits: int = 2) -> str:
    """For a cell; "-" where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share for a cell."""
    return number(None if value is None else 100 * value, 0)


def _rate(found: SuiteResult | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found.rate:.0f} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def _difference(found: Comparison | None) -> list[str]:
    """The last two cells; the baseline has none."""
    if found is None:
        return ["-", "-"]
    interval = f"[{100 * found.low:+.0f}, {100 * found.high:+.0f}]"
    return [f"{100 * found.difference:+.1f} {interval}", f"{found.p_holm:.2g}"]


def _place(evaluation: Evaluation) -> int:
    compressor = evaluation.policy.compressor if evaluation.policy else ""
    if evaluation.policy is not None and not evaluation.policy.sees_images and evaluation.policy.encoder is None:
        return -1  # what sees nothing stands before all that does
    return PLAN.index(compressor) if compressor in PLAN else len(PLAN)


def _notes(evaluations: Sequence[Evaluation]) -> list[str]:
    """About the table as a whole: its lines are not over the same episodes, or of unknown policies."""
    notes = []
    if len({frozenset(each.by_key()) for each in evaluations}) > 1:
        notes.append("the lines are over different episodes; differences are over the pairs alone")
    notes += [
        f"{each.name}: {each.results.config.run} does not hold the checkpoint that was evaluated, so its arm is unknown"
        for each in evaluations
        if each.policy is None
    ]
    return notes
