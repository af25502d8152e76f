"""``geomcache pack``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    sources: Annotated[list[Path] | None, typer.Argument(help="HDF5 files or folders of them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the pack.")] = None,
    rows_per_shard: Annotated[int | None, typer.Option(help="Rows in a tar shard and in a cache's shard.")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn data sets into one pack: images true upright and lossless, actions and states in a columnar index."""
    from geomcache.configs.load import load_config
    from geomcache.configs.schema import PackConfig
    from geomcache.pipeline.files import write_config

    options = {"sources": sources or None, "out": out, "rows_per_shard": rows_per_shard}
    settings = load_config(PackConfig, config, sets or [], options)
    with progress_bar("packing episodes") as progress:
        info, stood = build_from(settings, progress)
    write_config(settings.out, settings)
    if stood:
        say("the pack stood already; nothing to do")
    show_values(_summary(settings.out, info), as_json)


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


def build_from(settings: "PackConfig", progress: Callable[..., None]) -> "tuple[PackInfo, bool]":
    """Open the sources and build the pack; True when it stood already."""
    from geomcache.pipeline import plugins
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.pipeline.pack.writer import build_pack

    source_class = plugins.load("source", settings.kind)
    source_config = plugins.config_class("source", settings.kind)
    opened = []
    for path in settings.sources:
        source = source_class(parse_config(source_config, {**settings.source, "path": path}, f"source {settings.kind}"))
        opened.append((settings.kind, source, source.location))
    return build_pack(opened, settings.out, rows_per_shard=settings.rows_per_shard, progress=progress)


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
        "digest": info.digest,
    }
