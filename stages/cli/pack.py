"""``geomcache pack``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomcache.stages.cli.common import ConfigOption, JsonOption, SetOption, progress_bar, say, show_values

if TYPE_CHECKING:
    from geomcache.cache_schemas.pack_info import PackInfo
    from geomcache.configs.schema import PackConfig

app = typer.Typer(
    help="Frame packs: LIBERO data sets as WebDataset shards with a columnar index.", no_args_is_help=True
)


@app.command("build")
def build(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="LIBERO HDF5 files or folders, LeRobot data sets, or hub ids: owner/name[@revision]."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the pack.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes side by side; the bytes are the same.")] = None,
    kind: Annotated[str | None, typer.Option(help="libero_hdf5 | lerobot; default: told by what is there.")] = None,
    on_error: Annotated[str | None, typer.Option(help="stop | skip: what a damaged episode does.")] = None,
    drop_no_ops: Annotated[
        bool, typer.Option("--drop-no-ops", help="Leave out no-ops and failures, as no-noops data sets do.")
    ] = False,
    rows_per_shard: Annotated[int | None, typer.Option(help="Rows in a tar shard and in a cache's shard.")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn data sets into one pack: images true upright and lossless, actions and states in a columnar index.

    Stopped builds go on where they were. Settings of a source: --set source.cameras='[agentview]'.
    """
    from geomcache.configs.load import load_config
    from geomcache.configs.schema import PackConfig
    from geomcache.pipeline.files import write_config

    options: dict[str, Any] = {
        "sources": sources or None,
        "out": out,
        "workers": workers,
        "kind": kind,
        "on_error": on_error,
        "no_ops": {} if drop_no_ops else None,
        "rows_per_shard": rows_per_shard,
    }
    settings = load_config(PackConfig, config, sets or [], options)
    with progress_bar("packing") as progress:
        info, stood = build_from(settings, progress)
    write_config(settings.out, settings)
    if stood:
        say("the pack stood already; nothing to do")
    show_values(_summary(settings.out, info), as_json)
    for one in info.left_out:
        say(f"left out: {one.where}: {one.why}")


@app.command("info")
def info(
    pack: Annotated[Path, typer.Argument(help="Folder of the pack.")],
    verify: Annotated[bool, typer.Option("--verify", help="Also read every byte and compare digests.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What a pack holds, and with --verify whether every byte of it is right (exit 1 when not)."""
    from geomcache.pipeline.pack.reader import PackReader

    with PackReader(pack) as reader, progress_bar("verifying shards") as progress:
        problems = reader.verify(progress) if verify else []
        show_values({**_summary(pack, reader.info), **({"problems": problems} if verify else {})}, as_json)
    if problems:
        raise typer.Exit(1)


@app.command("show")
def show_row(
    pack: Annotated[Path, typer.Argument(help="Folder of the pack.")],
    row: Annotated[int, typer.Option(help="Which row.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("row.png"),
) -> None:
    """Draw one row: all views, depth if any, instruction, action and state."""
    from geomcache.pipeline.files import write_atomic
    from geomcache.pipeline.pack.picture import row_picture
    from geomcache.pipeline.pack.reader import PackReader

    with PackReader(pack) as reader:
        write_atomic(out, row_picture(reader, row))
    typer.echo(f"picture: {out}")


def build_from(settings: "PackConfig", progress: Callable[..., None]) -> "tuple[PackInfo, bool]":
    """Build the pack; True when it stood already."""
    from geomcache.pipeline.pack.build import build_pack

    return build_pack(
        settings.requests(),
        settings.out,
        rows_per_shard=settings.rows_per_shard,
        no_ops=settings.no_ops,
        skip_damaged=settings.on_error == "skip",
        workers=settings.workers,
        progress=progress,
    )


def _summary(path: Path, info: "PackInfo") -> dict[str, object]:
    return {
        "pack": str(path),
        "rows": info.rows,
        "episodes": info.episodes,
        "shards": len(info.shards),
        "bytes": sum(file.bytes for file in (*info.shards, *info.index)),
        "cameras": [f"{c.name} {c.height}x{c.width}" for c in info.contract.cameras],
        "depth": info.contract.has_depth,
        "image_orientation": info.contract.image_orientation,
        "no_op_rows": info.no_op_rows,
        "left_out": len(info.left_out),
        "digest": info.digest,
    }
