"""Other storage engines as a feeder of 64-row batches: one class each, in the best way known to run it on one machine.

An engine is written once from an array of rows, then asked for batches. How a batch is made ("way"):

  reused   read into buffers that are used again, in the calling thread or by the engine's own threads
  threads  the same, by 8 threads that share the batch
  workers  torch DataLoader, 2 worker processes, rows read straight into the shared memory that the batch travels in

Non-obvious (each was measured, see the table's remarks):
- LMDB needs its readahead for cold reads. Lance: as large_binary with blob encoding, 5-8 times faster than a fixed-size
  list. tensorstore: results written into our array, index kept in a cache pool. zarr-python 3.1: rows one by one with
  ``out``; ``oindex`` on shards reads whole shards.
- tensorstore and Lance do not survive a fork, so their workers are spawned.
- Files that a process maps cannot be evicted from the page cache: engines are closed before a cold round.
"""

import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from geomcache.pipeline.store.reader import CachedTokens

Way = Literal["reused", "threads", "workers"]
Rows = NDArray[np.uint16]  # [N, V, G, D], bits of bfloat16
THREADS, WORKERS = 8, 2


class Engine:
    """Base of all engines: the three ways to make batches out of ``read``."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()  # what must be installed
    ways: ClassVar[tuple[Way, ...]]
    checks: ClassVar[tuple[bool, ...]] = (False,)  # whether it can verify what it reads, or can leave it
    verifies: ClassVar[str] = "nothing"  # what a checked read is checked against
    how: ClassVar[str] = ""  # configuration, in words
    start_method: ClassVar[str] = "fork"
    own_files: ClassVar[bool] = True  # False: it reads the shards that geomcache wrote

    def __init__(self, folder: Path, row_shape: Sequence[int], way: Way, checked: bool) -> None:
        self.folder, self.row_shape, self.way, self.checked = folder, tuple(row_shape), way, checked
        self._buffers: list[Rows] = []
        self._pool: ThreadPoolExecutor | None = None
        self._loader: DataLoader[torch.Tensor] | None = None
        self._lists = _Lists()

    @classmethod
    def missing(cls) -> list[str]:
        """Packages that are not installed."""
        return [name for name in cls.packages if importlib.util.find_spec(name) is None]

    def write(self, rows: Rows) -> None:
        """Store all rows."""
        raise NotImplementedError

    def open(self) -> None:
        """Get ready to read in this process."""
        raise NotImplementedError

    def read(self, rows: NDArray[np.int64], out: Rows) -> None:
        """Fill ``out`` with ``rows``."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of every file."""

    def start(self) -> None:
        """Open, start threads or processes, so that nothing of it is in a timing."""
        if self.way == "workers":
            self._loader = DataLoader(
                _Reading(self),
                sampler=self._lists,
                batch_size=None,
                num_workers=WORKERS,
                persistent_workers=True,
                multiprocessing_context=self.start_method,
            )
            for _ in self.batches([np.zeros(0, np.int64)] * 2 * WORKERS):
                pass
            return
        self.open()
        self._pool = ThreadPoolExecutor(THREADS) if self.way == "threads" else None

    def stop(self) -> None:
        """Undo ``start``; the buffers stay."""
        if self._loader is not None:
            self._loader = None  # its processes end and let go of their files
            return
        if self._pool is not None:
            self._pool.shutdown()
        self.close()

    def batches(self, row_lists: Sequence[NDArray[np.int64]]) -> Iterator[Rows]:
        """One array [B, V, G, D] for each list; valid until the next but one is asked for."""
        if self._loader is not None:
            self._lists.lists = list(row_lists)
            for batch in self._loader:
                yield batch.numpy()
            return
        for number, rows in enumerate(row_lists):
            if len(self._buffers) < 2 or len(self._buffers[0]) < len(rows):
                self._buffers = [np.zeros((len(rows), *self.row_shape), np.uint16) for _ in range(2)]
            out = self._buffers[number % 2][: len(rows)]
            if self._pool is None:
                self.read(rows, out)
            else:
                parts = [part for part in np.array_split(np.arange(len(rows)), THREADS) if len(part)]
                slices = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
                list(self._pool.map(lambda part, r=rows, o=out: self.read(r[part], o[part]), slices))
            yield out


class _Lists:
    """A sampler whose lists are changed between epochs, so that the workers live on."""

    def __init__(self) -> None:
        self.lists: list[NDArray[np.int64]] = []

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)


