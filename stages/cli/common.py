"""What all commands share: the console, options, progress bars, how results are shown. Imports nothing heavy."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from geomcache.cache_schemas.base import Schema

EXIT_FINDING, EXIT_MISTAKE = 1, 2
LOG_LINE_SECONDS = 20.0

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE|PRESET", help="YAML file, or the name of a shipped preset."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.SUBKEY=VALUE", help="Change one setting (YAML value); may be repeated."),
]
UnlockOption = Annotated[
    bool, typer.Option("--unlock", help="Take over the write lock that a dead run on another machine left.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@contextmanager
def progress_bar(title: str, *, lines: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; yields ``report(done, total, text="")``.

    Where standard error is no terminal, or with ``lines`` (several processes share it), a line now and then instead.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if lines or not console.is_terminal:
        yield _LineNowAndThen(title)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),  # in 80 columns there is room for the text
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task(title, total=None, text="")

        def report(done: int, total: int, text: str = "") -> None:
            progress.update(task, completed=done, total=total, text=text)

        yield report


class _LineNowAndThen:
    """Progress for log files."""

    def __init__(self, title: str) -> None:
        self._title, self._next = title, time.monotonic() + LOG_LINE_SECONDS

    def __call__(self, done: int, total: int, text: str = "") -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LOG_LINE_SECONDS
            say(f"{self._title}: {done}/{total} {text}".rstrip())


def say(text: str) -> None:
    """A line for a person, on standard error, so that standard output stays machine-readable."""
    typer.echo(text, err=True)


def require_png(out: "Path") -> None:
    """``InputError`` unless ``out`` is a name for a picture."""
    from geomcache.cache_schemas.errors import InputError

    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"{out} is no name for a picture", expected="a file ending in .png", fix="--out picture.png")


def show(result: "Schema", as_json: bool, extra: dict[str, Any] | None = None) -> None:
    """Print a result: JSON, or one ``name  value`` line per field."""
    values = {**result.model_dump(mode="json"), **(extra or {})}
    show_values(values, as_json)


def show_values(values: dict[str, Any], as_json: bool) -> None:
    """Print named values."""
    if as_json:
        typer.echo(json.dumps(values))
        return
    width = max(len(name) for name in values)
    for name, value in values.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        typer.echo(f"{name.replace('_', ' '):<{width}}  {value}")


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=Text(title), title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # names may hold brackets, which are markup to rich
    # A pipe has no width; a table that is cut there would be useless.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140).print(table)
