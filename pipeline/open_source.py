"""A SOURCE as users write it -> the data set: which plug-in reads it, with which settings."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline import plugins
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.interfaces import FrameSource
from geomcache.pipeline.official_layout import SUFFIXES


class SourceRequest(Schema):
    """One data set to read."""

    path: str  # a file, a folder, or a hub data set: owner/name or owner/name@revision
    kind: str | None = None  # plug-in; None: told by what is there
    settings: dict[str, Any] = Field(default_factory=dict)  # the plug-in's own, e.g. cameras

    @field_validator("settings")
    @classmethod
    def _path_stands_beside(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if "path" in settings:
            raise ValueError("the path is the SOURCE itself, not a setting of it")
        return settings


def resolve(request: SourceRequest) -> SourceRequest:
    """The same request with a local path (a hub data set is downloaded) and the plug-in's name.

    Raises:
        InputError: there is no such data set, or nothing there looks like one.
    """
    from geomcache.pipeline.sources._hub import resolve as local_path

    path = local_path(request.path)
    return SourceRequest(path=str(path), kind=request.kind or _kind_of(path), settings=request.settings)


def open_source(resolved: SourceRequest) -> FrameSource:
    """Open a resolved request; raises what the plug-in raises."""
    assert resolved.kind is not None, "resolve() first"
    source_class = plugins.load("source", resolved.kind)
    values = {**resolved.settings, "path": resolved.path}
    source: FrameSource = source_class(
        parse_config(plugins.config_class("source", resolved.kind), values, f"source {resolved.kind}")
    )
    return source


def _kind_of(path: Path) -> str:
    if path.is_file():
        return "libero_hdf5"
    if (path / "meta" / "info.json").exists():
        return "lerobot"
    if any(next(path.rglob(f"[!.]*{suffix}"), None) for suffix in SUFFIXES):
        return "libero_hdf5"
    raise InputError(
        f"{path} holds no data set that geomcache knows",
        expected="LIBERO files named <task>_demo.hdf5, or a LeRobot data set (meta/info.json)",
        found=", ".join(sorted(p.name for p in path.iterdir())[:4]) or "an empty folder",
        fix="give the data set's own folder, or record one: geomcache demos --suite libero_object --task 0 --out DIR",
    )
