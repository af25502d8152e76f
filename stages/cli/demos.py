"""``geomcache demos``."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomcache.stages.cli.common import (
    EXIT_FINDING,
    ConfigOption,
    JsonOption,
    SetOption,
    progress_bar,
    say,
    show_values,
)

if TYPE_CHECKING:
    from geomcache.pipeline.sim.recorder import Config, EpisodeReport, RecordSummary


def demos(
    suite: Annotated[str | None, typer.Option(help="libero_object, libero_spatial, ...")] = None,
    tasks: Annotated[list[int] | None, typer.Option("--task", help="Task number; may be repeated.")] = None,
    episodes: Annotated[int | None, typer.Option(help="Successful demonstrations per task.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for <task>_demo.hdf5 files.")] = Path("demos"),
    seed: Annotated[int | None, typer.Option(help="Of the fixtures' placement and the noise.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation added to the executed motion; labels stay clean.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Simulators side by side; the files are the same.")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record demonstrations: a scripted expert solves tasks in the real simulator.

    Files follow the official LIBERO HDF5 layout, with depth and camera matrices added. Only successes are written.
    """
    from geomcache.configs.load import load_config
    from geomcache.pipeline.files import require_config_slot, write_config
    from geomcache.pipeline.sim.recorder import Config, record

    options = {
        "suite": suite,
        "tasks": tasks or None,
        "episodes": episodes,
        "seed": seed,
        "noise": noise,
        "workers": workers,
    }
    settings = load_config(Config, config, sets or [], options)
    require_config_slot(out, Config)
    with progress_bar("recording demonstrations") as progress:
        summary = record(settings, out, attempts_shown(progress, settings))
    write_config(out, settings)
    if summary.attempted == 0:
        say("these demonstrations stood already; nothing to do")
    values = {name: value for name, value in asdict(summary).items() if name != "skipped"}
    show_values({**values, "files": [str(path) for path in summary.files]}, as_json)
    require_all(summary)


def require_all(summary: "RecordSummary") -> None:
    """Exit 1 when a task has fewer demonstrations than asked for."""
    if summary.short_tasks:
        say("fewer demonstrations than asked for, raise max_attempts to try further: " + ", ".join(summary.short_tasks))
        raise typer.Exit(EXIT_FINDING)


def attempts_shown(progress: Callable[..., None], settings: "Config") -> "Callable[[EpisodeReport], None]":
    """The recorder's callback, as a bar of demonstrations over all tasks."""
    from geomcache.pipeline.sim.suites import task_count

    total = settings.episodes * (len(settings.tasks) or task_count(settings.suite))
    demos_of: dict[int, int] = {}
    failures = 0

    def report(attempt: "EpisodeReport") -> None:
        nonlocal failures
        demos_of[attempt.task_index] = attempt.demos
        failures += not attempt.succeeded
        progress(sum(demos_of.values()), total, f"task {attempt.task_index}, {failures} failed attempts")

    return report
