"""``geomcache cache bench``."""

from typing import Annotated

import typer

from geomcache.stages.cli.common import JsonOption, progress_bar, show_table, show_values


def bench(
    cache: Annotated[str, typer.Argument(help="Folder or URL of the cache.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows of a random batch.")] = 64,
    rows: Annotated[
        int | None, typer.Option(min=32, help="Read at most so many rows in all; 2 GiB of them by default.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Begin no new round after this time.")] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """How fast this cache is on this machine, beside the raw disk, and what that means in training steps per second."""
    from geomcache.pipeline.store.bench import bench_cache

    with progress_bar("reading rows") as progress:
        result = bench_cache(cache, batch=batch, rows=rows, seconds=seconds, progress=progress)
    if as_json:
        show_values({**result.model_dump(mode="json"), "findings": result.findings()}, as_json)
        return

    def speed(rows_per_second: float | None) -> str:
        return "" if rows_per_second is None else f"{rows_per_second * result.row_bytes / 1e9:.3g}"

    show_table(
        f"{result.cache}: GB/s",
        ["access", "page cache", "bare preadv", "without checksums", "with checksums", "of bare"],
        [
            [
                one.access,
                one.state,
                speed(one.raw),
                speed(one.unchecked),
                speed(one.checked),
                f"{one.checked / one.raw:.2f}" if one.raw else "",
            ]
            for one in result.measured
        ],
    )
    for line in result.findings():
        typer.echo(line)
