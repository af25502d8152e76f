"""``geomcache train``."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomcache.stages.cli.common import (
    ConfigOption,
    JsonOption,
    SetOption,
    progress_bar,
    say,
    show,
    show_table,
    show_values,
)

if TYPE_CHECKING:
    from geomcache.stages.train.config import TrainConfig
    from geomcache.stages.train.run import TrainResult

DEFAULT_PRESET = "train/tiny"


def train(
    pack: Annotated[Path | None, typer.Option(help="Pack to train on (or give `data` in the config).")] = None,
    cache: Annotated[str | None, typer.Option(help="Token cache made from that pack: folder or URL.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    compressor: Annotated[
        str | None, typer.Option(help="geom_compression_type: none, pool, per_layer, qformer or gated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and noise.")] = None,
    processes: Annotated[int | None, typer.Option(help="Ranks to start on this machine, one per GPU.")] = None,
    ablation: Annotated[
        str | None,
        typer.Option(
            metavar="ARM,ARM,...", help="Train one run per compressor, equal in all else, in OUT/ARM; compare them."
        ),
    ] = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="Only print the modules: parameters, rates, bytes. Loads no weights.")
    ] = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage two: train Qwen2.5-VL + a DiT flow-matching action head on cached geometry tokens.

    The same command continues a stopped run, bit for bit on a CPU. SIGTERM, SIGUSR1 and Ctrl-C save first. Without
    --config the preset train/tiny trains a small network of the real classes; train/pool and its kin are the full
    size, Qwen2.5-VL-3B on 4 GPUs. tensorboard --logdir OUT shows the curves; metrics.jsonl always holds them.
    """
    from geomcache.configs.load import load_config
    from geomcache.stages.train.config import TrainConfig

    if cache is not None and pack is None and not describe:
        raise typer.BadParameter("a cache goes with the pack it was made from: add --pack PACK")
    if ablation is not None and (compressor is not None or describe):
        raise typer.BadParameter("--ablation names the compressors itself: leave --compressor and --describe out")
    options: dict[str, Any] = {"out": out, "steps": steps, "seed": seed, "processes": processes}
    if pack is not None:
        options["data"] = [{"pack": pack, "cache": cache}]
    if compressor is not None:
        sets = [*(sets or []), f"policy.geom_compression_type={compressor}"]
        sets += [f"policy.geom_inject_to_dit={'false' if compressor == 'none' else 'true'}"]
    if describe:  # of what will be trained where there is no data yet
        options |= {"out": out or Path("described"), "data": options.get("data", [])}
    settings = load_config(TrainConfig, config or DEFAULT_PRESET, sets or [], options)
    if describe:
        _describe(settings, cache, as_json)
    elif ablation is not None:
        _ablation(settings, [name.strip() for name in ablation.split(",")], as_json)
    else:
        if settings.policy.compressor == "none" and (unused := [pair.cache for pair in settings.data if pair.cache]):
            say(f"compressor none reads no geometry: {', '.join(unused)} is not used")
        result, stood = train_once(settings)
        if stood:
            say("this run was finished already; nothing to do")
        if settings.validation_share and result.validation is None:
            say(f"validated on no episode: validation_share {settings.validation_share:g} of them is less than one")
        extra: dict[str, Any] = {"open_loop_ratio": result.open_loop_ratio}
        show(result, as_json, extra) if as_json else show_values(_flat(result) | extra, as_json)


def train_once(settings: "TrainConfig") -> "tuple[TrainResult, bool]":
    import yaml

    from geomcache.pipeline.devices import resolve_device
    from geomcache.stages.cli.launch import needs_ranks, run_ranks
    from geomcache.stages.train.data import TrainingData
    from geomcache.stages.train.run import read_result, require_startable, run
    from geomcache.stages.train.stopping import TrainingStopped

    if not needs_ranks(settings.processes, settings.strategy):
        try:
            with progress_bar(f"training {settings.out.name}") as progress:
                return run(settings, progress)
        except TrainingStopped as ending:
            say(ending.text)
            raise
    require_startable(settings, TrainingData(settings))  # said once, and before the ranks have imported everything
    stood = read_result(settings.out) is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.yaml"
        file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        code = run_ranks(file, settings.processes, settings.strategy, cpu=resolve_device(settings.device) == "cpu")
    result = read_result(settings.out)
    if code or result is None:
        raise typer.Exit(code or 1)
    return result, stood


