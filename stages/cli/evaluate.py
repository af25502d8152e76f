"""``geomcache eval``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomcache.stages.cli.common import ConfigOption, JsonOption, SetOption, progress_bar, say, show_table

if TYPE_CHECKING:
    from geomcache.stages.evaluate.config import EvalConfig
    from geomcache.stages.evaluate.controls import ControlResult
    from geomcache.stages.evaluate.results import EvalResults, Success
    from geomcache.stages.train.config import TrainConfig


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Run folder of `geomcache train`, or one checkpoint.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="NAME|FOLDER",
            help="Same as RUN. Either may also be an exported policy, or the name of one that comes with geomcache.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="libero_spatial|object|goal|10|90, libero_object|spatial_spread, libero_object_choice; with commas.",
            metavar="SUITE,...",
        ),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Task numbers, e.g. 0,3,7; default: all of the suite.")] = None,
    episodes: Annotated[int | None, typer.Option(help="Initial states per task (and seed); 50 are shipped.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Of the scene's fixtures and the policy's noise, e.g. 7,8,9; default 7.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Simulators side by side; default: CPUs - 1; 0: in this process.")
    ] = None,
    video: Annotated[
        int | None, typer.Option("--video-fps", help="Also a video of each task's first episode, frames a second.")
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="blind",
            help="Also train the run again without images and geometry (RUN/controls/blind, once) and let it play the "
            "same episodes: what is this success rate worth?",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default: RUN/eval; of exported policies runs/eval/NAME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what --out holds, with its own settings.")] = False,
    encoder: Annotated[str | None, typer.Option(help="State which encoder the checkpoint must have.")] = None,
    cameras: Annotated[str | None, typer.Option(help="State the checkpoint's cameras in order, e.g. a,b.")] = None,
    image_orientation: Annotated[str | None, typer.Option(help="State the checkpoint's orientation.")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Closed loop: success rate of a policy in the LIBERO simulator, tokens made live by the checkpoint's encoder.

    Everything that must match training comes from the checkpoint. --encoder, --cameras and --image-orientation only
    state what you believe it holds; a difference is refused. The same command continues a stopped evaluation (so does
    --resume --out FOLDER), and adds episodes, tasks or seeds to a finished one. First of all: geomcache check RUN.

    An exported policy plays what it was trained on, unless told otherwise.

    On LIBERO's shipped initial states objects hardly move, and a policy that sees nothing can succeed in most episodes;
    --control blind tells. --set camera_orbit=10 turns the agent-view camera, --set corruption.depth_scale=0.05 and its
    kin measure what success rests on: docs/evaluate.md.
    """
    from geomcache.configs.load import load_config
    from geomcache.stages.evaluate.config import EvalConfig
    from geomcache.stages.evaluate.shipped import default_out, with_defaults

    run = _policy_of(run, checkpoint)
    options = {
        "run": run,
        "suites": suite.split(",") if suite else None,
        "tasks": _numbers(tasks, "task"),
        "episodes": episodes,
        "seeds": _numbers(seeds, "seed"),
        "workers": workers,
        "video_fps": video,
        "out": out,
        "encoder": encoder,
        "cameras": cameras.split(",") if cameras else None,
        "image_orientation": image_orientation,
    }
    if out is None and config is None and run is not None and not any(one.startswith("out=") for one in sets or []):
        options["out"] = default_out(run)
    if resume:
        config = _settings_of(out, config)
    settings = with_defaults(load_config(EvalConfig, config, sets or [], options))
    training = _control_training(settings, control) if control is not None else None
    results = _evaluated(settings)
    found = _control(settings, training) if training is not None else None
    if as_json:
        whole = {**results.model_dump(mode="json"), **({"control": found.model_dump(mode="json")} if found else {})}
        typer.echo(json.dumps(whole))
        return
    _show(results)
    if found is not None:
        _show_control(settings, found)
    typer.echo(f"results and filmstrips: {settings.out}; a page of them: geomcache report {settings.out}")


