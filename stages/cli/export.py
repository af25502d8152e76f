"""``geomcache export``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from geomcache.stages.cli.common import JsonOption, say, show_values


def export(
    run: Annotated[Path, typer.Argument(help="Run folder of geomcache train, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="Folder of the policy; its last part is the policy's name.")],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="Results of geomcache eval to put into its card; may be repeated.")
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="Of the parameters; fp32 leaves them as they were trained.")
    ] = "bf16",
    as_json: JsonOption = False,
) -> None:
    """A trained policy ready to be given away: the weights that act in one file, its card, no optimiser, no paths.

    `geomcache eval --checkpoint FOLDER` runs it without further options. An export is replaced by a newer one: evaluate
    it, then export again with --evaluation, so that its card says what these very weights score.
    """
    from geomcache.stages.evaluate.shipped import measured
    from geomcache.stages.train.shipping import export_policy

    figures = [one for folder in evaluation or [] for one in measured(folder)]
    record = export_policy(run, out, dtype=dtype, measured=figures)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    scores = [f"{one.suite} {one.successes}/{one.episodes}" for one in record.measured]
    values = {"policy": str(out), "parameters": record.parameters, "dtype": record.dtype}
    if record.unfinished:
        say(f"the training of {run} is unfinished: {record.unfinished}")
    if as_json:
        show_values({**values, "bytes": size, "measured": scores}, as_json)
        return
    show_values({**values, "size": f"{size / 1e6:.2f} MB", "measured": ", ".join(scores) or "no --evaluation"}, as_json)
    typer.echo(f"run it: geomcache eval --checkpoint {out} --episodes 2")
