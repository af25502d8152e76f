"""``geomcache pack``."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomcache.stages.cli.common import (
    EXIT_FINDING,
    ConfigOption,
    JsonOption,
    SetOption,
    progress_bar,
    require_png,
    say,
    show_table,
    show_values,
)

if TYPE_CHECKING:
    from geomcache.cache_schemas.pack_info import PackInfo
    from geomcache.configs.schema import PackConfig
    from geomcache.pipeline.sim.source_check import SourceCheck

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
    from geomcache.cache_schemas.errors import InputError
    from geomcache.cache_schemas.pack_info import NoOpFilter
    from geomcache.configs.load import load_config, read_yaml
    from geomcache.configs.schema import PackConfig
    from geomcache.pipeline.files import write_config

    options: dict[str, Any] = {
        "sources": sources or None,
        "out": out,
        "workers": workers,
        "kind": kind,
        "on_error": on_error,
        "rows_per_shard": rows_per_shard,
    }
    if not sources and config is None:
        raise InputError(
            "there is nothing to pack", expected="at least one SOURCE", fix="geomcache pack build SOURCE --out PACK"
        )
    if sources and config is not None and "sources" in read_yaml(config):
        raise InputError(
            f"{config} names sources too",
            expected="sources on the command line or in the file",
            found=", ".join(sources),
            fix="leave one of the two out",
        )
    settings = load_config(PackConfig, config, sets or [], options)
    if drop_no_ops and settings.no_ops is None:
        settings = settings.model_copy(update={"no_ops": NoOpFilter()})
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
    """What a pack holds; --verify also reads every shard: exit 1 when one is damaged (2: the pack's own index is)."""
    from geomcache.pipeline.pack.reader import PackReader

    with PackReader(pack) as reader, progress_bar("verifying shards") as progress:
        problems = reader.verify(progress) if verify else []
        show_values({**_summary(pack, reader.info), **({"problems": problems} if verify else {})}, as_json)
    if problems:
        raise typer.Exit(EXIT_FINDING)


@app.command("check")
def check(
    source: Annotated[str, typer.Argument(help="A data set, as pack build takes it.")],
    kind: Annotated[str | None, typer.Option(help="libero_hdf5 | lerobot; default: told by what is there.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="How many to look at, spread over the data set.")] = 6,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find out, with the simulator, how a data set stores its images and whether its gripper closes on +1.

    HDF5 with simulator states: moments are rendered again and compared under the eight flips and turns. LeRobot: the
    hand's track must explain what moves. Exit 1 when that contradicts the declared --set source.image_orientation.
    """
    from geomcache.configs.load import load_config
    from geomcache.configs.schema import PackConfig
    from geomcache.pipeline.sim.source_check import check_source

    options = {"sources": [source], "out": "unused", "kind": kind}
    (request,) = load_config(PackConfig, None, sets or [], options).requests()
    with progress_bar("looking at episodes") as progress:
        found = check_source(request, episodes, progress)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "agrees": found.agrees}))
    else:
        show_table(
            f"{found.location}: {found.way}",
            ["camera", "from", "stored as", "error", "next best", "its error", "decided"],
            [
                [f.camera, where, f.best, f"{f.error:.3g}", f.runner_up, f"{f.runner_up_error:.3g}", str(f.decided)]
                for where, f in found.findings
            ],
        )
        typer.echo(f"gripper: {found.gripper.switches} switches, agreement {found.gripper.score:+.2f} (of -1 to 1)")
        for where, declared, told in found.observations:
            typer.echo(f"{where}: observations {told or 'at a time that the joints do not tell'}; declared: {declared}")
        typer.echo(f"images are stored as {found.found}; declared: {found.declared}")
    _require_declared(found)


def _require_declared(found: "SourceCheck") -> None:
    """Exit 1 with the setting that mends it when the declaration does not hold."""
    if not found.orientation_agrees:
        say(f"the declaration is wrong; pack with --set source.image_orientation={found.found}")
    if not found.gripper_agrees:
        say(
            "the gripper's sign is wrong: the fingers open when they are told to close; for LeRobot declare it, e.g. "
            "--set source.gripper_sign=minus_close_plus_open; HDF5 actions must be converted"
        )
    if not found.observation_agrees:
        say("rows are one step off; declare it: --set source.observation=after_action (or before_action)")
    if not found.agrees:
        raise typer.Exit(EXIT_FINDING)


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

    require_png(out)
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
        **_steps(info),
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


def _steps(info: "PackInfo") -> dict[str, object]:
    """Of packs whose rows are not simply control steps."""
    if info.steps is None:
        return {}
    perturbed = info.steps.perturbed
    share = {} if perturbed is None else {"perturbed_share": round(perturbed / info.steps.total, 4)}
    return {"steps_per_row": info.steps_per_row, "control_steps": info.steps.total, **share}
