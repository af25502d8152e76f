"""How fast this cache is on this machine, beside bare ``preadv`` calls at the same places, and what that means.

Non-obvious:
- Cold means: not in this machine's page cache. The rows about to be read, and no others, are dropped from it by
  ``posix_fadvise``; ``mincore`` then says whether they are gone. They stay where a file system lives in memory, where
  another process maps them, and ``mincore`` calls everything present to a user who may not write the file.
- What a host or a storage server keeps in its own memory counts as disk here.
- Everything is read into memory that was touched before: fresh memory costs several times the read.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.pipeline.store.local_files import LocalFiles
from geomcache.pipeline.store.reader import READ_THREADS, CachedTokens, open_files
from geomcache.pipeline.store.rows import ShardIndex, load_index, row_bytes

MOST_BYTES = 2 << 30
MOST_ROUNDS = 9
_FOLIO = 2 << 20  # Linux drops only whole folios, which are aligned and at most this large
_COLD_SHARE = 0.1  # of the pages that may still be there

Access = Literal["sequential", "single rows", "batches"]
State = Literal["warm", "cold"]
RawJob = tuple[int, memoryview, int]  # file descriptor, room, offset


class Measured(Schema):
    """Rows per second; medians over the rounds."""

    access: Access
    state: State
    raw: float | None  # bare preadv; None for a cache behind a URL
    unchecked: float
    checked: float


class BenchResult(Schema):
    """What ``bench_cache`` measured."""

    cache: str
    rows: int
    row_bytes: float  # as stored; a mean where rows are compressed
    batch: int  # rows; also of a sequential piece
    threads: int
    rounds: int
    rows_read: int
    seconds: float
    cold_remark: str | None  # why there is no cold figure
    measured: tuple[Measured, ...]

    def findings(self) -> list[str]:
        """What it means, one sentence each."""
        batches, in_order, single = (
            {one.state: one for one in self.measured if one.access == access}
            for access in ("batches", "sequential", "single rows")
        )
        shown = [
            f"{self._speed(one.checked)} {state} = {one.checked / self.batch:.3g} steps/s{_of_bare(one)}"
            for state, one in batches.items()
        ]
        lines = [f"{self.batch}-row random batches: {'; '.join(shown)}"]
        shown = [f"{self._speed(one.checked)} {state}{_of_bare(one)}" for state, one in in_order.items()]
        lines.append(f"in order: {'; '.join(shown)}")
        shown = [f"{1e3 / one.checked:.3g} ms {state}" for state, one in single.items()]
        lines.append(f"a single row: {'; '.join(shown)}")
        lines.append(f"without checksums: warm batches at {self._speed(batches['warm'].unchecked)}")
        state: State = "cold" if "cold" in in_order else "warm"
        whole = self.rows / in_order[state].checked
        lines.append(
            f"one pass over the whole cache, {self.rows * self.row_bytes / 1e9:.3g} GB: "
            f"{f'{whole / 60:.3g} min' if whole > 120 else f'{whole:.3g} s'} {state}"
        )
        return lines + ([self.cold_remark] if self.cold_remark else [])

    def _speed(self, rows_per_second: float) -> str:
        return f"{rows_per_second * self.row_bytes / 1e9:.3g} GB/s"


def _of_bare(one: Measured) -> str:
    return "" if one.raw is None else f" ({one.checked / one.raw:.2f} of bare preadv)"


class RawRows:
    """The stored bytes of a local cache's rows by bare ``preadv``: the limit that this machine sets."""

    def __init__(self, cache: CachedTokens, files: LocalFiles) -> None:
        self._cache, self._files = cache, files
        self._indices: dict[tuple[str, int], ShardIndex] = {}
        self._handles: dict[str, int] = {}
        self._buffer: NDArray[Any] = np.zeros(0, np.uint8)

    def places(self, rows: Sequence[int]) -> list[tuple[int, int, int]]:
        """(file descriptor, offset, bytes) of every stored row of every array."""
        manifest, found = self._cache.manifest, []
        for name, array in manifest.arrays.items():
            for row in rows:
                shard, slot = divmod(int(row), manifest.rows_per_shard)
                if (name, shard) not in self._indices:
                    index = load_index(self._files, manifest, self._cache.commits[shard], name, array)
                    self._indices[name, shard] = index
                    self._handles[index.path] = os.open(f"{self._files.location}/{index.path}", os.O_RDONLY)
                index = self._indices[name, shard]
                found.append((self._handles[index.path], int(index.offsets[slot]), int(index.payloads[slot])))
        return found

    def jobs(self, places: Sequence[tuple[int, int, int]]) -> list[RawJob]:
        """Arguments of ``preadv`` for each place, with room in one buffer that is used again."""
        total = sum(length for _, _, length in places)
        if len(self._buffer) < total:
            self._buffer = np.ones(total, np.uint8)
        view, start = self._buffer.data, 0
        jobs: list[RawJob] = []
        for handle, offset, length in places:
            jobs.append((handle, view[start : start + length], offset))
            start += length
        return jobs

    def close(self) -> None:
        """Close every file."""
        while self._handles:
            os.close(self._handles.popitem()[1])


