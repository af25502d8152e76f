"""One writer a cache: a lock file that names its owner, so that a second run is refused by name and not by luck.

Two locks in one: the file's content (host, process, since when) is what a person and other machines see; an flock on it
tells on the same machine whether the owner still lives. A lock whose owner died on this machine is taken over; one from
another machine needs ``--unlock``, because from here nobody can know.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import CacheLocked
from geomcache.pipeline.files import make_folder

LOCK_NAME = "writer.lock"


class LockOwner(Schema):
    """Who writes into a cache."""

    host: str
    process: int
    since: str  # UTC
    command: str  # what it runs

    @property
    def alive(self) -> bool | None:
        """Whether the process runs; None: it belongs to another machine."""
        return Path(f"/proc/{self.process}").exists() if self.host == socket.gethostname() else None

    def __str__(self) -> str:
        state = "" if self.alive is not False else "; it is dead, the same command continues"
        return f"process {self.process} on {self.host} since {self.since} ({self.command}){state}"


@contextmanager
def write_lock(folder: Path, command: str, *, unlock: bool = False) -> Iterator[None]:
    """Be the only writer of the cache at ``folder`` for the length of a block.

    Args:
        folder: made if it is missing.
        command: for the message that a second writer gets.
        unlock: take over the lock of another machine's run that is known to be dead.

    Raises:
        CacheLocked: another run is writing there; its owner is named.
    """
    make_folder(folder)
    path = folder / LOCK_NAME
    handle, alive = _take(path)
    try:
        owner = _read_owner(handle)
        if alive is None:  # a file system without locks: the name is all there is
            alive = owner is not None and owner.alive is True
        if alive or (owner is not None and owner.host != socket.gethostname() and not unlock):
            raise CacheLocked(
                f"another run is writing the cache {folder}",
                expected="one writer at a time",
                found="its lock" if owner is None else str(owner),
                fix="wait until it has finished, or stop it"
                if alive
                else "when that run is dead, give --unlock once; else wait, or choose another --out",
            )
        mine = LockOwner(
            host=socket.gethostname(),
            process=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            command=command,
        )
        os.ftruncate(handle, 0)
        os.pwrite(handle, mine.model_dump_json().encode() + b"\n", 0)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()) and _read_owner(handle) == mine:
                    path.unlink()  # and not one that --unlock has given to somebody else
    finally:
        os.close(handle)


def lock_owner(folder: Path) -> LockOwner | None:
    """Who holds (or left) the lock of a cache; None when there is none."""
    try:
        handle = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _read_owner(handle)
    finally:
        os.close(handle)


def _take(path: Path) -> tuple[int, bool | None]:
    """Open the lock file and lock it; says whether somebody else on this machine holds it, None: nobody can say."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
        except OSError as problem:
            if problem.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
                raise
            raise CacheLocked(
                f"{path} is no lock file", expected="a file or nothing", found="a folder, link or pipe", fix="remove it"
            ) from problem
        alive = _held_by_another(handle)
        try:
            if alive or os.path.samestat(os.fstat(handle), path.stat()):
                return handle, alive
        except FileNotFoundError:
            pass
        os.close(handle)  # its owner finished and removed it in between: what was locked is no longer the lock


def _held_by_another(handle: int) -> bool | None:
    """Lock the file; True when another process has done so, None where the file system cannot lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _read_owner(handle: int) -> LockOwner | None:
    try:
        return LockOwner.model_validate(json.loads(os.pread(handle, 4096, 0)))
    except (
        OSError,
        ValidationError,
        ValueError,
        RecursionError,
    ):  # empty: its writer died between making and naming it
        return None
