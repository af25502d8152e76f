"""Tokens of one micro-batch after another: read ahead by threads into reused buffers, decoded on the training device.

Why threads of the training process and not the loader's workers, which decode the images: a worker would hand every
megabyte over through shared memory, which costs more than reading it (docs/design.md has the measurement). The reads
release the interpreter; buffers are pinned where there is a GPU, so that copies to it run beside the computation.
"""

import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.stages.train.data import TrainingData

_DEPTH = 3  # batches: one in use, one ready, one being read
_WAIT_SECONDS = 0.2  # between looks at whether the consumer has gone


@dataclass
class _Slot:
    """One batch's buffers, used again and again."""

    tensors: dict[str, torch.Tensor]
    copied: "torch.cuda.Event | None" = None  # set when a copy to the GPU may still be reading them
    inverse: torch.Tensor | None = None  # puts rows back into the order asked for


class TokenFeed:
    """Iterates float32 tokens [B, V, G, D] on ``device``, one for each entry of ``batches``.

    Args:
        data: with caches.
        batches: rows of each batch, all of one size.
        batch_size: that size.
        device: where tokens are decoded and handed out.

    Raises (from ``next``):
        CacheDamaged and other errors of reading, with the batch they belong to.
    """

    def __init__(
        self, data: TrainingData, batches: Iterable[NDArray[np.int64]], batch_size: int, device: torch.device
    ) -> None:
        self._data, self._device, self._codec = data, device, data.codec
        pinned = device.type == "cuda"
        self._free: queue.Queue[_Slot] = queue.Queue()
        self._ready: queue.Queue[_Slot | BaseException] = queue.Queue()
        self._ended: BaseException | None = None
        self._batch_size = batch_size
        for _ in range(_DEPTH):
            buffers = {name: torch.from_numpy(array) for name, array in data.token_buffers(batch_size).items()}
            self._free.put(_Slot({n: t.pin_memory() if pinned else t for n, t in buffers.items()}))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(iter(batches),), name="token-feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> "TokenFeed":
        return self

    def __next__(self) -> torch.Tensor:
        slot = self._ended if self._ended is not None else self._ready.get()
        if isinstance(slot, BaseException):
            self._ended = slot  # asked again, it says so again
            raise slot
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in slot.tensors.items()}
        tokens = self._codec.decode(moved)
        if slot.inverse is not None:
            tokens = tokens[slot.inverse.to(self._device)]
        if self._device.type == "cuda":
            slot.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.copied.record(torch.cuda.current_stream(self._device))
        self._free.put(slot)
        return tokens

    def close(self) -> None:
        """End the reading thread."""
        self._stopped.set()
        self._thread.join()

    def __enter__(self) -> "TokenFeed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self, batches: Any) -> None:
        try:
            for rows in batches:
                assert len(rows) == self._batch_size, (len(rows), self._batch_size)
                slot = self._next_free()
                if slot is None:
                    return
                if slot.copied is not None:
                    slot.copied.synchronize()
                arrays = {name: tensor.numpy() for name, tensor in slot.tensors.items()}
                slot.inverse = self._data.read_tokens(rows, arrays)
                self._ready.put(slot)
            self._ready.put(StopIteration())
        except BaseException as problem:  # noqa: BLE001 - handed to the thread that asked, which raises it
            self._ready.put(problem)

    def _next_free(self) -> _Slot | None:
        while not self._stopped.is_set():
            try:
                return self._free.get(timeout=_WAIT_SECONDS)
            except queue.Empty:
                continue
        return None
