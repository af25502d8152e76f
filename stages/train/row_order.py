"""Which rows an optimiser step trains on: a pure function of (seed, step), never of buffers, ranks or workers.

``global``: each epoch is one permutation of all rows; right wherever random reads are as fast as sequential ones.
``shard``: each epoch shuffles the shards, and rows within a window of consecutive shards; for object stores, NFS and
spinning disks, which read a few shards at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

RowOrder = Literal["global", "shard"]
SHARD_WINDOW = 8  # shards among which "shard" mixes rows


def shard_starts(packs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """First row of every shard of packs given as (rows, rows per shard), one behind the other; last: all rows."""
    starts, first = [0], 0
    for rows, per_shard in packs:
        starts += [first + min(end, rows) for end in range(per_shard, rows + per_shard, per_shard)]
        first += rows
    return tuple(starts)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a run."""

    starts: tuple[int, ...]  # from ``shard_starts``
    held_out_N: NDArray[np.bool_]  # rows that are never trained on

    @cached_property
    def trained(self) -> int:
        """How many rows an epoch has."""
        return int(len(self.held_out_N) - np.count_nonzero(self.held_out_N))


def rows_of_step(seed: int, step: int, batch_size: int, rows: Rows, order: RowOrder = "global") -> NDArray[np.int64]:
    """The rows of global optimiser step ``step``: epoch after epoch, each an order of all rows keyed on (seed, epoch).

    Depends on nothing else, so a resumed run, any number of ranks and any number of workers see the same order.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // rows.trained
    orders = {int(e): epoch_order(seed, int(e), rows, order) for e in np.unique(epochs)}
    return np.array([orders[int(e)][p % rows.trained] for e, p in zip(epochs, positions, strict=True)], dtype=np.int64)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, rows: Rows, order: RowOrder) -> NDArray[np.int64]:
    """Every row that is trained on once, in the order of one epoch."""
    everything = _all_rows(seed, epoch, rows.starts, order)
    return everything[~rows.held_out_N[everything]]


def _all_rows(seed: int, epoch: int, starts: tuple[int, ...], order: RowOrder) -> NDArray[np.int64]:
    random = np.random.default_rng([seed, epoch])
    if order == "global":
        return random.permutation(starts[-1])
    shards = random.permutation(len(starts) - 1)
    windows = []
    for first in range(0, len(shards), SHARD_WINDOW):
        window = [np.arange(starts[shard], starts[shard + 1]) for shard in shards[first : first + SHARD_WINDOW]]
        windows.append(random.permutation(np.concatenate(window)))
    return np.concatenate(windows)
