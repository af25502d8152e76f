"""The ``geomcache`` command. Importing this file must stay cheap: heavy imports live inside the commands."""

import sys

import typer

from geomcache.cache_schemas.errors import GeomcacheError
from geomcache.stages.cli import (
    cache,
    check,
    demos,
    diagnose,
    encoders,
    evaluate,
    export,
    extract,
    pack,
    proof,
    quickstart,
    report,
    serve,
    train,
)
from geomcache.stages.cli.common import EXIT_MISTAKE, say

app = typer.Typer(
    name="geomcache",
    help="Offline geometry features for robot policies: record or pack frames, run a frozen geometry model over "
    "them once (extract), train a policy on the cached tokens (train), let it act in the LIBERO simulator (eval).",
    epilog="Start with: geomcache quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("demos")(demos.demos)
app.add_typer(pack.app, name="pack")
app.command("encoders")(encoders.encoders)
app.command("extract")(extract.extract)
app.command("train")(train.train)
app.command("check")(check.check)
app.command("eval")(evaluate.evaluate)
app.command("serve")(serve.serve)
app.command("export")(export.export)
app.command("diagnose")(diagnose.diagnose)
app.add_typer(cache.app, name="cache")
app.command("report")(report.report)
app.command("quickstart")(quickstart.quickstart)
app.command("proof")(proof.proof)

INTERRUPTED = 130  # 128 + SIGINT, as shells count


@app.callback(invoke_without_command=True)
def main_options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Options before the command."""
    if version:
        import geomcache

        typer.echo(geomcache.__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: 0 done, 1 a finding, 2 the user's mistake (one message, no traceback)."""
    try:
        app()
    except GeomcacheError as problem:
        say(f"error: {problem}")
        sys.exit(EXIT_MISTAKE)
    except OSError as problem:
        from geomcache.pipeline.files import storage_fault

        text = storage_fault(problem)
        if text is None:
            raise
        say(f"error: {text}")
        sys.exit(EXIT_MISTAKE)
    except SystemExit as ending:
        # typer's answer to Ctrl-C; a run that has saved (TrainingStopped) has said so itself
        if ending.code == INTERRUPTED and type(ending) is SystemExit:
            say("stopped; what was finished stays valid, the same command continues")
        raise


if __name__ == "__main__":
    main()
