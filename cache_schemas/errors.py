"""Every error a user can meet: what was expected, what was found, and the command that fixes it."""

from typing import Any


class GeomcacheError(ValueError):
    """A mistake in the user's input or data; the command line shows it without a traceback, exit code 2.

    Args:
        what: one sentence naming the thing that is wrong (a file, a field, a name).
        expected: what would have been right.
        found: what stands there instead.
        fix: the command or edit that mends it.
    """

    def __init__(self, what: str, *, expected: str = "", found: str = "", fix: str = "") -> None:
        self.what, self.expected, self.found, self.fix = what, expected, found, fix
        lines = [what]
        lines += [f"  expected: {expected}"] if expected else []
        lines += [f"  found:    {found}"] if found else []
        lines += [f"  fix:      {fix}"] if fix else []
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:  # pickled by a loader process with its message whole
        return _rebuilt, (type(self), self.what, self.expected, self.found, self.fix)


def _rebuilt(cls: type[GeomcacheError], what: str, expected: str, found: str, fix: str) -> GeomcacheError:
    return cls(what, expected=expected, found=found, fix=fix)


class InputError(GeomcacheError):
    """A file, folder, name or option given by the user cannot be used."""


class ConfigError(GeomcacheError):
    """A configuration has an unknown key or a value of the wrong kind."""


class UnknownName(GeomcacheError):
    """A plug-in, suite or task of that name does not exist."""


class SourceDamaged(GeomcacheError):
    """A data set file is truncated, lacks a field, or contradicts itself."""


class PackDamaged(GeomcacheError):
    """A frame pack is incomplete or does not match its index."""


class CacheMissing(GeomcacheError):
    """There is no token cache at that path."""


class CacheStale(GeomcacheError):
    """The cache was made from another pack, encoder, weights or configuration."""


class CacheIncomplete(GeomcacheError):
    """The cache lacks committed shards."""


class CacheDamaged(GeomcacheError):
    """Bytes of the cache are not those that were committed."""


class CacheLocked(GeomcacheError):
    """Another run is writing the cache."""


class ContractMismatch(GeomcacheError):
    """Two parts of the pipeline follow different conventions (orientation, cameras, state, action, ...)."""


class SchemaTooNew(GeomcacheError):
    """The file was written by a newer geomcache."""


class MissingDependency(GeomcacheError):
    """A Python package or system library is not installed."""


class TrainingFailed(GeomcacheError):
    """Training produced a non-finite loss or a policy that learned nothing."""
