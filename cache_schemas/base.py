"""The base of everything that is written to disk as JSON: frozen, strict, comparable, sealed where it matters."""

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from geomcache.cache_schemas.errors import GeomcacheError, SchemaTooNew

MAX_JSON_BYTES = 64 << 20  # no file of ours comes near it; a larger one is not read into memory
_LONG_LIST = 16
_SEAL = re.compile(rb'^(.*),\n  "sha256": "([0-9a-f]{64})"\n\}\n$', re.DOTALL)


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


def seal(record: Schema) -> str:
    """JSON whose last field is the SHA-256 of everything before it, so that one changed bit anywhere is noticed."""
    text = record.model_dump_json(indent=2)
    return f'{text[:-2]},\n  "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def is_sealed(data: bytes) -> bool:
    """Whether ``data`` ends like something that ``seal`` wrote."""
    return _SEAL.match(data) is not None


_RESTORE = "restore the file, or make it again with the command that wrote it"


def unseal(data: bytes, where: str, error: type[GeomcacheError], fix: str = _RESTORE) -> bytes:
    """The JSON that was sealed; ``error`` when its bytes are not those that were written."""
    found = _SEAL.match(data)
    text = found.group(1) + b"\n}" if found else b""
    if not found or hashlib.sha256(text).hexdigest().encode() != found.group(2):
        raise error(
            f"{where} is not what was written: its own checksum does not hold",
            expected="the bytes of the command that wrote it; it cannot be edited by hand",
            found="other bytes" if found else "no checksum at its end",
            fix=fix,
        )
    return text


def open_regular(path: str, error: type[GeomcacheError]) -> int:
    """A descriptor of a file to read; ``error`` for folders, pipes and devices, which would crash or hang a reader.

    Raises:
        FileNotFoundError: there is nothing.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except NotADirectoryError as problem:
        raise FileNotFoundError(path) from problem
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(
            f"{path} is no file",
            expected="a file",
            found="a folder, pipe or device",
            fix="remove it, then restore the file or make it again with the command that wrote it",
        )
    return handle


def read_limited(path: str, error: type[GeomcacheError]) -> bytes:
    """A small file's bytes; ``error`` when it is no file, or far too large to be one of ours."""
    handle = open_regular(path, error)
    try:
        size = os.fstat(handle).st_size
        if size > MAX_JSON_BYTES:
            raise error(
                f"{path} is too large to be a record of geomcache",
                expected=f"at most {MAX_JSON_BYTES >> 20} MiB",
                found=f"{size:,} bytes",
                fix="restore the file, or make it again with the command that wrote it",
            )
        return os.pread(handle, size, 0)
    finally:
        os.close(handle)


class VersionedSchema(Schema):
    """A record that stands in a file of its own; a file of a newer schema is refused by name."""

    sealed_since: ClassVar[int | None] = None  # schema version from which on the file ends with its own checksum
    schema_version: int = 1

    @classmethod
    def read(cls, path: Path, error: type[GeomcacheError]) -> Self:
        """Parse the file ``path``.

        Raises:
            SchemaTooNew: a newer geomcache wrote it.
            error: it is no valid record; the field is named.
        """
        return cls.parse_versioned(read_limited(str(path), error), str(path), error)

    @classmethod
    def parse_versioned(cls, text: bytes, path: str, error: type[GeomcacheError]) -> Self:
        """``read`` of bytes that came from somewhere else than a local file."""
        newest = cls.model_fields["schema_version"].default
        version = Record.parse(text, path, error).schema_version
        if version > newest:
            raise SchemaTooNew(
                f"{path} was written by a newer geomcache",
                expected=f"schema version <= {newest}",
                found=f"schema version {version}",
                fix="pip install --upgrade geomcache",
            )
        if cls.sealed_since is not None and version >= cls.sealed_since:
            text = unseal(text, path, error)
        return cls.parse(text, path, error)


class Record(Schema):
    """Just the version of a JSON file; its other fields are not looked at."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int


def _differences(mine: Any, theirs: Any, name: str) -> list[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = list(mine) + [key for key in theirs if key not in mine]
        dot = f"{name}." if name else ""
        return [line for key in keys for line in _differences(mine.get(key), theirs.get(key), f"{dot}{key}")]
    if mine == theirs:
        return []
    if isinstance(mine, list) and isinstance(theirs, list) and max(len(mine), len(theirs)) > _LONG_LIST:
        differing = sum(a != b for a, b in zip(mine, theirs, strict=False)) + abs(len(mine) - len(theirs))
        return [f"{name}: {differing} of {max(len(mine), len(theirs))} values differ"]
    if isinstance(mine, dict) != isinstance(theirs, dict):
        return [f"{name}: only the {'first' if isinstance(mine, dict) else 'second'} has it"]
    return [f"{name}: {mine!r} != {theirs!r}"]