class _Reading(Dataset[torch.Tensor]):
    """Lists of rows -> batches in shared memory; opens its engine in the worker."""

    def __init__(self, engine: Engine) -> None:
        self._made = (type(engine), engine.folder, engine.row_shape, engine.checked)
        self._engine: Engine | None = None

    def __getitem__(self, rows: NDArray[np.int64]) -> torch.Tensor:
        if self._engine is None:
            torch.set_num_threads(1)
            cls, folder, row_shape, checked = self._made
            self._engine = cls(folder, row_shape, "reused", checked)
            self._engine.open()
        shape = (len(rows), *self._engine.row_shape)
        # As torch's own collate does it; a tensor of ordinary memory would be copied once more.
        storage: Any = torch.UntypedStorage._new_shared(max(1, int(np.prod(shape)) * 2), device="cpu")  # type: ignore[no-untyped-call]
        batch: torch.Tensor = torch.empty(0, dtype=torch.uint16)
        batch.set_(storage, 0, torch.Size(shape))  # type: ignore[call-overload]
        if len(rows):
            self._engine.read(rows, batch.numpy())
        return batch


class Geomcache(Engine):
    """This project's reader on this project's shards, which the caller has written."""

    name = "geomcache"
    own_files = False
    ways = ("reused", "workers")
    checks = (True, False)
    verifies = "crc32c of each row, against shard and commit record"
    how = "CachedTokens.read_into as it comes"

    def open(self) -> None:
        self._cache = CachedTokens(self.folder, check="every" if self.checked else "never")
        self._cache.load_indices()

    def read(self, rows: NDArray[np.int64], out: Rows) -> None:
        self._cache.read_into(rows.tolist(), {"tokens": out})

    def close(self) -> None:
        self._cache.close()


class Memmap(Engine):
    """One .npy file."""

    name = "numpy memmap"
    ways = ("workers", "threads", "reused")
    how = ".npy, np.load(mmap_mode='r')"

    def write(self, rows: Rows) -> None:
        np.save(self.folder / "rows.npy", rows)

    def open(self) -> None:
        self._rows = np.load(self.folder / "rows.npy", mmap_mode="r")

    def read(self, rows: NDArray[np.int64], out: Rows) -> None:
        for place, row in enumerate(rows.tolist()):
            np.copyto(out[place], self._rows[row])

    def close(self) -> None:
        del self._rows


class Lmdb(Engine):
    """One value a row."""

    name = "LMDB"
    packages = ("lmdb",)
    ways = ("threads", "reused", "workers")
    how = "readahead on, zero-copy values"

    def write(self, rows: Rows) -> None:
        import lmdb  # type: ignore[import-not-found,unused-ignore]

        with lmdb.open(str(self.folder), map_size=2 * rows.nbytes + (64 << 20)) as store:
            for start in range(0, len(rows), 64):
                with store.begin(write=True) as transaction:
                    for row in range(start, min(start + 64, len(rows))):
                        transaction.put(row.to_bytes(8, "big"), memoryview(rows[row]).cast("B"))

    def open(self) -> None:
        import lmdb

        self._store = lmdb.open(str(self.folder), readonly=True, lock=False, readahead=True, max_readers=64)

    def read(self, rows: NDArray[np.int64], out: Rows) -> None:
        with self._store.begin(buffers=True) as transaction:
            for place, row in enumerate(rows.tolist()):
                stored: Any = np.frombuffer(transaction.get(row.to_bytes(8, "big")), np.uint16)  # type: ignore[arg-type,unused-ignore]
                np.copyto(out[place], stored.reshape(self.row_shape))
                del stored  # it points into the map

    def close(self) -> None:
        self._store.close()


class Hdf5(Engine):
    """Contiguous, or one chunk a row with HDF5's own checksum."""

    name = "HDF5"
    packages = ("h5py",)
    ways = ("reused", "workers")  # h5py lets one thread in at a time
    checks = (True, False)
    verifies = "fletcher32 of each row"
    how = "read_direct; contiguous (unchecked), chunk = row (checked)"

    def write(self, rows: Rows) -> None:
        import h5py

        layout: dict[str, Any] = {"chunks": (1, *self.row_shape), "fletcher32": True} if self.checked else {}
        with h5py.File(self.folder / "rows.hdf5", "w") as file:
            file.create_dataset("rows", data=rows, **layout)

    def open(self) -> None:
        import h5py

        self._file = h5py.File(self.folder / "rows.hdf5", "r", rdcc_nbytes=0)
        self._rows = self._file["rows"]

    def read(self, rows: NDArray[np.int64], out: Rows) -> None:
        for place, row in enumerate(rows.tolist()):
            self._rows.read_direct(out, np.s_[row], np.s_[place])

    def close(self) -> None:
        self._file.close()


