"""``geomcache extract``."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.stages.cli.common import ConfigOption, JsonOption, SetOption, UnlockOption, progress_bar, say, show


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
    workers: Annotated[int | None, typer.Option(help="Encoders side by side, one per GPU or CPU core.")] = None,
    unlock: UnlockOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage one: run a frozen geometry encoder over every frame of a pack, once.

    Tokens go into a sharded Zarr v3 cache. A stopped run continues with the shards that are missing.
    The encoder's own settings: --set encoder_config.model=da3-base --set encoder_config.weights=FOLDER
    """
    from geomcache.configs.load import load_config
    from geomcache.stages.extract.plan import ExtractConfig
    from geomcache.stages.extract.run import run

    options = {
        "pack": pack,
        "encoder": encoder,
        "out": out,
        "codec": codec,
        "pool": pool,
        "statistics_from": statistics_from,
        "workers": workers,
    }
    settings = load_config(ExtractConfig, config, sets or [], options)
    with progress_bar(f"extracting {settings.encoder}") as progress:
        result = run(settings, progress, unlock=unlock)
    if result.rows_encoded == 0:
        say("the cache was complete already; nothing to do")
    show(result, as_json)
