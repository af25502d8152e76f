"""``geomcache eval``."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.stages.cli.common import ConfigOption, JsonOption, SetOption, progress_bar, say, show_table


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Run folder of `geomcache train`, or one checkpoint.")] = None,
    suite: Annotated[str | None, typer.Option(help="libero_spatial|object|goal|10|90")] = None,
    tasks: Annotated[str | None, typer.Option(help="Task numbers, e.g. 0,3,7; default: all of the suite.")] = None,
    episodes: Annotated[int | None, typer.Option(help="Episodes per task.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the scene's fixtures and the policy's noise.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    encoder: Annotated[str | None, typer.Option(help="State which encoder the checkpoint must have.")] = None,
    cameras: Annotated[str | None, typer.Option(help="State the checkpoint's cameras in order, e.g. a,b.")] = None,
    image_orientation: Annotated[str | None, typer.Option(help="State the checkpoint's orientation.")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Closed loop: success rate of a policy in the LIBERO simulator, tokens made live by the checkpoint's encoder.

    Everything that must match training comes from the checkpoint. --encoder, --cameras and --image-orientation only
    state what you believe it holds; a difference is refused.
    """
    from geomcache.configs.load import load_config
    from geomcache.stages.evaluate.config import EvalConfig
    from geomcache.stages.evaluate.run import run as run_evaluation

    options = {
        "run": run,
        "suite": suite,
        "tasks": _numbers(tasks),
        "episodes": episodes,
        "seed": seed,
        "out": out,
        "encoder": encoder,
        "cameras": cameras.split(",") if cameras else None,
        "image_orientation": image_orientation,
    }
    settings = load_config(EvalConfig, config, sets or [], options)
    with progress_bar(f"evaluating {settings.run.name}") as progress:
        results, stood = run_evaluation(settings, progress)
    if stood:
        say("these results stood already; nothing to do")
    if as_json:
        typer.echo(results.model_dump_json())
        return
    rows = [
        [
            str(task.task),
            task.instruction,
            f"{task.successes}/{task.episodes}",
            f"[{task.low:.2f}, {task.high:.2f}]",
        ]
        for task in results.tasks
    ]
    rows.append(
        [
            "all",
            "",
            f"{results.successes}/{len(results.episodes)}",
            f"[{results.low:.2f}, {results.high:.2f}]",
        ]
    )
    show_table(
        f"{settings.suite}, success (95 % Wilson interval)",
        ["task", "instruction", "success", "interval"],
        rows,
    )
    typer.echo(f"results and filmstrips: {settings.out}")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as problem:
        raise typer.BadParameter(f"task numbers separated by commas, not {text!r}") from problem
