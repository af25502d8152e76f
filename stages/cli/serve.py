"""``geomcache serve``."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.stages.cli.common import ConfigOption, JsonOption, SetOption, say, show_values


def serve(
    run: Annotated[Path | None, typer.Argument(help="Run folder of `geomcache train`, or one checkpoint.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; not this machine's own: needs a token.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="0: a free one; default 8000.")] = None,
    token: Annotated[
        str | None, typer.Option(envvar="GEOMCACHE_TOKEN", help="What clients must know; better in the environment.")
    ] = None,
    without_geometry: Annotated[
        bool, typer.Option("--without-geometry", help="Mask every geometry token; for encoders that need depth.")
    ] = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """The policy behind a WebSocket that speaks vla-eval's protocol, for that and other harnesses; docs/serve.md.

    Ctrl-C or SIGTERM ends it. GET /health on the same port says what is served.
    """
    from geomcache.configs.load import load_config
    from geomcache.stages.evaluate.serve.config import ServeConfig, load_served_policy
    from geomcache.stages.evaluate.serve.server import serve_until_signal
    from geomcache.stages.evaluate.shipped import find_policy

    options = {
        "run": None if run is None else find_policy(run),
        "host": host,
        "port": port,
        "token": token,
        "without_geometry": True if without_geometry else None,
    }
    settings = load_config(ServeConfig, config, sets or [], options)
    policy = load_served_policy(settings)

    def ready(bound: int) -> None:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"ws://{host}:{bound}"
        if as_json:
            show_values({"url": url, "port": bound, "checkpoint": str(policy.checkpoint)}, as_json)
        say(f"serving {policy.checkpoint} on {url} (health: http://{host}:{bound}/health); Ctrl-C ends it")

    serve_until_signal(policy, settings, say, ready)
    say("stopped")
