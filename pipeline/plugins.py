"""(kind, name) -> class, resolved lazily: one file per plug-in, its file name is its name.

Adding an encoder, codec, source, compressor or backbone = dropping one file into its folder; it holds the class named
below and its ``Config`` (a frozen Schema; a codec has none, the TokenSpec is its setting). Listing imports nothing.
"""

import difflib
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import UnknownName


@dataclass(frozen=True)
class _Kind:
    package: str
    class_name: str


KINDS = {
    "encoder": _Kind("geomcache.pipeline.encoders", "Encoder"),
    "codec": _Kind("geomcache.pipeline.codecs", "Codec"),
    "source": _Kind("geomcache.pipeline.sources", "Source"),
    "compressor": _Kind("geomcache.stages.train.compressors", "Compressor"),
    "backbone": _Kind("geomcache.stages.train.backbones", "Backbone"),
}


def names(kind: str) -> list[str]:
    """Names of the plug-ins of one kind, sorted; nothing is imported but the (empty) package."""
    spec = importlib.util.find_spec(KINDS[kind].package)
    if spec is None or spec.origin is None:
        raise UnknownName(f"package {KINDS[kind].package} is not installed")
    return sorted(path.stem for path in Path(spec.origin).parent.glob("[a-z]*.py"))


def module(kind: str, name: str) -> ModuleType:
    """Import one plug-in's file."""
    known = names(kind)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise UnknownName(
            f"there is no {kind} named {name!r}",
            expected=f"one of {', '.join(known)}",
            found=name,
            fix=f"did you mean {close[0]!r}?" if close else f"choose one of the {kind}s above",
        )
    return importlib.import_module(f"{KINDS[kind].package}.{name}")


def load(kind: str, name: str) -> Any:
    """The plug-in's class."""
    return getattr(module(kind, name), KINDS[kind].class_name)


def config_class(kind: str, name: str) -> type[Schema]:
    """The plug-in's ``Config``."""
    found: type[Schema] = module(kind, name).Config
    return found
