"""The journal of an evaluation: torn lines, damage, a full disk, what may be added later."""

import errno
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from geomcache.cache_schemas.errors import InputError
from geomcache.stages.evaluate import journal as module
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.journal import Journal
from geomcache.stages.evaluate.results import (
    JOURNAL_NAME,
    PARQUET_NAME,
    RESULTS_NAME,
    Conditions,
    EpisodeKey,
    read_results,
)
from tests.stages.evaluate.evaluation_folders import episode, keys

CONDITIONS = Conditions(
    checkpoint_weights="w" * 64,
    checkpoint_step=5,
    geomcache_version="0.1.0",
    mode="reproducible",
    batch_size=1,
    device="cpu",
)
WANTED = keys(tasks=(0,), states=range(4))


def _open(out: Path, wanted: list[EpisodeKey] = WANTED, conditions: Conditions = CONDITIONS, **config: Any) -> Journal:
    settings = {"run": Path("run"), "out": out, "tasks": (0,), "episodes": 4, **config}
    return Journal(EvalConfig(**settings), conditions, wanted)


def _written(out: Path, count: int = 2) -> Journal:
    journal = _open(out)
    journal.begin()
    for number, key in enumerate(WANTED[:count]):
        journal.add(episode(key, success=number == 1))
    return journal


def test_what_was_told_is_counted_where_it_could_be_done(tmp_path: Path) -> None:
    journal = _open(tmp_path)
    journal.begin()
    for key, told_success in zip(WANTED, (True, False, None, True), strict=True):
        journal.add(episode(key, success=False, told_success=told_success))
    told = journal.write_results(finished=True).told
    assert told is not None
    assert (told.successes, told.episodes) == (2, 3)
    assert read_results(tmp_path).overall.successes == 0
    _written(tmp_path / "plain")
    assert read_results(tmp_path / "plain").told is None


def test_a_line_that_a_kill_has_cut_is_played_again_and_spoils_no_other(tmp_path: Path) -> None:
    _written(tmp_path)
    path = tmp_path / JOURNAL_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    journal = _open(tmp_path)
    assert list(journal.done) == WANTED[:1]
    assert path.read_bytes() == whole[:-40]  # looking changes nothing: another command may be writing
    journal.add(episode(WANTED[1], success=True))
    assert path.read_bytes() == whole
    results = journal.write_results(finished=False)
    assert [one.key for one in results.episodes] == WANTED[:2]
    assert (results.overall.successes, results.overall.episodes) == (1, 2)
    table = pq.read_table(tmp_path / PARQUET_NAME)
    assert table["success"].to_pylist() == [False, True]
    assert table["grasp.attempts"].to_pylist() == [2, 1]
    assert table["seconds.total"].to_pylist() == [9.0, 9.0]


def test_a_damaged_line_is_named_with_its_cure(tmp_path: Path) -> None:
    _written(tmp_path)
    path = tmp_path / JOURNAL_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0].replace(b'"success":false', b'"success":"maybe"') + lines[1])
    with pytest.raises(InputError, match="line 1") as caught:
        _open(tmp_path)
    assert f"sed -i 1d {path}" in str(caught.value)


def test_a_full_disk_loses_the_episode_in_flight_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = _written(tmp_path)
    path = tmp_path / JOURNAL_NAME
    whole = path.read_bytes()

    def full(handle: int, parts: list[bytes]) -> None:
        os.write(handle, parts[0][:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_all", full)
        with pytest.raises(OSError, match="No space"):
            journal.add(episode(WANTED[2], success=True))
    assert list(_open(tmp_path).done) == WANTED[:2]
    journal.add(episode(WANTED[2], success=True))
    assert path.read_bytes()[: len(whole)] == whole
    assert list(_open(tmp_path).done) == WANTED[:3]


def test_more_may_be_added_less_or_other_may_not(tmp_path: Path) -> None:
    _written(tmp_path)
    more = keys(suites=("libero_object", "libero_spatial"), tasks=(0, 3), states=range(9), seeds=(7, 8))
    grown = {"suites": ("libero_object", "libero_spatial"), "tasks": (0, 3), "episodes": 9, "seeds": (7, 8)}
    assert len(_open(tmp_path, more, workers=5, video_fps=5, **grown).done) == 2
    for changes, said in (
        ({"wanted": WANTED[:1]}, "and 1 episodes more"),
        ({"horizon": 9}, "horizon: None != 9"),
        ({"settle_steps": 0}, "settle_steps"),
        ({"averaged": False}, "averaged"),
        ({"conditions": CONDITIONS.model_copy(update={"checkpoint_weights": "v" * 64})}, "checkpoint_weights"),
        ({"conditions": CONDITIONS.model_copy(update={"batch_size": 2})}, "batch_size"),
        ({"conditions": CONDITIONS.model_copy(update={"device": "cuda"})}, "device"),
    ):
        with pytest.raises(InputError, match=said):
            _open(tmp_path, **changes)


def test_a_kill_before_the_results_were_written_is_mended(tmp_path: Path) -> None:
    _written(tmp_path, count=4)
    assert not read_results(tmp_path).finished
    results = _open(tmp_path).standing_results()
    assert (results.finished, results.overall.episodes) == (True, 4)
    assert read_results(tmp_path) == results


@pytest.mark.parametrize("damage", [b"", b'{"schema_version": 1, "conf', None])
def test_damaged_results_are_made_again_of_the_journal(tmp_path: Path, damage: bytes | None) -> None:
    _written(tmp_path)
    path = tmp_path / RESULTS_NAME
    whole = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage)
    journal = _open(tmp_path)
    assert list(journal.done) == WANTED[:2]
    assert journal.write_results(finished=False).overall.episodes == 2
    assert whole != path.read_bytes()  # it was written before the first episode
    assert read_results(tmp_path).overall.episodes == 2


def test_a_journal_that_is_gone_is_missed(tmp_path: Path) -> None:
    _written(tmp_path).write_results(finished=False)
    (tmp_path / JOURNAL_NAME).unlink()
    with pytest.raises(InputError, match="is gone"):
        _open(tmp_path)


def test_the_first_failure_is_the_earliest_whatever_came_first(tmp_path: Path) -> None:
    journal = _open(tmp_path, keys(tasks=(0,), seeds=(9, 7)), seeds=(9, 7))
    journal.begin()
    journal.add(episode(("libero_object", 0, 3, 9), success=False))
    assert journal.is_first_failure("libero_object", 0, 9, 1)
    assert not journal.is_first_failure("libero_object", 0, 9, 4)
    assert journal.is_first_failure("libero_object", 0, 7, 9)  # seeds are played in their order, however given
    assert journal.is_first_failure("libero_object", 1, 9, 4)
