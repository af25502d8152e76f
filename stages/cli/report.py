"""``geomcache report``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomcache.stages.cli.common import JsonOption, say, show_table, show_values

if TYPE_CHECKING:
    from geomcache.stages.evaluate.report.comparison import OverSeeds
    from geomcache.stages.evaluate.report.table import Report

_PAGE, _COMPARISON = "report.html", "comparison.html"


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="One folder of runs or one evaluation: its page. More evaluations: the first against each other."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file; default: FOLDER/report.html, or comparison.html in the folder that holds all."),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "geomcache report",
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page: success with intervals, filmstrips, metrics, curves; or a comparison.

    Evaluations are compared pair by pair on the same suite, task, initial state and seed, and the answer is plain:
    resolved, or not with so many pairs; docs/report.md.
    """
    from dataclasses import asdict

    from geomcache.stages.evaluate.report.inputs import is_evaluation
    from geomcache.stages.evaluate.report.page import policy_rows, write_comparison, write_evaluation, write_report

    if len(folders) > 1:
        page = out or _common_folder(folders) / _COMPARISON
        found = write_comparison(folders, page, title)
        if as_json:
            show_values({"report": str(page), **found.model_dump(mode="json")}, as_json)
        else:
            _print(found, page)
        return
    page = out or folders[0] / _PAGE
    values: dict[str, Any] = {"report": str(page)}
    if is_evaluation(folders[0]):
        results = write_evaluation(folders[0], page, title).results
        if not results.finished:
            say("this evaluation is unfinished")
        overall = results.overall
        if changes := results.config.describe_changes():
            values["under"] = ", ".join(changes)
        values |= {"success": f"{overall.successes}/{overall.episodes} [{overall.low:.2f}, {overall.high:.2f}]"}
        if as_json:
            values = {"report": str(page), **results.model_dump(mode="json", exclude={"episodes"})}
    else:
        write_report(folders[0], page, title)
        values |= {"policies": list(map(asdict, policy_rows(folders[0])))} if as_json else {}
    show_values(values, as_json)


def _common_folder(folders: list[Path]) -> Path:
    import os

    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def _print(found: "Report", page: Path) -> None:
    from geomcache.stages.evaluate.report.table import tables

    for table in tables(found):
        show_table(*table)
    for each in found.comparisons:
        typer.echo(f"{each.b} against {each.a}: {each.sentence}")
        show_table(
            "by task",
            ["task", "pairs", "both", f"only {each.a}", f"only {each.b}", "neither", "pp"],
            [
                [
                    f"{task.suite} {task.task}: {task.instruction}",
                    *map(str, (task.count, task.both, task.only_a, task.only_b, task.neither)),
                    f"{100 * task.difference:+.1f}",
                ]
                for task in each.tasks
            ],
        )
        if each.evaluation_seeds:
            _print_seeds(f"over the evaluation seeds, {each.b} less {each.a}", each.evaluation_seeds)
        for line in (*each.notes, *each.unpaired):
            say(line)
    for seeds in found.training_seeds:
        _print_seeds(f"over the training seeds, {seeds.b} less {seeds.a}", seeds)
    for line in found.notes:
        say(line)
    typer.echo(f"report: {page}")


def _print_seeds(what: str, found: "OverSeeds") -> None:
    seeds = ", ".join(map(str, found.seeds))
    interval = f"95 % [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    typer.echo(f"{what} ({seeds}): {100 * found.mean:+.1f} pp, {interval}")
