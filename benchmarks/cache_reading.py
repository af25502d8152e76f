"""``benchmarks/cache.py``: rows read warm, cold and in order, beside bare reads and beside zarr-python."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from cache_common import PIECE, ROW, Rows, batch_lists, evict_files, gigabytes, over, seconds, take_turns
from numpy.typing import NDArray

from geomcache.pipeline.store.bench import RawRows, read_raw
from geomcache.pipeline.store.local_files import LocalFiles
from geomcache.pipeline.store.reader import READ_THREADS, CachedTokens

Timed = Callable[[Rows], float]
_WORTH_MEASURING = 3.0  # ways of zarr-python that take longer than this many times the fastest are left out


class _Reads:
    """Ways to read batches out of one cache, each a function of the rows that gives its seconds."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.files = [path for path in sorted((folder / "tokens" / "c").rglob("0")) if path.is_file()]
        self.out = {"tokens": np.ones((batch, *ROW), np.uint16)}
        self.readers = {
            (check, threads): CachedTokens(folder, check=check, threads=threads)
            for check in ("every", "never")
            for threads in (1, READ_THREADS)
        }
        self._raw = RawRows(self.readers["every", 1], LocalFiles(folder))
        self._pool = ThreadPoolExecutor(READ_THREADS)

    def ours(self, check: str, threads: int = READ_THREADS, *, cold: bool = False) -> Timed:
        reader = self.readers[check, threads]

        def read(rows: Rows) -> float:
            evict_files(self.files if cold else [])
            wanted = rows.tolist()
            return seconds(lambda: reader.read_into(wanted, self.out))

        return read

    def bare(self, threads: int, *, cold: bool = False) -> Timed:
        def read(rows: Rows) -> float:
            evict_files(self.files if cold else [])
            jobs = self._raw.jobs(self._raw.places(rows.tolist()))
            return seconds(lambda: read_raw(jobs, self._pool if threads > 1 else None, threads))

        return read

    def our_pass(self, rows: int, *, cold: bool) -> Timed:
        reader, batch = self.readers["every", READ_THREADS], len(self.out["tokens"])

        def read() -> None:
            for start in range(0, rows, batch):
                reader.read_into(range(start, start + batch), self.out)

        return self._whole(read, cold)

    def bare_pass(self, *, cold: bool) -> Timed:
        piece = np.ones(PIECE, np.uint8).data

        def read() -> None:
            for path in self.files:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(piece):
                        pass

        return self._whole(read, cold)

    def _whole(self, read: Callable[[], None], cold: bool) -> Timed:
        def timed(_: Rows) -> float:
            evict_files(self.files if cold else [])
            return seconds(read)

        return timed

    def close(self) -> None:
        self._raw.close()
        self._pool.shutdown()
        for reader in self.readers.values():
            reader.close()


def measure_reading(folder: Path, rows: int, rounds: int, batch: int) -> dict[str, float | str]:
    """Figures of random batches and of passes; ``rows`` is a multiple of ``batch``."""
    reads, lists = _Reads(folder, batch), batch_lists(rows, rounds, batch)
    zarr = zarr_ways(folder, reads.out["tokens"])
    few = lists[0][:8]
    tried = {name: min(way(few) for _ in range(3)) for name, way in zarr.items()}
    worth = [name for name in zarr if tried[name] < _WORTH_MEASURING * min(tried.values())]
    ours = {"on": reads.ours("every", 1), "on 8": reads.ours("every")}
    bare = {"raw": reads.bare(1), "raw 8": reads.bare(READ_THREADS)}
    unchecked = {"never": reads.ours("never", 1), "never 8": reads.ours("never")}
    theirs = {name: zarr[name] for name in ("loop", *worth)}
    take_turns(ours | bare | unchecked | theirs, lists[:1])  # brings everything into memory
    fast = take_turns(ours | bare | unchecked, lists * 3)  # a few milliseconds each: more of them
    warm = take_turns(ours | theirs, lists)
    best = min(worth, key=lambda name: float(np.median(warm[name])))
    assert np.array_equal(reads.out["tokens"][:, 0, 0, 0], lists[-1].astype(np.uint16))
    cold_ways = {
        "raw": reads.bare(READ_THREADS, cold=True),
        "on": reads.ours("every", cold=True),
        "never": reads.ours("never", cold=True),
    }
    cold = take_turns(cold_ways, lists)
    some = lists[: max(3, rounds // 3)]
    cold_pass = take_turns({"raw": reads.bare_pass(cold=True), "ours": reads.our_pass(rows, cold=True)}, some)
    warm_pass = take_turns({"raw": reads.bare_pass(cold=False), "ours": reads.our_pass(rows, cold=False)}, some)
    reads.close()
    return {
        "warm_over_preadv": over(fast, "never", "raw"),
        "warm_checked_over_preadv": over(fast, "on", "raw"),
        "warm_8_threads_over_preadv": over(fast, "never 8", "raw 8"),
        "warm_8_threads_checked_over_preadv": over(fast, "on 8", "raw 8"),
        "warm_over_zarr_python": over(warm, "on 8", "loop"),
        "warm_over_zarr_python_best": over(warm, "on 8", best),
        "warm_1_thread_over_zarr_python": over(warm, "on", "loop"),
        "warm_1_thread_over_zarr_python_best": over(warm, "on", best),
        "zarr_python_best": best,
        "cold_over_pread": over(cold, "on", "raw"),
        "cold_unchecked_over_pread": over(cold, "never", "raw"),
        "sequential_over_raw": over(cold_pass, "ours", "raw"),
        "sequential_warm_over_raw": over(warm_pass, "ours", "raw"),
        "preadv_gb_s": gigabytes(fast["raw"], batch),
        "warm_checked_gb_s": gigabytes(fast["on 8"], batch),
        "cold_pread_gb_s": gigabytes(cold["raw"], batch),
        "cold_raw_sequential_gb_s": gigabytes(cold_pass["raw"], rows),
    }


def zarr_ways(folder: Path, out: NDArray[np.uint16]) -> dict[str, Timed]:
    """Ways of zarr-python to get rows into ``out``."""
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    array: Any = zarr.open_array(str(folder / "tokens"), mode="r")
    buffer, pool = default_buffer_prototype().nd_buffer, ThreadPoolExecutor(READ_THREADS)

    def one(place: int, row: int) -> None:
        into = buffer.from_numpy_array(out[place : place + 1])
        array.get_basic_selection(slice(row, row + 1), out=into)

    def loop(rows: Rows) -> None:
        for place, row in enumerate(rows.tolist()):
            out[place] = array[row]

    def loop_out(rows: Rows) -> None:
        for place, row in enumerate(rows.tolist()):
            one(place, row)

    def threads_out(rows: Rows) -> None:
        list(pool.map(one, range(len(rows)), rows.tolist()))

    def gather(rows: Rows) -> None:
        async def every() -> list[Any]:
            return await asyncio.gather(*(array.async_array.getitem(row) for row in rows.tolist()))

        for place, value in enumerate(sync(every())):
            out[place] = value

    def oindex(rows: Rows) -> None:
        out[: len(rows)] = array.oindex[rows]

    def orthogonal_out(rows: Rows) -> None:
        array.get_orthogonal_selection((rows,), out=buffer.from_numpy_array(out[: len(rows)]))

    ways = (loop, loop_out, threads_out, gather, oindex, orthogonal_out)
    return {way.__name__: _timed(way) for way in ways}


def _timed(read: Callable[[Rows], None]) -> Timed:
    return lambda rows: seconds(lambda: read(rows))
