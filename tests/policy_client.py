"""The policy server in a thread, and a client of its protocol written with msgpack alone."""

import asyncio
import json
import threading
import time
import urllib.request
from typing import Any, Self

import msgpack
import numpy as np
from numpy.typing import NDArray
from websockets.sync.client import connect

from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.stages.evaluate.serve.config import ServeConfig
from geomcache.stages.evaluate.serve.server import PolicyServer
from tests.conftest import SIDE

TEXT = "pick up the alphabet soup and place it in the basket"


class Served:
    """A server in a thread."""

    def __init__(self, policy: Any, **changes: Any) -> None:
        self.log: list[str] = []
        config = ServeConfig.model_validate({"run": "unused", "port": 0, "execute_steps": 3, **changes})
        self.server = PolicyServer(policy, config, self.log.append)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self.server.run(self._bound, self._stop)

    def _bound(self, port: int) -> None:
        self.port = port
        self._ready.set()

    def health(self, **headers: str) -> dict[str, Any]:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{self.port}/health", headers=headers)
        ) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()


class Refused(Exception):
    """The server's error message."""


class Client:
    """The protocol by msgpack alone."""

    def __init__(self, served: Served, **options: Any) -> None:
        self.connection = connect(f"ws://127.0.0.1:{served.port}", compression=None, **options).__enter__()
        self._seq = 0

    def send(self, kind: str, payload: dict[str, Any]) -> None:
        self._seq += 1
        message = {"type": kind, "payload": payload, "seq": self._seq, "timestamp": time.time()}
        self.connection.send(msgpack.packb(message))

    def receive(self) -> dict[str, Any]:
        answer = msgpack.unpackb(self.connection.recv(30))
        if answer["type"] == "error":
            raise Refused(answer["payload"]["error"])
        assert answer["seq"] == self._seq
        payload: dict[str, Any] = answer["payload"]
        return payload

    def begin(self, episode: int) -> None:
        task = {"name": TEXT, "suite": "libero_object", "task_id": 3, "episode_idx": episode}
        self.send("episode_start", {"task": task})

    def act(self, payload: dict[str, Any]) -> NDArray[np.float32]:
        self.send("observation", payload)
        array = self.receive()["actions"]
        assert (array["dtype"], array["shape"]) == ("<f4", [7])
        return np.frombuffer(array["data"], np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def as_sent(values: NDArray[Any]) -> dict[str, Any]:
    """An array on the wire."""
    return {"__ndarray__": True, "data": values.tobytes(), "dtype": values.dtype.str, "shape": list(values.shape)}


def seen(number: int) -> tuple[dict[str, Any], Observation]:
    """What vla-eval's client sends for a scene, and what LiberoEnv shows of it; from the same raw buffers."""
    rng = np.random.default_rng(number)
    raw_VHWC = rng.integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    state = rng.normal(size=8)
    sent = {
        "images": {"agentview": as_sent(raw_VHWC[0][::-1, ::-1]), "wrist": as_sent(raw_VHWC[1][::-1, ::-1])},
        "states": as_sent(state),
        "controller_states": as_sent(np.zeros(8)),
        "task_description": TEXT,
    }
    return sent, Observation(FrameBatch(raw_VHWC[None, :, ::-1].copy()), state.astype(np.float32), TEXT)
