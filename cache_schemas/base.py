"""The base of everything that is written to disk as JSON: frozen, strict, comparable."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from geomcache.cache_schemas.errors import GeomcacheError, SchemaTooNew


class Schema(BaseModel):
    """A frozen record; unknown keys are refused; ``describe_difference`` names every field that differs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def describe_difference(self, other: Self) -> list[str]:
        """One line per differing field, ``name: mine != theirs``; empty when equal."""
        return _differences(self.model_dump(mode="json"), other.model_dump(mode="json"), "")

    @classmethod
    def parse(cls, text: str | bytes, where: str, error: type[GeomcacheError]) -> Self:
        """Read strict JSON; anything else raises ``error`` naming the file and the field."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as problem:
            first = problem.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "(whole file)"
            raise error(
                f"{where}: field {field} cannot be read",
                expected=f"a valid {cls.__name__}",
                found=first["msg"],
                fix="restore the file, or make it again with the command that wrote it",
            ) from problem


class VersionedSchema(Schema):
    """A record that stands in a file of its own; a file of a newer schema is refused by name."""

    schema_version: int = 1

    @classmethod
    def read(cls, path: Path, error: type[GeomcacheError]) -> Self:
        """Parse the file ``path``.

        Raises:
            SchemaTooNew: a newer geomcache wrote it.
            error: it is no valid record; the field is named.
        """
        text, newest = path.read_bytes(), cls.model_fields["schema_version"].default
        version = _OnlyVersion.parse(text, str(path), error).schema_version
        if version > newest:
            raise SchemaTooNew(
                f"{path} was written by a newer geomcache",
                expected=f"schema version <= {newest}",
                found=f"schema version {version}",
                fix="pip install --upgrade geomcache",
            )
        return cls.parse(text, str(path), error)


class _OnlyVersion(Schema):
    """Just the version of a JSON file; its other fields are not looked at."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int


def _differences(mine: Any, theirs: Any, name: str) -> list[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = list(mine) + [key for key in theirs if key not in mine]
        dot = f"{name}." if name else ""
        return [line for key in keys for line in _differences(mine.get(key), theirs.get(key), f"{dot}{key}")]
    return [] if mine == theirs else [f"{name}: {mine!r} != {theirs!r}"]
