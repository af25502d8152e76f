"""Files of a cache on this machine: read in place by ``preadv``, from any number of threads, also after a fork.

Descriptors stay open, for all caches of the process together up to half of what it may have. The same few methods as
``pipeline/store/objects.py``, so that a reader need not know where the bytes lie.
"""

import errno
import itertools
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from geomcache.cache_schemas.base import open_regular, read_limited
from geomcache.cache_schemas.errors import CacheDamaged
from geomcache.pipeline.files import allow_many_open_files
from geomcache.pipeline.store.shard_file import REDO

_MOST_BYTES, _MOST_BUFFERS = 8 << 20, 1024  # of one system call
_FEWEST = 4  # descriptors that are kept open
_owners = itertools.count()


class LocalFiles:
    """Bytes under a folder, read only."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)
        self._owner = next(_owners)
        weakref.finalize(self, _open_files.close, self._owner)

    def read(self, path: str) -> bytes:
        """A whole small file.

        Raises:
            FileNotFoundError: there is none.
            CacheDamaged: it is far too large to be one of ours, or no file at all.
        """
        return read_limited(f"{self.location}/{path}", CacheDamaged)

    def read_many(self, paths: Sequence[str]) -> list[bytes | CacheDamaged | None]:
        """Small files: None where there is none, what is wrong where ``read`` would raise it."""
        found: list[bytes | CacheDamaged | None] = []
        for path in paths:
            try:
                found.append(self.read(path))
            except FileNotFoundError:
                found.append(None)
            except CacheDamaged as problem:
                found.append(problem)
        return found

    def tail(self, path: str, length: int) -> tuple[bytes, int]:
        """The last ``length`` bytes (fewer in a shorter file) and the file's size; raises ``FileNotFoundError``."""
        entry = _open_files.acquire(self._owner, f"{self.location}/{path}")
        try:
            size = os.fstat(entry.handle).st_size
            return os.pread(entry.handle, length, max(0, size - length)), size
        finally:
            _open_files.release(entry)

    def read_ranges(self, path: str, offsets: Sequence[int], out: Sequence[memoryview]) -> None:
        """Fill each buffer from its offset; neighbours that touch are read by one call.

        Raises:
            CacheDamaged: the file is missing or ends too early.
        """
        where = f"{self.location}/{path}"
        try:
            entry = _open_files.acquire(self._owner, where)
        except FileNotFoundError as problem:
            raise CacheDamaged(
                f"{where} is missing", expected="a committed shard", found="no file", fix=REDO
            ) from problem
        try:
            for start, stop in _touching(offsets, out):
                wanted = sum(len(part) for part in out[start:stop])
                got = os.preadv(entry.handle, out[start:stop], offsets[start])
                if got != wanted:  # a short read would leave another row's bytes in a reused buffer
                    raise CacheDamaged(
                        f"{where} ends too early",
                        expected=f"{wanted} bytes at {offsets[start]}",
                        found=f"{got}",
                        fix=REDO,
                    )
        finally:
            _open_files.release(entry)

    def close(self) -> None:
        """Close every file, those that another thread is reading as soon as it has finished."""
        _open_files.close(self._owner)


@dataclass
class _Open:
    handle: int
    users: int = 0
    doomed: bool = False  # closed by the last user


class _OpenFiles:
    """Descriptors of all caches of this process, the least recently used one closed first, none while it is read."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may come while the same thread holds it
        self._open: OrderedDict[tuple[int, str], _Open] = OrderedDict()
        self._most = 0

    def renew(self) -> None:
        """After a fork: no other thread is in the child, and a lock that one held would never be released."""
        self._lock = threading.RLock()
        for entry in self._open.values():
            entry.users = 0

    def acquire(self, owner: int, path: str) -> _Open:
        """A descriptor that stays open until it is released."""
        key = owner, path
        with self._lock:
            entry = self._open.get(key)
            if entry is None:
                entry = self._open[key] = self._new(path)
            else:
                self._open.move_to_end(key)
            entry.users += 1
            return entry

    def release(self, entry: _Open) -> None:
        """End of an ``acquire``."""
        with self._lock:
            entry.users -= 1
            if entry.doomed and entry.users <= 0:
                os.close(entry.handle)

    def close(self, owner: int) -> None:
        """Close an owner's files."""
        with self._lock:
            for key in [key for key in list(self._open) if key[0] == owner]:
                self._drop(key)

    def _new(self, path: str) -> _Open:
        self._make_room()
        try:
            return _Open(open_regular(path, CacheDamaged))
        except OSError as problem:
            if problem.errno != errno.EMFILE:
                raise
        self._most = max(_FEWEST, len(self._open) // 2)  # others in this process need descriptors too
        self._make_room()
        return _Open(open_regular(path, CacheDamaged))

    def _make_room(self) -> None:
        if not self._most:
            allow_many_open_files()
            self._most = max(_FEWEST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        if len(self._open) < self._most:
            return
        idle = (key for key, entry in list(self._open.items()) if not entry.users)
        while len(self._open) >= self._most and (key := next(idle, None)) is not None:
            self._drop(key)

    def _drop(self, key: tuple[int, str]) -> None:
        entry = self._open.pop(key, None)
        if entry is None:
            return
        if entry.users:
            entry.doomed = True
        else:
            os.close(entry.handle)


_open_files = _OpenFiles()
os.register_at_fork(after_in_child=_open_files.renew)


def _touching(offsets: Sequence[int], out: Sequence[memoryview]) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs that one system call can read."""
    start, count = 0, len(offsets)
    while start < count:
        stop, end, total = start + 1, offsets[start] + len(out[start]), len(out[start])
        while (
            stop < count
            and offsets[stop] == end
            and stop - start < _MOST_BUFFERS
            and (total + len(out[stop]) <= _MOST_BYTES)
        ):
            end += len(out[stop])
            total += len(out[stop])
            stop += 1
        yield start, stop
        start = stop
