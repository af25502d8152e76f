"""``geomcache encoders``: which geometry encoders there are, whose weights they load, under which licence."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from geomcache.stages.cli.common import JsonOption, show_table, show_values

if TYPE_CHECKING:
    from geomcache.cache_schemas.contract import Contract

# What a broken file or a broken package can raise when it is imported, or lacks one of the names that are read.
_IMPORT_FAULTS = (ImportError, SyntaxError, NameError, AttributeError, OSError, RuntimeError, TypeError, ValueError)


def encoders(as_json: JsonOption = False) -> None:
    """All encoders and their published weights: licences, what each needs, what must be installed."""
    from geomcache.pipeline import plugins

    found = [describe(name) for name in plugins.names("encoder")]
    if as_json:
        show_values({"encoders": found}, as_json)
        return
    show_table(
        "geometry encoders",
        ["encoder", "needs (at least)", "packages", "what it is"],
        [[one["name"], ", ".join(one["needs"]), _packages(one), one["about"]] for one in found],
    )
    show_table(
        "published weights",
        ["encoder", "weights", "licence", "use", "note"],
        [_line(one["name"], checkpoint) for one in found for checkpoint in one["checkpoints"]],
    )
    for one in found:
        if one["problem"] is not None:
            typer.echo(f"{one['name']} cannot be used: {one['problem']}")
        elif one["missing"]:
            typer.echo(f"{one['name']} needs {', '.join(one['missing'])}, not installed: {one['install']}")


def describe(name: str) -> dict[str, Any]:
    """One encoder in JSON's types; ``needs`` is that of its default settings, some settings ask for more.

    Besides ``Encoder`` and ``Config`` its file holds ``CHECKPOINTS`` (what can be loaded), ``PACKAGES`` (import names)
    and ``INSTALL`` (the line that brings them). One that cannot be imported has a ``problem``.
    """
    from importlib.util import find_spec

    from geomcache.pipeline import plugins

    result: dict[str, Any] = {"name": name, "about": "", "needs": [], "checkpoints": []}
    result |= {"packages": [], "missing": [], "install": None, "problem": None}
    try:
        module: Any = plugins.module("encoder", name)
        result |= {
            "about": " ".join((module.__doc__ or "").split("\n\n")[0].split()),
            "needs": sorted(module.Encoder(module.Config(), _any_contract()).needs),
            "checkpoints": [asdict(checkpoint) for checkpoint in module.CHECKPOINTS],
            "packages": list(module.PACKAGES),
            "missing": [package for package in module.PACKAGES if find_spec(package) is None],
            "install": module.INSTALL or None,
        }
    except _IMPORT_FAULTS as problem:
        result["problem"] = f"{type(problem).__name__}: {problem}"
    return result


def _any_contract() -> "Contract":
    """Frames with everything an encoder may ask for."""
    from geomcache.cache_schemas.contract import CameraContract, Contract

    cameras = tuple(CameraContract(name=name, height=256, width=256) for name in ("agentview", "wrist"))
    return Contract(image_orientation="upright", cameras=cameras, has_depth=True)


def _packages(encoder: dict[str, Any]) -> str:
    if encoder["problem"] is not None:
        return "see below"
    if not encoder["packages"]:
        return "none"
    return f"{len(encoder['missing'])} missing, see below" if encoder["missing"] else "installed"


def _line(encoder: str, checkpoint: dict[str, Any]) -> list[str]:
    use = "NON-COMMERCIAL" if checkpoint["non_commercial"] else ""
    return [encoder, checkpoint["name"], checkpoint["license"], use, checkpoint["note"]]
