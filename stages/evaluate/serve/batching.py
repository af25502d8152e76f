"""Observations of many clients, answered together: one thread asks the policy."""

import asyncio
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.pipeline.frames import Observation

Log = Callable[[str], None]
Act = Callable[[Sequence[Observation], Sequence[int]], NDArray[np.float32]]  # LivePolicy.act


@dataclass
class _Waiting:
    observation: Observation
    noise_seed: int
    answer: "asyncio.Future[NDArray[np.float32]]"


class Batcher:
    """Asks the policy on one thread; whatever waits when it is free is one batch.

    Args:
        act: ``LivePolicy.act``.
        most: observations of one batch.
        log: told of failures that are no mistake of a client.
    """

    def __init__(self, act: Act, most: int, log: Log) -> None:
        self._act, self._most, self._log = act, most, log
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "policy")
        self.batches = 0

    async def ask(self, observation: Observation, noise_seed: int) -> NDArray[np.float32]:
        """Actions [T, 7] in environment units.

        Raises:
            GeomcacheError: the policy refuses this observation, or failed.
        """
        one = _Waiting(observation, noise_seed, asyncio.get_running_loop().create_future())
        self._waiting.put_nowait(one)
        return await one.answer

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._most and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            await self._answer(batch)

    def close(self) -> None:
        """Wait for the call in work."""
        self._thread.shutdown()

    async def _answer(self, batch: list[_Waiting]) -> None:
        call = asyncio.get_running_loop().run_in_executor(
            self._thread, self._act, [one.observation for one in batch], [one.noise_seed for one in batch]
        )
        await asyncio.wait([call])
        self.batches += 1
        problem = call.exception()
        if problem is None:
            for one, chunk_TA in zip(batch, call.result(), strict=True):
                one.answer.set_result(chunk_TA)
        elif len(batch) > 1:  # one of them is to blame; the others get their answer
            for one in batch:
                await self._answer([one])
        elif isinstance(problem, GeomcacheError):
            batch[0].answer.set_exception(problem)
        else:
            self._log("the policy failed:\n" + "".join(traceback.format_exception(problem)).rstrip())
            batch[0].answer.set_exception(InputError("the policy failed", fix="the server's log says why"))
