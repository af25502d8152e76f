"""A command's settings: preset or file, then ``--set a.b=c``, then its own options; unknown keys are refused."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import ConfigError
from geomcache.pipeline.config_errors import parse_config

S = TypeVar("S", bound=Schema)


def load_config(cls: type[S], file: str | None, sets: Sequence[str], options: Mapping[str, Any]) -> S:
    """Build ``cls``.

    Args:
        cls: the command's configuration.
        file: a YAML file, or the name of a shipped preset such as ``tiny/train``.
        sets: ``key.subkey=value`` strings, values in YAML.
        options: from the command line; None means not given.

    Raises:
        ConfigError: an unreadable file, an unknown key (with a suggestion), a value of the wrong kind.
    """
    data = read_yaml(file) if file else {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"--set {text} cannot be read",
                expected="--set key.subkey=value",
                found=text,
                fix="--set steps=500",
            )
        _place(data, key.split("."), _parse_yaml(value, f"--set {key}"), text)
    data.update({key: value for key, value in options.items() if value is not None})
    return parse_config(cls, data, file or "the settings")


def read_yaml(file: str) -> dict[str, Any]:
    """A YAML mapping from a path or a preset's name."""
    path = Path(file)
    if path.is_file():
        text = path.read_text(errors="replace")
    else:
        preset = resources.files("geomcache.configs").joinpath(f"{file.removesuffix('.yaml')}.yaml")
        if not preset.is_file():
            raise ConfigError(
                f"there is no configuration {file}",
                expected=f"a YAML file, or one of the presets {', '.join(preset_names())}",
                fix="check the path",
            )
        text = preset.read_text()
    data = _parse_yaml(text, file)
    if not isinstance(data, dict):
        raise ConfigError(f"{file} is not a mapping", expected="key: value lines", found=type(data).__name__)
    return data


def preset_names() -> list[str]:
    """Shipped presets, as ``--config`` takes them; those under ``accelerate`` are for its own launcher."""
    folder = Path(str(resources.files("geomcache.configs")))
    found = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(str(path) for path in found if path.parts[0] != "accelerate")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise ConfigError(f"{where} is not valid YAML", found=str(problem), fix="correct it") from problem


def _place(data: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    *path, last = keys
    for key in path:
        inner = data.get(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {text}: {key} is not a group of settings", found=repr(inner))
        data[key] = dict(inner)  # a copy: YAML anchors let several places share one mapping
        data = data[key]
    data[last] = value