class Tensorstore(Engine):
    """tensorstore on geomcache's own shards."""

    name = "tensorstore"
    packages = ("tensorstore",)
    own_files = False
    ways = ("reused", "workers")
    checks = (True,)
    verifies = "crc32c of each row"
    how = "geomcache's shards; writes into our array; cache pool for the index"
    start_method = "spawn"

    def open(self) -> None:
        import tensorstore

        path = str((self.folder / "tokens").absolute())
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 24}})
        self._module, self._rows = tensorstore, tensorstore.open(spec, open=True, context=context).result()

    def read(self, rows: NDArray[np.int64], out: Rows) -> None:
        self._module.array(out, copy=False).write(self._rows[rows]).result()

    def close(self) -> None:
        del self._rows


class ZarrPython(Engine):
    """zarr-python on geomcache's own shards."""

    name = "zarr-python"
    packages = ("zarr",)
    own_files = False
    ways = ("reused", "workers")
    checks = (True,)
    verifies = "crc32c of each row"
    how = "geomcache's shards; row by row with out="

    def open(self) -> None:
        import zarr
        from zarr.core.buffer import default_buffer_prototype

        self._rows: Any = zarr.open_array(str(self.folder / "tokens"), mode="r")
        self._buffer = default_buffer_prototype().nd_buffer

    def read(self, rows: NDArray[np.int64], out: Rows) -> None:
        for place, row in enumerate(rows.tolist()):
            into = self._buffer.from_numpy_array(out[place : place + 1])
            self._rows.get_basic_selection(slice(row, row + 1), out=into)


class Lance(Engine):
    """One blob a row."""

    name = "Lance"
    packages = ("lance",)
    ways = ("threads", "reused", "workers")
    how = "large_binary, blob encoding, take_blobs + readinto"
    start_method = "spawn"

    def write(self, rows: Rows) -> None:
        import lance
        import pyarrow as pa

        schema = pa.schema([pa.field("row", pa.large_binary(), metadata={"lance-encoding:blob": "true"})])
        pieces = (
            pa.record_batch([pa.array([row.tobytes() for row in rows[start : start + 64]], pa.large_binary())], schema)
            for start in range(0, len(rows), 64)
        )
        lance.write_dataset(pieces, str(self.folder / "rows.lance"), schema=schema)

    def open(self) -> None:
        import lance

        self._rows = lance.dataset(str(self.folder / "rows.lance"))

    def read(self, rows: NDArray[np.int64], out: Rows) -> None:
        blobs: list[Any] = self._rows.take_blobs("row", indices=rows.tolist())
        for place, blob in enumerate(blobs):
            with blob:
                blob.readinto(out[place].reshape(-1).view(np.uint8))

    def close(self) -> None:
        del self._rows


class Litdata(Engine):
    """64 MB chunks of flat rows."""

    name = "litdata"
    packages = ("litdata",)
    ways = ("workers", "reused")
    how = "StreamingDataset[row], 64 MB chunks on the local disk"

    def write(self, rows: Rows) -> None:
        from litdata.streaming import Cache  # type: ignore[import-not-found,unused-ignore]

        cache = Cache(str(self.folder), chunk_bytes=64 << 20)
        for number in range(len(rows)):
            cache[number] = torch.from_numpy(rows[number].reshape(-1).view(np.int16))
        cache.done()
        cache.merge()

    def open(self) -> None:
        from litdata import StreamingDataset  # type: ignore[import-not-found,unused-ignore]

        self._rows = StreamingDataset(str(self.folder))

    def read(self, rows: NDArray[np.int64], out: Rows) -> None:
        for place, row in enumerate(rows.tolist()):
            np.copyto(out[place], self._rows[row].numpy().view(np.uint16).reshape(self.row_shape))

    def close(self) -> None:
        del self._rows


ENGINES: tuple[type[Engine], ...] = (Geomcache, Memmap, Lmdb, Hdf5, Tensorstore, ZarrPython, Lance, Litdata)


def epoch_seconds(engine: Engine, row_lists: Sequence[NDArray[np.int64]], source: Path | None = None) -> float:
    """Time of all batches. Each row's first value is its number, and is looked at; with ``source`` every value is."""
    expected = None if source is None else np.load(source, mmap_mode="r")
    started = time.perf_counter()
    for rows, batch in zip(row_lists, engine.batches(row_lists), strict=True):
        assert np.array_equal(batch[:, 0, 0, 0], rows.astype(np.uint16)), f"{engine.name} gives other rows"
        if expected is not None:
            assert np.array_equal(batch, expected[rows]), f"{engine.name} gives other values"
    return time.perf_counter() - started