def _ablation(settings: "TrainConfig", names: list[str], as_json: bool) -> None:
    from geomcache.pipeline.files import make_folder, write_atomic
    from geomcache.stages.evaluate.pictures import curves_picture
    from geomcache.stages.train.ablation import ABLATION_NAME, arms, read_arms, require_trainable
    from geomcache.stages.train.metrics import METRICS_NAME, read_metrics

    chosen = arms(settings, names)
    require_trainable(chosen)
    for name, arm in chosen.items():
        say(f"arm {name}: " + ("finished before" if train_once(arm)[1] else "trained"))
    found = read_arms(settings.out, names)
    make_folder(settings.out)
    write_atomic(settings.out / ABLATION_NAME, found.model_dump_json(indent=2))
    curves = {name: read_metrics(settings.out / name / METRICS_NAME) for name in names}
    write_atomic(settings.out / "ablation.png", curves_picture(curves))
    if as_json:
        show_values(found.model_dump(mode="json"), as_json)
        return
    columns = ["arm", "parameters", "loss", "open-loop", "held-out loss", "held-out open-loop", "s/step"]
    rows = [
        [
            arm.name,
            f"{arm.parameters:,}",
            f"{arm.loss:.4f}",
            f"{arm.open_loop_error:.4f}",
            "-" if arm.validation_loss is None else f"{arm.validation_loss:.4f}",
            "-" if arm.validation_open_loop_error is None else f"{arm.validation_open_loop_error:.4f}",
            f"{arm.seconds_per_step:.3f}",
        ]
        for arm in found.arms
    ]
    steps, mean = found.arms[0].steps, found.arms[0].mean_action_error
    show_table(f"{steps} steps; open-loop error of the mean action {mean:.4f}", columns, rows)
    say(f"curves: {settings.out / 'ablation.png'}")


def _describe(settings: "TrainConfig", cache: str | None, as_json: bool) -> None:
    from geomcache.pipeline.store.reader import CachedTokens
    from geomcache.stages.train.describe import ASSUMED_TOKENS, assumed_tokens, describe

    first = cache or (settings.data[0].cache if settings.data else None)
    lines = describe(settings, CachedTokens(first).recipe.spec if first else assumed_tokens())
    if as_json:
        show_values({"modules": [line._asdict() for line in lines]}, as_json)
        return
    if first is None and settings.policy.compressor != "none":
        say(f"no cache is given: geometry tokens of {ASSUMED_TOKENS} (views x rows x columns x width) are assumed")
    rows = [
        [
            line.module,
            f"{line.parameters:,}",
            f"{line.trainable:,}",
            "" if line.learning_rate is None else f"{line.learning_rate:g}",
            line.dtype,
            f"{line.weight_bytes / 2**30:.2f}",
            f"{line.training_bytes / 2**30:.2f}",
        ]
        for line in lines
    ]
    columns = ["module", "parameters", "trainable", "rate", "dtype", "weights GiB", "+ training GiB"]
    show_table(
        f"{settings.policy.backbone.config.get('base_vlm', 'tiny')}, {settings.policy.compressor}", columns, rows
    )


def _flat(result: "TrainResult") -> dict[str, Any]:
    """For people: the validation's numbers under names of their own."""
    values = result.model_dump(mode="json", exclude={"validation"})
    if result.validation is not None:
        found = result.validation
        values |= {"held_out_loss": found.loss, "held_out_open_loop_error": found.open_loop_error}
        values |= {"held_out_rows": found.rows}
    return values
