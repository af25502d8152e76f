"""kill -9 of whoever writes: by the clock, and right before each change on disk. Nothing committed is ever lost."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache_schemas.errors import GeomcacheError
from tests.faults.conftest import Tally
from tests.faults.jobs import Child, derive, differences, extract, repair, unsound

NAMES = ["extract", "derive", "repair"]


class _Extract:
    """The writer of ``geomcache extract``."""

    def __init__(self, pack: Path, undisturbed: dict[str, Path], folder: Path) -> None:
        self.task: Callable[..., None] = extract
        self.truth = undisturbed["bf16"]
        self.cache = folder / "cache"
        self.arguments: tuple[object, ...] = (pack, self.cache, "bf16")

    def prepare(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)

    def resume(self) -> None:
        self.task(*self.arguments)


class _Derive(_Extract):
    """``geomcache cache derive``."""

    def __init__(self, pack: Path, undisturbed: dict[str, Path], folder: Path) -> None:
        super().__init__(pack, undisturbed, folder)
        self.task, self.arguments = derive, (undisturbed["bf16"], self.cache)
        self.truth = folder / "truth"
        derive(undisturbed["bf16"], self.truth)


class _Repair(_Extract):
    """``geomcache cache verify --repair`` of a cache with two damaged shards, a strange record and lost metadata."""

    def __init__(self, pack: Path, undisturbed: dict[str, Path], folder: Path) -> None:
        super().__init__(pack, undisturbed, folder)
        self.task, self.arguments, self._pack = repair, (self.cache,), pack

    def prepare(self) -> None:
        super().prepare()
        shutil.copytree(self.truth, self.cache)
        (self.cache / "tokens/c/2/0/0/0").write_bytes(b"damaged")
        (self.cache / "tokens/c/5/0/0/0").unlink()
        (self.cache / "commits/000003.json").write_text("{}")
        (self.cache / "zarr.json").unlink()
        (self.cache / "tokens/zarr.json").write_text("{}")

    def resume(self) -> None:
        repair(self.cache)
        extract(self._pack, self.cache, "bf16")


@pytest.mark.parametrize(("kind", "few", "many"), [(_Extract, 3, 110), (_Derive, 1, 45), (_Repair, 1, 30)], ids=NAMES)
def test_kills_by_the_clock(
    kind: type[_Extract],
    few: int,
    many: int,
    size: Callable[[int, int], int],
    rng: np.random.Generator,
    tally: Tally,
    pack: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    victim = kind(pack, undisturbed, tmp_path)
    victim.prepare()
    child = Child(victim.task, *victim.arguments)
    started = time.perf_counter()
    child.answer()
    whole = time.perf_counter() - started
    kills, lost = 0, []
    for _ in range(10 * size(few, many)):
        victim.prepare()
        while True:  # a resume may be killed as well
            moment = rng.uniform(0, 1.05 * whole)
            child = Child(victim.task, *victim.arguments)
            time.sleep(moment)
            if not child.kill():
                break
            kills += 1
            lost += _wrong(victim, f"{kind.__name__} killed after {moment * 1e3:.1f} ms", finish=False)
            if rng.random() < 0.7:
                break
        lost += _wrong(victim, f"{kind.__name__} resumed after kill {kills}", finish=True)
        if kills >= size(few, many):
            break
    tally.add(f"kill -9 of {_name(kind)}, by the clock", tried=kills, detected=max(0, kills - len(lost)), lost=lost)
    assert kills >= size(few, many)
    assert lost == []


@pytest.mark.parametrize(("kind", "few", "many"), [(_Extract, 6, 400), (_Derive, 3, 400), (_Repair, 3, 400)], ids=NAMES)
def test_kills_before_a_change_on_disk(
    kind: type[_Extract],
    few: int,
    many: int,
    size: Callable[[int, int], int],
    rng: np.random.Generator,
    tally: Tally,
    pack: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Every moment that leaves another state behind; at most ``many`` of them."""
    victim = kind(pack, undisturbed, tmp_path)
    victim.prepare()
    changes = Child(victim.task, *victim.arguments, die_before=10**9).answer()
    assert 10 < changes < 400
    places = rng.permutation(changes)[: size(few, many)] + 1
    lost = []
    for place in places:
        victim.prepare()
        assert Child(victim.task, *victim.arguments, die_before=int(place)).killed()
        lost += _wrong(victim, f"{kind.__name__} killed before change {place} of {changes}", finish=True)
    tally.add(
        f"kill -9 of {_name(kind)}, before a change", tried=len(places), detected=len(places) - len(lost), lost=lost
    )
    assert lost == []


def test_a_creation_that_was_killed_before_its_manifest_binds_nobody(
    pack: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    """The next run may be of another codec: nothing of the first may stay, above all no array of another type."""
    derive(undisturbed["bf16"], tmp_path / "int8")
    for name in ("zarr.json", "tokens/zarr.json", "scale/zarr.json"):
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tmp_path / "int8" / name, tmp_path / "cache" / name)
    extract(pack, tmp_path / "cache", "bf16")
    assert differences(tmp_path / "cache", undisturbed["bf16"]) == []
    assert unsound(tmp_path / "cache", undisturbed["bf16"]) == []


def _wrong(victim: _Extract, where: str, *, finish: bool) -> list[str]:
    """What a kill did to the cache; with ``finish`` after a resume, which must need no hand."""
    wrong = []
    try:
        if not isinstance(victim, _Repair):  # which begins with a damaged cache
            wrong += unsound(victim.cache, victim.truth)
    except GeomcacheError as problem:
        wrong.append(f"does not open: {problem.what}")
    if finish:
        try:
            victim.resume()
            wrong += [f"not as undisturbed: {name}" for name in differences(victim.cache, victim.truth)]
        except GeomcacheError as problem:
            wrong.append(f"cannot be resumed: {problem.what}")
    return [f"{where}: {'; '.join(wrong)}"] if wrong else []


def _name(kind: type[_Extract]) -> str:
    return kind.__name__.removeprefix("_").lower()
