"""``geomcache demos``."""

import json
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
    show_table,
    show_values,
)

if TYPE_CHECKING:
    from geomcache.pipeline.sim.recorder import Config, EpisodeReport, RecordSummary
    from geomcache.pipeline.sim.rerender import ReplayReport


def demos(
    suite: Annotated[str | None, typer.Option(help="libero_object, libero_spatial, ...")] = None,
    tasks: Annotated[list[int] | None, typer.Option("--task", help="Task number; may be repeated.")] = None,
    episodes: Annotated[int | None, typer.Option(help="Successful demonstrations per task.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for <task>_demo.hdf5 files.")] = Path("demos"),
    seed: Annotated[int | None, typer.Option(help="Of the fixtures' placement and the noise.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation added to the executed motion; labels stay clean.")
    ] = None,
    perturb: Annotated[
        bool,
        typer.Option("--perturb", help="Push the arm now and then, and --noise 0.06, so that it must recover."),
    ] = False,
    every: Annotated[
        int | None, typer.Option(help="Render and store only every n-th step, n times as fast; no official layout.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Simulators side by side (2.5 GB each); same files.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Instead: replay these HDF5 files and add depth and cameras.")
    ] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record demonstrations: a scripted expert solves tasks in the real simulator.

    Files follow the official LIBERO HDF5 layout, with depth and camera matrices added. Only successes are written.

    With --replay SOURCE nothing is solved: every demonstration of SOURCE (official HDF5) is replayed and rendered again
    with depth and cameras, and the report says whether each replay matched. Size: --set height=256 --set width=256.
    """
    if replay is not None:
        recording = (suite, tasks, episodes, seed, noise, perturb or None, every)
        _replay(replay, out, workers, config, sets or [], as_json, recording=recording)
        return
    from geomcache.configs.load import load_config
    from geomcache.pipeline.files import require_config_slot, write_config
    from geomcache.pipeline.sim.perturbation import STANDARD_NOISE
    from geomcache.pipeline.sim.recorder import Config, record

    options: dict[str, object] = {
        "suite": suite,
        "tasks": tasks or None,
        "episodes": episodes,
        "seed": seed,
        "noise": STANDARD_NOISE if perturb and noise is None else noise,
        "perturb": {} if perturb else None,
        "observe_every": every,
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


def _replay(
    source: Path,
    out: Path,
    workers: int | None,
    config: str | None,
    sets: list[str],
    as_json: bool,
    *,
    recording: tuple[object, ...],
) -> None:
    from geomcache.cache_schemas.errors import InputError
    from geomcache.configs.load import load_config
    from geomcache.pipeline.files import require_config_slot, write_config
    from geomcache.pipeline.sim.rerender import RerenderConfig, rerender

    if any(option is not None and option != [] for option in recording):
        raise InputError(
            "--replay records nothing new",
            expected="no --suite, --task, --episodes, --seed, --noise, --perturb or --every beside --replay",
            fix="leave them out; everything comes from the source's files",
        )
    settings = load_config(RerenderConfig, config, sets, {"workers": workers})
    require_config_slot(out, RerenderConfig)
    with progress_bar("replaying demonstrations") as progress:
        reports = rerender(source, out, settings, lambda report, done, total: progress(done, total, report.file))
    write_config(out, settings)
    damaged = [report for report in reports if report.damage is not None]
    if as_json:
        typer.echo(json.dumps({"out": str(out), "demonstrations": [asdict(report) for report in reports]}))
    else:
        columns = [
            "file",
            "demo",
            "replayed by",
            "fixtures from",
            "state error",
            "actions matched",
            "success",
            "image error",
        ]
        show_table(f"replay of {source}", columns, [_replay_line(report) for report in reports])
    for report in damaged:
        say(f"left out: {report.file} {report.demo}: {report.damage}")
    if damaged:
        raise typer.Exit(EXIT_FINDING)


def _replay_line(report: "ReplayReport") -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    values = (report.way, report.scene, number(report.max_state_error), report.matched, report.success)
    return [report.file, report.demo, *(str(value) for value in values), number(report.image_error)]
