"""``geomcache cache probe``; registered by ``stages/cli/cache.py``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomcache.stages.cli.common import JsonOption, progress_bar, show_table, show_values

if TYPE_CHECKING:
    from geomcache.pipeline.store.probe import ProbeResult


def probe(
    cache: Annotated[str, typer.Argument(help="Folder or URL of the cache, of full tokens.")],
    pack: Annotated[Path, typer.Option(help="The cache's pack, with depth.")],
    against: Annotated[
        str | None,
        typer.Option(help="Another cache of the same pack, as a rule of the same encoder with random weights."),
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="How many rows to use, spread over the pack.")] = 512,
    as_json: JsonOption = False,
) -> None:
    """What tokens tell of the surface behind them: a linear probe, judged on episodes it did not learn from.

    R^2 is over what a token's place alone tells: 0 nothing more, 1 everything. Random weights give more than 0 too, so
    extract a second cache with --set encoder_config.weights=random and name it with --against.
    """
    from geomcache.pipeline.pack.reader import PackReader
    from geomcache.pipeline.store.probe import probe as run
    from geomcache.pipeline.store.reader import CachedTokens

    caches = [cache] if against is None else [cache, against]
    found = []
    with PackReader(pack) as reader, progress_bar("probing rows") as progress:
        for each in caches:
            with CachedTokens(each) as tokens:
                found.append(run(tokens, reader, rows=rows, progress=progress))
    other = found[1] if against is not None else None
    if as_json:
        values = [None if one is None else one.model_dump(mode="json") for one in (found[0], other)]
        better = None if other is None else {1: "cache", 0: "equal", -1: "against"}[_sign(found[0].r2, other.r2)]
        show_values({"probe": values[0], "against": values[1], "better": better}, as_json)
        return
    for one in found:
        _print(one)
    if other is not None:
        typer.echo(_comparison(found[0], other))


def _print(found: "ProbeResult") -> None:
    typer.echo(f"cache {found.cache_id}: {found.what}")
    typer.echo(
        f"{found.rows} rows of {found.episodes} episodes in {found.folds} folds, each judged by what the others teach; "
        f"{found.places} places in each view"
    )
    show_table(
        "distance from the true point, root mean square in mm",
        ["view", "tokens", "one mean point", "the place alone", "probe", "R^2 over the place"],
        [
            [
                view.view,
                str(view.tokens),
                *(f"{error:.1f}" for error in (view.mean_mm, view.place_mm, view.probe_mm)),
                "nothing moves" if view.r2 is None else f"{view.r2:.3f}",
            ]
            for view in found.views
        ],
    )
    folds = ", ".join("nothing moves" if r2 is None else f"{r2:.3f}" for r2 in found.fold_r2)
    typer.echo(f"all views: R^2 {found.r2:.3f} (folds {folds})")


def _comparison(first: "ProbeResult", second: "ProbeResult") -> str:
    figures = f"R^2 {first.r2:.3f} against {second.r2:.3f}"
    sign = _sign(first.r2, second.r2)
    if sign == 0:
        return f"both tell the same: {figures}"
    pairs = [(a, b) for a, b in zip(first.fold_r2, second.fold_r2, strict=True) if a is not None and b is not None]
    folds = f"in {sum(_sign(a, b) == sign for a, b in pairs)} of {len(pairs)} folds"
    note = "" if first.grid == second.grid else "; their grids differ, so these are not the same points"
    return f"the {'first' if sign > 0 else 'second'} tells more: {figures}, {folds}{note}"


def _sign(a: float, b: float) -> int:
    return (a > b) - (a < b)
