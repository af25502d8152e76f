"""``geomcache eval``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomcache.stages.cli.common import ConfigOption, JsonOption, SetOption, progress_bar, say, show_table

if TYPE_CHECKING:
    from geomcache.stages.evaluate.results import EvalResults, Success


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Run folder of `geomcache train`, or one checkpoint.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="libero_spatial|object|goal|10|90; several with commas.", metavar="SUITE,...")
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
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default: RUN/eval.")] = None,
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
    """
    from geomcache.configs.load import load_config
    from geomcache.stages.evaluate.config import EvalConfig
    from geomcache.stages.evaluate.run import run as run_evaluation

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
        options["out"] = run / "eval"
    if resume:
        config = _settings_of(out, config)
    settings = load_config(EvalConfig, config, sets or [], options)
    with progress_bar(f"evaluating {settings.run.name}") as progress:
        results, stood = run_evaluation(settings, progress)
    if stood:
        say("these results stood already; nothing to do")
    if as_json:
        typer.echo(results.model_dump_json())
        return
    _show(results)
    typer.echo(f"results and filmstrips: {settings.out}; a page of them: geomcache report {settings.out}")


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
    show_table(
        "success (95 % Wilson interval)" + ("" if results.finished else ", UNFINISHED"),
        ["task", "instruction", "success", "interval"],
        rows,
    )
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
