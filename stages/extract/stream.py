"""Work done ahead by threads, handed out in order: how decoding, encoding and storing overlap."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Ahead(Generic[T, R]):
    """Iterates ``work(item)`` for each item, in order; never more than ``ahead`` results exist that nobody took.

    Args:
        pool: its threads do the work.
        work: raises to the one who iterates.
        items: pulled one at a time, in the thread that iterates.
        ahead: how many are begun before they are asked for; this bounds the memory.
    """

    def __init__(self, pool: Executor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> None:
        self._pool, self._work, self._items, self._ahead = pool, work, iter(items), ahead
        self._begun: deque[Future[R]] = deque()

    def begin(self) -> None:
        """Start the first ones now, before anything is asked for."""
        while len(self._begun) < self._ahead:
            try:
                item = next(self._items)
            except StopIteration:
                return
            self._begun.append(self._pool.submit(self._work, item))

    def __iter__(self) -> Iterator[R]:
        try:
            self.begin()
            while self._begun:
                result = self._begun.popleft().result()
                self.begin()
                yield result
        finally:
            for future in self._begun:
                future.cancel()
