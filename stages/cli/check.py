"""``geomcache check``."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.stages.cli.common import EXIT_FINDING, JsonOption, SetOption, progress_bar, say, show_table


def check(
    run: Annotated[Path, typer.Argument(help="Run folder of geomcache train, or one of its checkpoints.")],
    episodes: Annotated[
        int,
        typer.Option(min=1, help="Demonstrations to replay, spread over the run's data; one of each pack at least."),
    ] = 1,
    demos: Annotated[
        Path | None, typer.Option(help="HDF5 demonstrations of the packs, where packs do not hold the scene.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for check.json and pictures of what differs.")] = None,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Does the simulator show this policy what it was trained on? Before hours of evaluation; docs/check.md.

    The same moments are made twice, as training sees them and as the closed loop does, and faults are named. Exit 1
    when anything that could be compared differs.
    """
    from geomcache.configs.load import load_config
    from geomcache.stages.evaluate.check.run import CheckConfig, check_run

    changes = dict(load_config(CheckConfig, None, sets or [], {}).encoder_config)
    with progress_bar(f"checking {run.resolve().name}") as progress:
        report = check_run(
            run, episodes=episodes, demos=demos, out=out, device=device, encoder_changes=changes, progress=progress
        )
    if as_json:
        typer.echo(report.model_dump_json())
    else:
        words = {True: "passed", False: "FAILED", None: "not possible"}
        show_table(
            f"{report.run} {report.checkpoint}: {report.looked_at}",
            ["check", "", "compared", "expected", "found"],
            [[one.check, words[one.passed], one.compared, one.expected, one.found] for one in report.findings],
        )
        for one in report.findings:
            if one.passed is False:
                typer.echo(f"{one.fault} ({one.check})\n  fix: {one.fix}")
            elif one.passed is None:
                typer.echo(f"not compared: {one.compared}\n  to make it possible: {one.fix}")
        typer.echo(report.verdict)
    if out is not None:
        say(f"details: {out}")
    if not report.sound:
        raise typer.Exit(EXIT_FINDING)
