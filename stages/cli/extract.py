"""``geomcache extract``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomcache.stages.cli.common import (
    ConfigOption,
    JsonOption,
    SetOption,
    UnlockOption,
    progress_bar,
    say,
    show,
    show_table,
    show_values,
)

if TYPE_CHECKING:
    from geomcache.stages.extract.plan import ExtractConfig


def extract(
    pack: Annotated[Path | None, typer.Option(help="Pack made by `geomcache pack build`.")] = None,
    encoder: Annotated[str | None, typer.Option(help="oracle_pointmap, depth_anything3, ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the token cache.")] = None,
    codec: Annotated[str | None, typer.Option(help="bf16, fp32, int8 or lossless; default: the encoder's own.")] = None,
    pool: Annotated[
        int | None, typer.Option(min=1, help="Keep only the means of this many groups of a row's tokens (K).")
    ] = None,
    statistics_from: Annotated[
        str | None, typer.Option(help="Cache whose channel statistics to use (int8, --pool), to train on both.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Encoders side by side; default: one per GPU, or one on a CPU.")
    ] = None,
    on_error: Annotated[
        str | None, typer.Option(help="A frame that fails twice: stop, or mask (recorded as invalid, left out later).")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="HOST:PORT of a running Ray cluster.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it will take: bytes, time, GPU hours, free disk.")
    ] = False,
    rows: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: so many rows instead of the pack's (LIBERO: 273465).")
    ] = None,
    assume_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="With --dry-run: a device that sustains this, instead of this one.")
    ] = None,
    unlock: UnlockOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage one: run a frozen geometry encoder over every frame of a pack, once.

    Tokens go into a sharded Zarr v3 cache. A stopped run continues with the shards that are missing.
    `geomcache encoders` lists encoders, their weights and licences. An encoder's own settings:
    --set encoder_config.model=da3-base --set encoder_config.weights=FOLDER

    Of a worker: --set device=cpu, --set gpus_per_worker=0.5 (two share one), --set cpus_per_worker=8 (decode, store).
    """
    from geomcache.cache_schemas.errors import InputError
    from geomcache.configs.load import load_config
    from geomcache.stages.extract.plan import ExtractConfig

    options = {
        "pack": pack,
        "encoder": encoder,
        "out": out,
        "codec": codec,
        "pool": pool,
        "statistics_from": statistics_from,
        "workers": workers,
        "on_error": on_error,
        "ray_address": ray_address,
    }
    settings = load_config(ExtractConfig, config, sets or [], options)
    if dry_run:
        _say_what_it_takes(settings, rows, assume_tflops, as_json)
        return
    if rows is not None or assume_tflops is not None:
        raise InputError(
            "--rows and --assume-tflops are for an estimate", expected="with --dry-run", found="without", fix="add it"
        )
    from geomcache.stages.extract.run import run

    with progress_bar(f"extracting {settings.encoder}") as progress:
        result = run(settings, progress, tell=say, unlock=unlock)
    if result.rows_encoded == 0:
        say("the cache was complete already; nothing to do")
    if result.masked_rows:
        first, problem = next(iter(result.masked_rows.items()))
        say(f"{len(result.masked_rows)} rows are masked: their tokens are NaN, and training leaves them out")
        say(f"  row {first}: {problem}   (all of them: {settings.out}/extract.jsonl)")
        say("  a damaged picture must be mended in the pack before training: build it again, this cache fits it")
    if result.rows_not_finite > len(result.masked_rows):
        say(f"{result.rows_not_finite} rows have values that are not finite: geomcache cache stats {settings.out}")
    show(result, as_json)


def _say_what_it_takes(settings: "ExtractConfig", rows: int | None, tflops: float | None, as_json: bool) -> None:
    from geomcache.stages.extract.cluster import cluster
    from geomcache.stages.extract.estimate import estimate, require_bytes, size
    from geomcache.stages.extract.plan import make_plan

    with cluster(settings.ray_address), progress_bar("measuring batches") as progress:
        found = estimate(make_plan(settings, rough=True), rows, tflops, progress)
    if as_json:
        show(found, as_json)
    else:
        values = found.model_dump(mode="json", exclude={"hours"})
        show_values(
            {
                name: size(value) if name.endswith("_bytes") or name == "bytes_to_write" else value
                for name, value in values.items()
            },
            as_json,
        )
        measured = f"with {tflops:g} TFLOP/s assumed" if tflops is not None else f"as measured on this {found.device}"
        typer.echo(f"\n{found.rows} rows, {measured}:")
        show_table("", ["workers", "hours"], [[str(n), f"{hours:.2g}"] for n, hours in found.hours.items()])
    if rows is None:
        require_bytes(settings.out, found.bytes_to_write)
    elif not found.fits:
        say(f"this disk could not hold it: {size(found.free_bytes)} are free")
