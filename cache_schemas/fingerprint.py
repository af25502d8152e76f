"""Stable digests: the same inputs give the same cache id on every machine; another input gives another id."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from geomcache.cache_schemas.base import Schema

_CHUNK = 1 << 20

# Marks a Config field that says where weights come from, not what they are: their digest says that. So the same
# weights in another folder give the same cache id.
NOT_IN_FINGERPRINT: dict[str, JsonValue] = {"in_fingerprint": False}
# Marks a field that a later release added: at its default the id of older caches stays what it was.
IN_FINGERPRINT_UNLESS_DEFAULT: dict[str, JsonValue] = {"in_fingerprint": "unless_default"}


def digest_bytes(*parts: bytes) -> str:
    """SHA-256 in hex over length-prefixed parts (so that moving a border changes the digest)."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON value, independent of key order."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            state.update(piece)
    return state.hexdigest()


def digest_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file; several at once, as hashing and reading leave the interpreter free."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest_file, paths))


def digest_named_buffers(buffers: Iterable[tuple[str, str, bytes]]) -> str:
    """Digest of (name, dtype and shape, bytes) triples in name order; used for model weights."""
    state = hashlib.sha256()
    for name, kind, data in sorted(buffers, key=lambda item: item[0]):
        state.update(digest_bytes(name.encode(), kind.encode(), data).encode())
    return state.hexdigest()


class Fingerprint(Schema):
    """Everything the tokens depend on."""

    encoder_config: str  # digest of the encoder's resolved configuration
    weights: str  # digest of the weights; "none" for an encoder without any
    image_path: str  # version of the resize/normalise code path
    pack: str  # digest of the pack the tokens were made from

    @property
    def cache_id(self) -> str:
        """Short stable name of the cache's content."""
        return digest_json(self.model_dump())[:16]
