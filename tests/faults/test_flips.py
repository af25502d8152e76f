"""One flipped bit, anywhere: ``verify`` notices it, and so does every checked read."""

import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.errors import GeomcacheError
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.verify import verify_cache
from tests.conftest import nothing
from tests.faults.conftest import Tally
from tests.faults.jobs import derive

SLOTS, ENTRY, CRC = 4, 16, 4  # rows of a shard; the sizes of Zarr's sharding codec
Place = tuple[Path, int]
# What careless reading of damaged bytes would raise: to a user a traceback.
NOT_OURS = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
CODECS = ["bf16", "int8", "lossless"]


def _row_bounds(shard: Path) -> list[tuple[int, int]]:
    """(offset, bytes with checksum) of each row, by the specification of Zarr's shards and not by our reader."""
    data = shard.read_bytes()
    entries = struct.iter_unpack("<QQ", data[-SLOTS * ENTRY - CRC : -CRC])
    return [(offset, count) for offset, count in entries if offset != 2**64 - 1]


def _places(cache: Path) -> dict[str, list[Place]]:
    """Every byte of a cache that must not change, by what it is."""
    shards = sorted(path for path in cache.rglob("c/*/0/*") if path.is_file())
    shards += sorted(path for path in cache.rglob("c/*/0/0/0") if path.is_file())
    found: dict[str, list[Place]] = {"payload": [], "row checksum": [], "index": [], "index checksum": []}
    for shard in shards:
        size = shard.stat().st_size
        for offset, count in _row_bounds(shard):
            found["payload"] += [(shard, place) for place in range(offset, offset + count - CRC)]
            found["row checksum"] += [(shard, place) for place in range(offset + count - CRC, offset + count)]
        found["index"] += [(shard, place) for place in range(size - CRC - SLOTS * ENTRY, size - CRC)]
        found["index checksum"] += [(shard, place) for place in range(size - CRC, size)]
    for kind, files in {
        "manifest": [cache / "manifest.json"],
        "commit record": sorted((cache / "commits").iterdir()),
        "Zarr metadata": sorted(cache.rglob("zarr.json")),
    }.items():
        found[kind] = [(path, place) for path in files for place in range(path.stat().st_size)]
    every = {path for places in found.values() for path, _ in places}
    unguarded = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()} - {
        path.relative_to(cache).as_posix() for path in every
    }
    assert unguarded == {"README.md", "config.yaml"}  # read by people only
    assert sum(len(_row_bounds(shard)) for shard in shards) == 25 * len(shards) // 7
    return found


@contextmanager
def _flipped(place: Place, bit: int) -> Iterator[None]:
    path, offset = place
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
        try:
            yield
        finally:
            file.seek(offset)
            file.write(bytes([byte]))


def _silent(cache: Path, truth: torch.Tensor) -> list[str]:
    """Which of the two did not notice, or noticed with another error than one of ours."""
    silent = []
    try:
        if verify_cache(cache, repair=False, progress=nothing).complete:
            silent.append("verify")
    except GeomcacheError:
        pass
    except NOT_OURS as problem:
        silent.append(f"verify ends with {problem!r}")
    for check in ("every", "first"):
        try:
            with CachedTokens(cache, check=check) as reader:
                equal = torch.equal(reader.tokens(range(len(reader))), truth)
            silent.append(f"read, check={check}: {'true' if equal else 'WRONG'} tokens")
        except GeomcacheError:
            pass
        except NOT_OURS as problem:
            silent.append(f"read, check={check} ends with {problem!r}")
    return silent


@pytest.mark.parametrize("codec", [*CODECS, "derived"])
def test_no_flipped_bit_is_silent(
    codec: str,
    size: Callable[[int, int], int],
    rng: np.random.Generator,
    tally: Tally,
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    if codec == "derived":
        derive(undisturbed["bf16"], cache)
    else:
        shutil.copytree(undisturbed[codec], cache)
    with CachedTokens(cache) as reader:
        truth = reader.tokens(range(len(reader)))
    for kind, places in _places(cache).items():
        lost, tried = [], size(3, 20)
        for _ in range(tried):
            place, bit = places[rng.integers(len(places))], int(rng.integers(8))
            with _flipped(place, bit):
                where = f"{codec}: bit {bit} of byte {place[1]} of {place[0].relative_to(cache)}"
                lost += [f"{where}: {what}" for what in _silent(cache, truth)]
        tally.add(f"flipped bit: {kind}", tried=tried, detected=tried - len(lost), lost=lost)
        assert lost == []
    assert verify_cache(cache, repair=False, progress=nothing).complete  # every flip was taken back
    with CachedTokens(cache) as reader:
        assert torch.equal(reader.tokens(range(len(reader))), truth)
