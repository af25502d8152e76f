"""``geomcache train``."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.stages.cli.common import ConfigOption, JsonOption, SetOption, progress_bar, say, show


def train(
    pack: Annotated[Path | None, typer.Option(help="Pack to train on (or give `data` in the config).")] = None,
    cache: Annotated[str | None, typer.Option(help="Token cache made from that pack: folder or URL.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    compressor: Annotated[
        str | None, typer.Option(help="geom_compression_type: none, pool, per_layer, qformer or gated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and noise.")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage two: train Qwen2.5-VL + a DiT flow-matching action head on cached geometry tokens.

    The same command continues a stopped run, bit for bit. Without --config a tiny network of the real classes is
    trained; --set policy.backbone.config.base_vlm=FOLDER loads Qwen2.5-VL weights.
    """
    from geomcache.configs.load import load_config
    from geomcache.stages.train.config import TrainConfig
    from geomcache.stages.train.run import run

    if cache is not None and pack is None:
        raise typer.BadParameter("a cache goes with the pack it was made from: add --pack PACK")
    options: dict[str, object] = {"out": out, "steps": steps, "seed": seed}
    if pack is not None:
        options["data"] = [{"pack": pack, "cache": cache}]
    if compressor is not None:
        sets = [*(sets or []), f"policy.geom_compression_type={compressor}"]
    settings = load_config(TrainConfig, config, sets or [], options)
    with progress_bar(f"training {settings.out.name}") as progress:
        result, stood = run(settings, progress)
    if stood:
        say("this run was finished already; nothing to do")
    show(result, as_json, {"open_loop_ratio": result.open_loop_ratio})
