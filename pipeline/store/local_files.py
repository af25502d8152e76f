"""Files of a cache on this machine: read in place by ``preadv``, from any number of threads, also after a fork.

Descriptors stay open, as many as the process may have; the same few methods as ``pipeline/store/objects.py``, so that a
reader need not know where the bytes lie.
"""

import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

from geomcache.cache_schemas.errors import CacheDamaged
from geomcache.pipeline.files import allow_many_open_files
from geomcache.pipeline.store.shard_file import REDO

_MOST_BYTES, _MOST_BUFFERS = 8 << 20, 1024  # of one system call: what was read is still in the CPU's cache when checked


class LocalFiles:
    """Bytes under a folder, read only."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)
        allow_many_open_files()
        self._keep = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._open: OrderedDict[str, int] = OrderedDict()
        self._reading = 0
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=_Renew(self))

    def read(self, path: str) -> bytes:
        """A whole small file; raises ``FileNotFoundError``."""
        handle = os.open(f"{self.location}/{path}", os.O_RDONLY)
        try:
            size = os.fstat(handle).st_size
            return os.pread(handle, size, 0)
        finally:
            os.close(handle)

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Small files; None where there is none."""
        found: list[bytes | None] = []
        for path in paths:
            try:
                found.append(self.read(path))
            except FileNotFoundError:
                found.append(None)
        return found

    def tail(self, path: str, length: int) -> tuple[bytes, int]:
        """The last ``length`` bytes (fewer in a shorter file) and the file's size; raises ``FileNotFoundError``."""
        handle = self._acquire(path)
        try:
            size = os.fstat(handle).st_size
            return os.pread(handle, length, max(0, size - length)), size
        finally:
            self._release()

    def read_ranges(self, path: str, offsets: Sequence[int], out: Sequence[memoryview]) -> None:
        """Fill each buffer from its offset; neighbours that touch are read by one call.

        Raises:
            CacheDamaged: the file is missing or ends too early.
        """
        try:
            handle = self._acquire(path)
        except FileNotFoundError as problem:
            raise CacheDamaged(
                f"{self.location}/{path} is missing", expected="a committed shard", found="no file", fix=REDO
            ) from problem
        try:
            for start, stop in _touching(offsets, out):
                wanted = sum(len(part) for part in out[start:stop])
                got = os.preadv(handle, out[start:stop], offsets[start])
                if got != wanted:  # a short read would leave another row's bytes in a reused buffer
                    raise CacheDamaged(
                        f"{self.location}/{path} ends too early",
                        expected=f"{wanted} bytes at {offsets[start]}",
                        found=f"{got}",
                        fix=REDO,
                    )
        finally:
            self._release()

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _acquire(self, path: str) -> int:
        """A descriptor, open until ``_release``: nothing is closed while any thread reads."""
        with self._lock:
            handle = self._open.get(path)
            if handle is None:
                if not self._reading:
                    while len(self._open) >= self._keep:
                        os.close(self._open.popitem(last=False)[1])
                handle = self._open[path] = os.open(f"{self.location}/{path}", os.O_RDONLY)
            else:
                self._open.move_to_end(path)
            self._reading += 1
            return handle

    def _release(self) -> None:
        with self._lock:
            self._reading -= 1


class _Renew:
    """After a fork: a lock held by a thread that is not in the child would never be released."""

    def __init__(self, files: LocalFiles) -> None:
        self._files = weakref.ref(files)

    def __call__(self) -> None:
        files = self._files()
        if files is not None:
            files._lock, files._reading = threading.Lock(), 0


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
