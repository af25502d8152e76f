"""Configuration data -> a component's Config; what is wrong is told by name, with a suggestion."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import ConfigError

S = TypeVar("S", bound=Schema)

Loc = tuple[int | str, ...]


def parse_config(cls: type[S], data: Mapping[str, Any], where: str) -> S:
    """Validate ``data`` as ``cls``.

    Args:
        cls: the Config to build; it refuses unknown keys.
        data: as read from YAML or the command line; lists stand for tuples.
        where: what the data belong to, e.g. "encoder depth_anything3" or a file name; opens the message.

    Raises:
        ConfigError: naming every unknown, missing or wrong key; an unknown key comes with the closest known
        one.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{where}: the settings are not a mapping",
            expected=f"keys of {_known(cls)}",
            found=f"{type(data).__name__} {_short(data)}",
            fix="write `key: value` lines",
        )
    try:
        return cls.model_validate(dict(data))
    except ValidationError as problem:
        problems = [_explain(cls, dict(error)) for error in problem.errors()]
        what, expected, found, fix = problems[0]
        others = [f"also {line[0]}" for line in problems[1:]]
        raise ConfigError(
            f"{where}: {what}", expected=expected, found="; ".join([found, *others]), fix=fix
        ) from problem


def _explain(cls: type[BaseModel], error: dict[str, Any]) -> tuple[str, str, str, str]:
    """One pydantic error -> (what, expected, found, fix)."""
    loc: Loc = error["loc"]
    key = ".".join(str(part) for part in loc) or "(all settings)"
    if error["type"] == "extra_forbidden":
        known = sorted({name for model in _models_at(cls, loc[:-1]) for name in model.model_fields})
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else "remove the key, or choose one of those above"
        return f"unknown key {key!r}", f"one of {', '.join(known)}" if known else "no key", repr(loc[-1]), fix
    if error["type"] == "missing":
        return f"{key!r} is missing", "a value", "nothing", f"set `{key}`"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not loc:  # a rule about several settings, which says what to do
        return "the settings do not fit each other", message, "", ""
    return f"{key!r} has a wrong value", message, _short(error["input"]), f"change `{key}`"


def _models_at(annotation: Any, path: Loc) -> list[type[BaseModel]]:
    """The models that may stand at ``path`` (field names, list indices, union tags) under a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not path:
            return [annotation]
        field = annotation.model_fields.get(str(path[0]))
        # A part that is no field is the tag of a union member.
        return _models_at(field.annotation if field else annotation, path[1:])
    found = [model for argument in get_args(annotation) for model in _models_at(argument, path)]
    if path and not found:  # the part was a list index or a mapping's key
        found = [model for argument in get_args(annotation) for model in _models_at(argument, path[1:])]
    return found


def _known(cls: type[BaseModel]) -> str:
    return ", ".join(cls.model_fields) or "nothing (it has no settings)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
