"""``geomcache cache stats``, ``show`` and ``diff``; registered by ``stages/cli/cache.py``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomcache.stages.cli.common import EXIT_FINDING, JsonOption, progress_bar, require_png, show_table, show_values

if TYPE_CHECKING:
    from geomcache.pipeline.store.channel_stats import TokenStatistics
    from geomcache.pipeline.store.diff import CacheDifference

CacheArgument = Annotated[str, typer.Argument(help="Folder or URL of the cache.")]
_WORST_SHARDS = 5


def stats(
    cache: CacheArgument,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to look at, spread over all shards.")] = 512,
    out: Annotated[Path | None, typer.Option(help="PNG to write: channels, norms, heat maps, shards.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What the tokens look like as numbers: massive channels, norms, dead rows, shards that deviate."""
    from geomcache.pipeline.files import write_atomic
    from geomcache.pipeline.store.channel_stats import channel_stats
    from geomcache.pipeline.store.reader import CachedTokens
    from geomcache.pipeline.store.stats_picture import stats_picture

    if out is not None:
        require_png(out)
    with CachedTokens(cache, partial=True) as tokens, progress_bar("reading rows") as progress:
        found = channel_stats(tokens, rows, progress)
    if out is not None:
        write_atomic(out, stats_picture(found))
    if as_json:
        picture = str(out) if out is not None else None
        show_values({**found.model_dump(mode="json"), "findings": found.findings(), "picture": picture}, as_json)
        return
    _print_statistics(found)
    if out is not None:
        typer.echo(f"picture: {out}")


def show(
    cache: CacheArgument,
    pack: Annotated[Path | None, typer.Option(help="The cache's pack, for the frames beside the tokens.")] = None,
    row: Annotated[int | None, typer.Option(help="Draw this row.")] = None,
    episode: Annotated[
        int | None, typer.Option(help="Draw this episode of the pack: as a strip, or as a film (--out X.mp4).")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Of a film: only each n-th step; it plays as fast as ever.")] = 1,
    out: Annotated[Path, typer.Option(help="PNG or MP4 to write.")] = Path("tokens.png"),
    as_json: JsonOption = False,
) -> None:
    """Draw tokens beside their frames: one row (default: the first), or an episode as a strip or a film."""
    from contextlib import ExitStack

    from geomcache.cache_schemas.errors import InputError
    from geomcache.pipeline.files import write_atomic
    from geomcache.pipeline.pack.reader import PackReader
    from geomcache.pipeline.store.reader import CachedTokens
    from geomcache.pipeline.store.token_picture import episode_picture, row_picture
    from geomcache.pipeline.store.token_video import episode_video

    film = out.suffix.lower() == ".mp4" and not out.is_dir()
    if not film:
        require_png(out)
    if row is not None and episode is not None:
        raise InputError(
            "a picture shows a row or an episode", expected="--row or --episode", found="both", fix="leave one out"
        )
    if film and episode is None:
        raise InputError(
            "a film shows an episode",
            expected="--episode with --out X.mp4",
            found=f"{out} and no --episode",
            fix=f"geomcache cache show {cache} --pack PACK --episode 0 --out {out}",
        )
    if episode is not None and pack is None:
        raise InputError(
            "which rows an episode has is known to the pack",
            expected="--pack with --episode",
            found="no --pack",
            fix=f"geomcache cache show {cache} --pack PACK --episode {episode}",
        )
    with ExitStack() as stack:
        tokens = stack.enter_context(CachedTokens(cache, partial=True))
        reader = None if pack is None else stack.enter_context(PackReader(pack))
        if film and episode is not None and reader is not None:
            progress = stack.enter_context(progress_bar("drawing frames"))
            frames = episode_video(tokens, reader, episode, out, every=every, progress=progress)
            result: dict[str, object] = {"video": str(out), "frames": frames}
        else:
            if episode is not None and reader is not None:
                picture = episode_picture(tokens, reader, episode)
            else:
                picture = row_picture(tokens, reader, row or 0)
            write_atomic(out, picture)
            result = {"picture": str(out)}
    show_values(result, as_json)


def diff(
    a: Annotated[str, typer.Argument(help="Folder or URL of a cache.")],
    b: Annotated[str, typer.Argument(help="Folder or URL of another.")],
    rows: Annotated[int, typer.Option(min=0, help="How many rows to compare token by token; 0: none.")] = 512,
    as_json: JsonOption = False,
) -> None:
    """What differs between two caches, and how far their tokens are apart. Exit 1 when they differ."""
    from geomcache.pipeline.store.diff import cache_difference

    with progress_bar("comparing rows") as progress:
        found = cache_difference(a, b, rows, progress)
    if as_json:
        show_values({"a": a, "b": b, "equal": found.equal, **found.model_dump(mode="json")}, as_json)
    else:
        _print_difference(found)
    if not found.equal:
        raise typer.Exit(EXIT_FINDING)


def _print_statistics(found: "TokenStatistics") -> None:
    from geomcache.pipeline.store.channel_stats import QUANTILES

    typer.echo(f"cache {found.cache_id}: {found.what}")
    typer.echo(f"{found.sampled_rows} of {found.rows} rows, from {found.shards} shards")
    findings = found.findings() or [
        "nothing stands out: all values finite, no dead or repeated rows, no odd channels, no shard deviates"
    ]
    for line in findings:
        typer.echo(f"- {line}")
    show_table(
        "norms of tokens",
        ["view", *(f"{quantile:.0%}" for quantile in QUANTILES)],
        [[view.view, *(f"{norm:.5g}" for norm in view.quantiles)] for view in found.norms],
    )
    channels = {name: sorted(values) for name, values in dict(found.channels).items()}
    show_table(
        f"{len(found.channels.mean)} channels",
        ["", *channels],
        [
            [name, *(f"{values[int(place * (len(values) - 1))]:.4g}" for values in channels.values())]
            for name, place in (("smallest", 0.0), ("median", 0.5), ("largest", 1.0))
        ],
    )
    worst = sorted(found.drift, key=lambda shard: -shard.z)[:_WORST_SHARDS]
    show_table(
        f"shards against the whole sample, the {len(worst)} that deviate most",
        ["shard", "shift of means (std)", "std", "mean norm", "z"],
        [
            [
                str(shard.shard),
                f"{shard.mean_shift:.3f}",
                f"x {shard.std_ratio:.3f}",
                f"x {shard.norm_ratio:.3f}",
                f"{shard.z:.2f}",
            ]
            for shard in worst
        ],
    )


def _print_difference(found: "CacheDifference") -> None:
    for part, lines in found.parts.items():
        typer.echo(f"{part}:")
        for line in lines:
            typer.echo(f"  {line}")
    if found.equal_shards is not None:
        typer.echo(f"{found.equal_shards} of {found.shards} shards hold the same bytes")
    if found.tokens is None:
        typer.echo(f"tokens not compared: {found.not_compared}")
    else:
        apart = found.tokens
        typer.echo(f"{apart.equal_rows} of {apart.rows} compared rows are equal bit for bit")
        if apart.equal_rows < apart.rows:
            relative = "" if apart.normalised_rms is None else f" ({apart.normalised_rms:.3g} of a channel's std)"
            typer.echo(f"apart by at most {apart.max_abs:.4g}, root mean square {apart.rms:.4g}{relative}")
        if apart.worst_row is not None:
            typer.echo(f"worst row {apart.worst_row}, root mean square {apart.worst_row_rms:.4g}")
        if apart.finite_in_one:
            typer.echo(f"{apart.finite_in_one} values are finite in one of the two only")
    typer.echo("equal" if found.equal else "the caches differ")