def read_raw(jobs: Sequence[RawJob], pool: ThreadPoolExecutor | None = None, parts: int = 1) -> None:
    """Run the jobs, in ``parts`` pieces side by side."""

    def run(piece: Sequence[RawJob]) -> None:
        for handle, view, offset in piece:
            os.preadv(handle, [view], offset)

    if pool is None:
        run(jobs)
    else:
        bounds = [len(jobs) * part // parts for part in range(parts + 1)]
        list(pool.map(run, [jobs[bounds[part] : bounds[part + 1]] for part in range(parts)]))


def evict(handle: int, offset: int = 0, length: int = 0) -> None:
    """Drop a file's pages (length 0: all to the end) from the page cache; neighbours up to 2 MiB away go too."""
    start = offset // _FOLIO * _FOLIO
    stop = -(-(offset + length) // _FOLIO) * _FOLIO
    os.posix_fadvise(handle, start, stop - start if length else 0, os.POSIX_FADV_DONTNEED)


def resident_share(handle: int, offset: int, length: int) -> float:
    """Which share of a file's bytes lies in the page cache, by ``mincore``; 1.0 also where that may not be asked."""
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    size = offset + length - start
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with mmap.mmap(handle, size, prot=mmap.PROT_READ, offset=start) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), pages)
        del view  # it holds the map
    return 1.0 if failed else sum(page & 1 for page in pages) / len(pages)


def stored_row_bytes(cache: CachedTokens) -> float:
    """Bytes of a stored row; the mean where rows are compressed."""
    total = 0.0
    for name, array in cache.manifest.arrays.items():
        compressed = sum(commit.sizes[name] for commit in cache.commits.values()) / max(1, len(cache))
        total += row_bytes(array) if array.compression is None else compressed
    return total


def bench_cache(
    location: Path | str,
    *,
    batch: int = 64,
    rows: int | None = None,
    seconds: float = 10.0,
    progress: Callable[[int, int], None],
) -> BenchResult:
    """Measure; nothing is written, and no more than ``rows`` rows are read (None: 2 GiB of them).

    Args:
        location: folder, or URL (then there is no cold and no bare reading).
        batch: rows of a random batch; fewer where the bound or the cache is smaller.
        rows: bound of all rows read, by every way of reading together.
        seconds: no round begins later; there is always one.
        progress: called with (rows read, bound).

    Raises:
        CacheMissing, CacheIncomplete, CacheDamaged, CacheStale, SchemaTooNew: by name, as reading does.
    """
    with CachedTokens(location) as checked, CachedTokens(location, check="never") as unchecked:
        return _Bench(checked, unchecked, batch, rows, seconds).run(progress)


