"""``geomcache report``."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with train/, eval/, caches/ and pack/ inside.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; default: FOLDER/report.html.")] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "geomcache report",
) -> None:
    """Write one self-contained HTML page: policies, training curves, tokens beside frames, filmstrips."""
    from geomcache.stages.evaluate.report import write_report

    typer.echo(write_report(folder, out or folder / "report.html", title))
