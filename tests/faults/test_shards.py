"""Whole files that are cut, lost, swapped or strangers: found by verify and by a read, healed by repair and resume."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.errors import GeomcacheError
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.verify import verify_cache
from tests.conftest import build_pack_at, nothing, write_demo_file
from tests.faults.conftest import Answer, Tally
from tests.faults.jobs import differences, extract, repair

SHARD, OTHER = "tokens/c/2/0/0/0", "tokens/c/5/0/0/0"
RECORD, OTHER_RECORD = "commits/000002.json", "commits/000005.json"


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the same shape, made from other frames."""
    folder = tmp_path_factory.mktemp("stranger")
    build_pack_at(write_demo_file(folder / "x_demo.hdf5", seed=3), folder / "pack", rows_per_shard=4)
    for codec in ("bf16", "int8", "lossless"):
        extract(folder / "pack", folder / codec, codec)
    return folder


def _cut(length: Callable[[int], int]) -> Callable[[Path, Path], None]:
    def damage(cache: Path, _: Path) -> None:
        data = (cache / SHARD).read_bytes()
        (cache / SHARD).write_bytes(data[: length(len(data))])

    return damage


def _more(cache: Path, _: Path) -> None:
    with (cache / SHARD).open("ab") as file:
        file.write(b"\0")


def _delete(cache: Path, _: Path) -> None:
    (cache / SHARD).unlink()


def _swap(*names: tuple[str, str]) -> Callable[[Path, Path], None]:
    def damage(cache: Path, _: Path) -> None:
        for one, two in names:
            first, second = (cache / one).read_bytes(), (cache / two).read_bytes()
            assert first != second
            (cache / one).write_bytes(second)
            (cache / two).write_bytes(first)

    return damage


def _foreign(*names: str) -> Callable[[Path, Path], None]:
    def damage(cache: Path, stranger: Path) -> None:
        for name in names:
            shutil.copyfile(stranger / name, cache / name)

    return damage


def _repeat(source: str, target: str) -> Callable[[Path, Path], None]:
    def damage(cache: Path, _: Path) -> None:
        shutil.copyfile(cache / source, cache / target)

    return damage


def _zero(start: int, stop: int | None) -> Callable[[Path, Path], None]:
    def damage(cache: Path, _: Path) -> None:
        data = bytearray((cache / SHARD).read_bytes())
        data[start:stop] = bytes(len(data[start:stop]))
        (cache / SHARD).write_bytes(data)

    return damage


def _swap_rows(cache: Path, _: Path) -> None:
    """Two whole rows with their checksums change places inside a shard, which no checksum beside them can notice."""
    data = bytearray((cache / SHARD).read_bytes())
    row = (len(data) - 4 * 16 - 4) // 4
    data[:row], data[row : 2 * row] = data[row : 2 * row], data[:row]
    (cache / SHARD).write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "cut to nothing": _cut(lambda _: 0),
    "cut to one byte": _cut(lambda _: 1),
    "cut inside a row": _cut(lambda whole: whole // 3),
    "cut before the index": _cut(lambda whole: whole - 4 * 16 - 4),
    "cut to the index's length": _cut(lambda _: 4 * 16 + 4),
    "one byte less": _cut(lambda whole: whole - 1),
    "one byte more": _more,
    "deleted": _delete,
    "two shards swapped": _swap((SHARD, OTHER)),
    "two records swapped": _swap((RECORD, OTHER_RECORD)),
    "two shards swapped with their records": _swap((SHARD, OTHER), (RECORD, OTHER_RECORD)),
    "another shard twice": _repeat(OTHER, SHARD),
    "the record of another shard": _repeat(OTHER_RECORD, RECORD),
    "a stranger's shard": _foreign(SHARD),
    "a stranger's shard with its record": _foreign(SHARD, RECORD),
    "a stranger's record": _foreign(RECORD),
    "first page zero": _zero(0, 512),
    "all zero": _zero(0, None),
    "index zero": _zero(-4 * 16 - 4, None),
    "two rows swapped": _swap_rows,
}


@pytest.mark.parametrize("codec", ["bf16", "int8", "lossless"])
def test_damaged_files_are_found_and_healed(
    codec: str,
    size: Callable[[int, int], int],
    rng: np.random.Generator,
    tally: Tally,
    pack: Path,
    undisturbed: dict[str, Path],
    stranger: Path,
    tmp_path: Path,
) -> None:
    truth, cache = undisturbed[codec], tmp_path / "cache"
    shutil.copytree(truth, cache)
    whole = (truth / SHARD).stat().st_size
    lengths = rng.choice(whole, size(4, min(whole, 100)), replace=False).tolist()
    damage = {**DAMAGE, **{f"cut to {n} bytes": _cut(lambda _, n=n: n) for n in lengths}}  # type: ignore[misc]
    if codec == "lossless":
        del damage["two rows swapped"]  # its rows have different lengths
    every = []
    for what, break_it in damage.items():
        break_it(cache, stranger / codec)
        lost = _not_found(cache) + _not_healed(cache, pack, codec)
        lost += [f"other bytes after the repair: {name}" for name in differences(cache, truth)]
        lost = [f"{codec}, {what}: {each}" for each in lost]
        tally.add(f"file: {'cut' if what.startswith('cut') else what}", tried=1, detected=not lost, lost=lost)
        every += lost
    assert every == []


def _not_found(cache: Path) -> list[str]:
    lost = []
    result = verify_cache(cache, repair=False, progress=nothing)
    if not result.damaged.keys() & {2, 5} or not result.damaged.keys() <= {2, 5}:
        lost.append(f"verify names shards {sorted(result.damaged)}")
    for check in ("every", "first"):
        try:
            with CachedTokens(cache, check=check) as reader:
                reader.tokens(range(len(reader)))
            lost.append(f"read silently, check={check}")
        except GeomcacheError:
            pass
    return lost


def _not_healed(cache: Path, pack: Path, codec: str) -> list[str]:
    try:
        repair(cache)
        extract(pack, cache, codec)
    except GeomcacheError as problem:
        return [f"not healed: {problem.what}"]
    return []


def test_a_folder_in_the_place_of_a_shard_is_damage(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(undisturbed["bf16"], cache)
    (cache / SHARD).unlink()
    (cache / SHARD).mkdir()
    assert _not_found(cache) == []


def test_what_is_whole_stays_readable_beside_the_damage(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(undisturbed["bf16"], cache)
    (cache / SHARD).unlink()
    with CachedTokens(cache) as reader, CachedTokens(undisturbed["bf16"]) as true:
        for rows in ([0, 7], [12, 24]):
            assert torch.equal(reader.tokens(rows), true.tokens(rows))
        with pytest.raises(GeomcacheError, match=SHARD):
            reader.tokens([0, 9, 24])


def test_the_commands_name_the_damage_and_its_cure(
    geomcache: Callable[..., Answer], undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(undisturbed["bf16"], cache)
    (cache / SHARD).unlink()
    found = geomcache("cache", "verify", cache)
    assert found.code == 1
    assert SHARD in found.out
    assert "--repair" in found.err
    refused = geomcache("cache", "derive", cache, "--out", tmp_path / "derived", "--codec", "int8")
    assert refused.code == 2
    assert SHARD in refused.err
    assert "--repair" in refused.err
    assert geomcache("cache", "verify", cache, "--repair").code == 1
    assert (geomcache("cache", "verify", cache).code, "again" in geomcache("cache", "verify", cache).err) == (1, True)
