"""Which episodes are held out for validation: a function of the data and the share alone, the same for every seed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SPLIT_KEY = 20_240  # any constant: the split must not move with the training seed


def held_out_episodes(tasks: Sequence[str], share: float) -> NDArray[np.int64]:
    """Numbers of the episodes held out: ``share`` of all, rounded down, spread over the tasks evenly.

    Args:
        tasks: of every episode, in the order of the run's packs.
        share: 0 to 1, of the episodes.
    """
    random = np.random.default_rng(_SPLIT_KEY)
    names = np.asarray(tasks)
    # each task's episodes in random order get the ranks 1/n .. n/n; the smallest ranks over all tasks are taken
    ranks, shuffled = np.empty(len(names)), random.permutation(len(names))
    for task in np.unique(names):
        members = shuffled[names[shuffled] == task]
        ranks[members] = (np.arange(len(members)) + random.random()) / len(members)
    count = int(len(names) * share + 1e-9)  # 0.29 * 100 is a little less than 29
    return np.sort(np.argsort(ranks, kind="stable")[:count])