def _policy_of(run: Path | None, checkpoint: Path | None) -> Path | None:
    """The one that is given; None leaves it to the settings."""
    from geomcache.cache_schemas.errors import InputError
    from geomcache.stages.evaluate.shipped import find_policy

    if run is not None and checkpoint is not None:
        raise InputError(
            "two policies are named",
            expected="RUN or --checkpoint, which mean the same",
            found=f"{run} and --checkpoint {checkpoint}",
            fix="leave one out",
        )
    named = run if run is not None else checkpoint
    return find_policy(named) if named is not None else None


def _evaluated(settings: "EvalConfig") -> "EvalResults":
    from geomcache.stages.evaluate.run import run as run_evaluation

    with progress_bar(f"evaluating {settings.run.name}") as progress:
        results, stood = run_evaluation(settings, progress)
    if stood:
        say(f"the results in {settings.out} stood already; nothing to do")
    return results


def _control_training(settings: "EvalConfig", control: str) -> "TrainConfig":
    """What would stop the control is said before the run is evaluated."""
    from geomcache.stages.evaluate.controls import blind_training, require_control

    require_control(control)
    return blind_training(settings.run)


def _control(settings: "EvalConfig", training: "TrainConfig") -> "ControlResult":
    from geomcache.stages.cli.train import train_once
    from geomcache.stages.evaluate.controls import control_evaluation, is_trained, judge

    if is_trained(training):
        say(f"the control {training.out} was trained before")
    else:
        train_once(training)
    _evaluated(control_evaluation(settings, training.out))
    return judge(settings)


def _show_control(settings: "EvalConfig", found: "ControlResult") -> None:
    rows = [[settings.run.name, *_cells(found.run)], [f"{found.control} control", *_cells(found.blind)]]
    show_table(f"the {found.control} control, on the same episodes", ["policy", "success", "interval"], rows)
    typer.echo(f"{found.meaning}.")
    typer.echo(f"McNemar over the pairs: {found.comparison.sentence}")


def _settings_of(out: Path | None, config: str | None) -> str:
    from geomcache.cache_schemas.errors import InputError
    from geomcache.pipeline.files import CONFIG_NAME

    if out is None or config is not None or not (out / CONFIG_NAME).exists():
        raise InputError(
            "there is nothing to resume",
            expected=f"--out FOLDER with the {CONFIG_NAME} of a stopped evaluation, and no --config",
            found="no --out" if out is None else "--config" if config is not None else f"no {out / CONFIG_NAME}",
            fix="leave --resume out to begin",
        )
    return str(out / CONFIG_NAME)


def _show(results: "EvalResults") -> None:
    rows = [[f"{one.suite} {one.task}", one.instruction, *_cells(one)] for one in results.tasks]
    if len(results.suites) > 1:
        rows += [[one.suite, "", *_cells(one)] for one in results.suites]
    rows.append(["all", "", *_cells(results.overall)])
    changes = [f"under {', '.join(found)}"] if (found := results.config.describe_changes()) else []
    show_table(
        ", ".join(["success (95 % Wilson interval)", *changes, *([] if results.finished else ["UNFINISHED"])]),
        ["task", "instruction", "success", "interval"],
        rows,
    )
    if results.told is not None:
        done, interval = _cells(results.told)
        typer.echo(f"what the policy was told instead of its task was done in {done} {interval}")
    queries = sum(episode.queries for episode in results.episodes)
    if queries:
        parts = [
            f"{part} {1000 * sum(getattr(episode.seconds, part) for episode in results.episodes) / queries:.0f} ms"
            for part in ("encoder", "vlm", "head")
        ]
        typer.echo(f"per query: {', '.join(parts)} ({results.conditions.mode} mode on {results.conditions.device})")


def _cells(success: "Success") -> list[str]:
    return [f"{success.successes}/{success.episodes}", f"[{success.low:.2f}, {success.high:.2f}]"]


def _numbers(text: str | None, what: str) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as problem:
        raise typer.BadParameter(f"{what} numbers separated by commas, not {text!r}") from problem
