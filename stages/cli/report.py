"""``geomcache report``."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.stages.cli.common import JsonOption, show_values


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with train/, eval/, caches/ and pack/ inside.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; default: FOLDER/report.html.")] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "geomcache report",
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page: policies, training curves, tokens beside frames, filmstrips."""
    from dataclasses import asdict

    from geomcache.stages.evaluate.report import policy_rows, write_report

    page = write_report(folder, out or folder / "report.html", title)
    show_values(
        {"report": str(page), **({"policies": list(map(asdict, policy_rows(folder)))} if as_json else {})}, as_json
    )