class _Bench:
    """One run: rounds over all ways of reading, in turn, so that a busy moment meets all of them."""

    def __init__(
        self, checked: CachedTokens, unchecked: CachedTokens, batch: int, rows: int | None, seconds: float
    ) -> None:
        self._row_bytes = stored_row_bytes(checked)
        files = open_files(checked.location)
        self._raw = RawRows(checked, files) if isinstance(files, LocalFiles) else None
        self._cold = self._raw is not None
        self._cold_remark = (
            None if self._cold else "behind a URL every read crosses the network; caches there are not known"
        )
        self._readers = {"checked": checked, "unchecked": unchecked}
        self._ways = ["checked", "unchecked", *(["raw"] if self._raw else [])]
        self._bound = rows or max(1, int(MOST_BYTES / self._row_bytes))
        reads = len(self._ways) * 2  # cold and warm, or once to fill the cache
        self._batch = max(1, min(batch, len(checked), int(self._bound / reads / 2.25)))
        self._singles = max(1, self._batch // 4)
        self._round_rows = reads * (2 * self._batch + self._singles)
        self._seconds = seconds
        self._rows = len(checked)
        self._out = checked.buffers(self._batch)
        for array in self._out.values():
            array.fill(0)
        self._times: dict[tuple[Access, State, str], list[float]] = {}

    def run(self, progress: Callable[[int, int], None]) -> BenchResult:
        started, generator, rounds = time.perf_counter(), np.random.default_rng(0), 0
        with ThreadPoolExecutor(READ_THREADS) as self._pool:
            try:
                while rounds == 0 or (
                    rounds < MOST_ROUNDS
                    and (rounds + 1) * self._round_rows <= self._bound
                    and time.perf_counter() - started < self._seconds
                ):
                    first = int(generator.integers(0, self._rows - self._batch + 1))
                    self._round(rounds, "sequential", np.arange(first, first + self._batch))
                    self._round(rounds, "single rows", generator.choice(self._rows, self._singles, replace=False))
                    self._round(rounds, "batches", generator.choice(self._rows, self._batch, replace=False))
                    rounds += 1
                    progress(rounds * self._round_rows, self._bound)
            finally:
                if self._raw is not None:
                    self._raw.close()
        return BenchResult(
            cache=str(self._readers["checked"].location),
            rows=self._rows,
            row_bytes=self._row_bytes,
            batch=self._batch,
            threads=READ_THREADS,
            rounds=rounds,
            rows_read=rounds * self._round_rows,
            seconds=round(time.perf_counter() - started, 2),
            cold_remark=self._cold_remark,
            measured=self._measured(),
        )

    def _round(self, number: int, access: Access, rows: NDArray[np.int64]) -> None:
        turn = number % len(self._ways)
        ways = self._ways[turn:] + self._ways[:turn]  # nobody is always the first
        for way in ways:
            cold = self._evict(rows)
            spent = self._read(way, access, rows)
            if cold and self._cold:
                self._times.setdefault((access, "cold", way), []).append(len(rows) / spent)
        for way in ways:
            spent = self._read(way, access, rows)
            self._times.setdefault((access, "warm", way), []).append(len(rows) / spent)

    def _evict(self, rows: NDArray[np.int64]) -> bool:
        """Whether the rows were dropped from the page cache."""
        if self._raw is None or not self._cold:
            return False
        places = self._raw.places(rows.tolist())
        for place in places:
            evict(*place)
        self._cold = float(np.mean([resident_share(*place) for place in places])) <= _COLD_SHARE
        if not self._cold:
            self._times = {key: times for key, times in self._times.items() if key[1] == "warm"}
            self._cold_remark = (
                "cold reads are not measured: the rows stay in memory (a file system in memory, another process that "
                "maps them, or a file that belongs to another user)"
            )
        return self._cold

    def _read(self, way: str, access: Access, rows: NDArray[np.int64]) -> float:
        """Seconds of reading ``rows`` one way; what a caller would prepare anyway is not counted."""
        wanted, alone = rows.tolist(), access == "single rows"
        if way == "raw":
            assert self._raw is not None
            jobs = self._raw.jobs(self._raw.places(wanted))
            started = time.perf_counter()
            read_raw(jobs, None if alone else self._pool, READ_THREADS)
            return time.perf_counter() - started
        reader = self._readers[way]
        if not alone:
            started = time.perf_counter()
            reader.read_into(wanted, self._out)
            return time.perf_counter() - started
        out = {name: array[:1] for name, array in self._out.items()}
        started = time.perf_counter()
        for row in wanted:
            reader.read_into([row], out)
        return time.perf_counter() - started

    def _measured(self) -> tuple[Measured, ...]:
        def median(access: Access, state: State, way: str) -> float:
            return round(float(np.median(self._times[access, state, way])), 3)

        accesses: tuple[Access, ...] = ("sequential", "single rows", "batches")
        states: tuple[State, ...] = ("warm", "cold") if self._cold else ("warm",)
        return tuple(
            Measured(
                access=access,
                state=state,
                raw=median(access, state, "raw") if self._raw else None,
                unchecked=median(access, state, "unchecked"),
                checked=median(access, state, "checked"),
            )
            for access in accesses
            for state in states
        )
