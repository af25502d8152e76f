"""One writer a cache: who is refused, who may take over."""

import os
import socket
from pathlib import Path

import pytest

from geomcache.cache_schemas.errors import CacheLocked
from geomcache.pipeline.store.lock import LOCK_NAME, LockOwner, lock_owner, write_lock


def _leave_lock(folder: Path, host: str) -> None:
    owner = LockOwner(host=host, process=12345678, since="2026-01-01 00:00:00 UTC", command="geomcache extract")
    (folder / LOCK_NAME).write_text(owner.model_dump_json())


def test_a_second_writer_is_told_who_the_first_is_and_the_lock_goes_with_it(tmp_path: Path) -> None:
    with write_lock(tmp_path / "cache", "geomcache extract"):
        found = lock_owner(tmp_path / "cache")
        assert found is not None
        assert (found.host, found.process) == (socket.gethostname(), os.getpid())
        for unlock in (False, True):  # a living writer on this machine is never pushed aside
            with (
                pytest.raises(CacheLocked, match=f"process {os.getpid()} on"),
                write_lock(tmp_path / "cache", "x", unlock=unlock),
            ):
                pass
    assert lock_owner(tmp_path / "cache") is None
    with write_lock(tmp_path / "cache", "geomcache extract"):
        pass


def test_a_lock_left_by_a_dead_process_of_this_machine_is_taken_over(tmp_path: Path) -> None:
    _leave_lock(tmp_path, socket.gethostname())
    with write_lock(tmp_path, "geomcache extract"):
        assert (found := lock_owner(tmp_path)) is not None
        assert found.process == os.getpid()


def test_another_machines_lock_needs_unlock(tmp_path: Path) -> None:
    _leave_lock(tmp_path, "node7")
    with pytest.raises(CacheLocked, match="--unlock"), write_lock(tmp_path, "geomcache extract"):
        pass
    assert (tmp_path / LOCK_NAME).exists()
    with write_lock(tmp_path, "geomcache extract", unlock=True):
        pass
    assert not (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}'])
def test_a_lock_that_says_nothing_is_one_whose_writer_died_at_once(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    with write_lock(tmp_path, "geomcache extract"):
        assert lock_owner(tmp_path) is not None
