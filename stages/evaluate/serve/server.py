"""``geomcache serve``: the policy of a checkpoint behind a WebSocket, for vla-eval and other harnesses.

One thread asks the policy; observations that wait meanwhile are answered together. A client that sends what cannot be
used is told why and closed; the others do not notice.

Non-obvious:
- vla-eval's client cannot set headers, but ``ws://any:TOKEN@host:port`` makes the library below it send the token as
  HTTP Basic authorization; so both Bearer and Basic are taken.
- A simulator blocks its client's event loop for seconds, so pings would end healthy connections; there are none, but
  an idle time.
- Browsers always send an Origin with a WebSocket, other clients never: any Origin is refused.
"""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import signal
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import geomcache
from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.stages.evaluate.live_policy import LivePolicy
from geomcache.stages.evaluate.serve.batching import Batcher, Log
from geomcache.stages.evaluate.serve.config import ServeConfig
from geomcache.stages.evaluate.serve.protocol import pack, unpack
from geomcache.stages.evaluate.serve.session import Session

_CLOSE_SECONDS = 3.0  # for a client's half of the closing handshake; a simulating client does not answer
_POLICY_VIOLATION = 1008  # WebSocket close code
_logger = logging.getLogger(__name__)


class PolicyServer:
    """Clients, their limits, and the batcher behind them.

    Args:
        policy: of the checkpoint.
        config: limits and address.
        log: one line for every client that leaves.
    """

    def __init__(self, policy: LivePolicy, config: ServeConfig, log: Log) -> None:
        self._policy, self._config, self._log = policy, config, log
        self._batcher = Batcher(policy.act, config.max_batch, log)
        self._connections: set[Any] = set()
        self._queries = 0  # of clients that have left
        self._sessions: set[Session] = set()

    async def run(self, ready: Callable[[int], None], stop: asyncio.Event) -> None:
        """Serve until ``stop``; ``ready`` is told the port.

        Raises:
            InputError: the address cannot be used.
        """
        from websockets.asyncio.server import serve

        config = self._config
        _logger.addFilter(_is_no_failed_handshake)
        batching = asyncio.create_task(self._batcher.run())
        try:
            server = await serve(
                self._serve_client,
                config.host,
                config.port,
                process_request=self._screen,
                compression=None,
                max_size=int(config.max_message_mb * 2**20),
                max_queue=2,
                ping_interval=None,
                close_timeout=_CLOSE_SECONDS,
                server_header=None,
                logger=_logger,
            )
        except OSError as problem:
            raise InputError(
                f"cannot listen on {config.host}, port {config.port}",
                expected="an address of this machine and a port that is free",
                found=problem.strerror or str(problem),
                fix="--port 0 takes a free one",
            ) from problem
        else:
            async with server:
                ready(next(iter(server.sockets)).getsockname()[1])
                await stop.wait()
        finally:
            batching.cancel()
            self._batcher.close()

    def health(self) -> dict[str, Any]:
        """What ``GET /health`` answers."""
        card = self._policy.card
        return {
            "status": "ok",
            "checkpoint": str(self._policy.checkpoint),
            "step": card.step,
            "encoder": None if card.recipe is None or self._config.without_geometry else card.recipe.encoder.name,
            "contract": card.contract.model_dump(mode="json"),
            "execute_steps": self._config.execute_steps,
            "geomcache_version": geomcache.__version__,
            "clients": len(self._sessions),
            "queries": self._queries + sum(session.queries for session in self._sessions),
            "batches": self._batcher.batches,
        }

    def _screen(self, connection: Any, request: Any) -> Any:
        """Every HTTP request before it becomes a WebSocket: a response, or None to go on."""
        from websockets.protocol import State

        if "Origin" in request.headers:
            return connection.respond(HTTPStatus.FORBIDDEN, "Browsers are not served.\n")
        if self._config.token is not None and not _knows(self._config.token, request.headers.get_all("Authorization")):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "Authorization: Bearer TOKEN is missing or wrong.\n")
        if request.path.partition("?")[0] == "/health":
            response = connection.respond(HTTPStatus.OK, json.dumps(self.health()) + "\n")
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
            return response
        self._connections = {each for each in self._connections if each.state is not State.CLOSED}
        if len(self._connections) >= self._config.max_clients:
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{self._config.max_clients} clients are the most.\n"
            )
        self._connections.add(connection)
        return None

    async def _serve_client(self, connection: Any) -> None:
        session = Session(
            self._policy.card.contract,
            self._batcher.ask,
            execute_steps=self._config.execute_steps,
            seed=self._config.seed,
        )
        started = time.monotonic()
        self._sessions.add(session)
        try:
            ended = await self._converse(connection, session)
        finally:
            self._sessions.remove(session)
            self._queries += session.queries
        self._log(
            f"{_address(connection)}, client {session.client}: {session.episodes} episodes, {session.observations} "
            f"observations, {session.queries} queries in {time.monotonic() - started:.1f} s; {ended}"
        )

    async def _converse(self, connection: Any, session: Session) -> str:
        """Answer until the client leaves or must leave; returns why, in one line."""
        from websockets.exceptions import ConnectionClosed

        seq = 0
        try:
            while True:
                data = await asyncio.wait_for(connection.recv(), self._config.idle_seconds)
                if isinstance(data, str):
                    raise InputError("a text message", expected="binary messages: MessagePack")
                message = unpack(data)
                seq = message.seq
                reply = await session.answer(message)
                if reply is not None:
                    await asyncio.wait_for(connection.send(reply), self._config.idle_seconds)
        except ConnectionClosed as closed:
            return "left" if closed.rcvd is not None and closed.rcvd.code in (1000, 1001) else f"lost: {closed!r}"
        except TimeoutError:
            problem = f"idle for {self._config.idle_seconds:g} s"
        except GeomcacheError as refusal:
            problem = str(refusal)
        return await self._dismiss(connection, seq, problem)

    async def _dismiss(self, connection: Any, seq: int, problem: str) -> str:
        from websockets.exceptions import ConnectionClosed

        line = " ".join(problem.split())
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await connection.send(pack("error", {"error": problem}, seq))
        except (ConnectionClosed, TimeoutError):
            return f"closed, and did not listen: {line}"
        await connection.close(_POLICY_VIOLATION, line.encode()[:120].decode(errors="ignore"))
        return f"closed: {line}"


def _knows(token: str, given: Sequence[str]) -> bool:
    """Whether the one Authorization header proves the token, as Bearer or as the password of Basic."""
    if len(given) != 1:
        return False
    scheme, _, said = given[0].partition(" ")
    if scheme.lower() == "basic":
        try:
            said = base64.b64decode(said, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(said.encode(), token.encode())


def _address(connection: Any) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a client that is gone"


def _is_no_failed_handshake(record: logging.LogRecord) -> bool:
    """Port scanners and wrong protocols are not worth a traceback; the library logs each as an error."""
    return record.getMessage() != "opening handshake failed"


def serve_until_signal(policy: LivePolicy, config: ServeConfig, log: Log, ready: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM; a second signal does not wait for clients.

    Raises:
        InputError: the address cannot be used.
    """

    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            stop.set()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        await PolicyServer(policy, config, log).run(ready, stop)

    asyncio.run(main())
