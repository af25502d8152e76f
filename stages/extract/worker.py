"""One stateful worker: one encoder on one device; its unit of work is one shard, written whole.

Inside a shard, batches flow: threads decode the next ones while the encoder works, others put finished tokens into
their stored form, and the file is written as rows arrive. Two shards may be in work at once: while the first is being
flushed to the disk, the encoder has the second. So the device waits for nobody, and what is in memory are a few
batches, however long a shard is.
"""

import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import CacheStale, GeomcacheError, InputError
from geomcache.cache_schemas.layout import shard_rows
from geomcache.cache_schemas.manifest import Manifest, ShardCommit, TokenRecipe
from geomcache.pipeline.encoding import one_thread, slot_deviation
from geomcache.pipeline.interfaces import GeometryEncoder
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.statistics import TokenSums
from geomcache.pipeline.store.writer import ShardSink
from geomcache.pipeline.tokens import StoredForm, build_encoder
from geomcache.stages.extract.frames_to_tokens import Block, FramesToTokens, OnError
from geomcache.stages.extract.stream import Ahead

SHARDS_AT_ONCE = 2
_AHEAD = 3  # batches decoded, or being stored, beside the one in the encoder
_GPU_CALLS = 3  # one prepares its images, one computes, one copies its tokens back

T = TypeVar("T")
R = TypeVar("R")
_Stored = tuple[dict[str, NDArray[Any]], TokenSums]


class Clock:
    """Busy seconds of each stage, from any thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"decode": 0.0, "encode": 0.0, "store": 0.0}
        self._lock = threading.Lock()

    def timed(self, stage: str, work: Callable[[T], R]) -> Callable[[T], R]:
        """``work``, whose time is counted."""

        def run(item: T) -> R:
            started = time.perf_counter()
            try:
                return work(item)
            finally:
                with self._lock:
                    self.seconds[stage] += time.perf_counter() - started

        return run


@dataclass
class _AtWork:
    """A shard that is being made."""

    clock: Clock
    rows: int = 0  # encoded


@dataclass(frozen=True)
class ShardReport:
    """What a worker says of a finished shard."""

    commit: ShardCommit
    masked: dict[int, str]  # row -> why its tokens are NaN
    worker: str  # host and process


def open_encoder(pack_path: Path, recipe: TokenRecipe, device: str) -> tuple[PackReader, GeometryEncoder]:
    """The pack and the loaded encoder, proved to be the recipe's.

    Raises:
        CacheStale: this machine's pack or weights are not those of the recipe.
    """
    pack = PackReader(pack_path)
    encoder = build_encoder(recipe.encoder.name, recipe.encoder.config, recipe.contract, device)
    found = recipe.fingerprint.model_copy(update={"pack": pack.info.digest, "weights": encoder.weights_digest()})
    if differences := recipe.fingerprint.describe_difference(found):
        raise CacheStale(
            "a worker sees another pack or other weights than the run was planned with",
            expected="the same files at the same paths on every machine",
            found="; ".join(differences),
            fix="put the pack and the weights on a file system that all machines share",
        )
    return pack, encoder


@dataclass
class _Parts:
    """What a started worker holds."""

    encoder: GeometryEncoder
    tokens: FramesToTokens
    form: StoredForm
    readers: ThreadPoolExecutor
    encoders: ThreadPoolExecutor
    packers: ThreadPoolExecutor
    stack: ExitStack


class ShardWorker:
    """Makes shards. Ray runs it as an actor; tests call it directly.

    Everything heavy happens in ``start`` and not in the constructor, so that Ray hands out its errors as they are.

    Args:
        pack: the pack's folder.
        out: the cache's folder.
        manifest: of the cache.
        device: "cpu", "cuda", ...
        on_error: what a row that cannot be read or encoded does, see ``FramesToTokens``.
        threads: that decode frames, and as many that store tokens.
    """

    def __init__(
        self, pack: Path, out: Path, manifest: Manifest, device: str, on_error: OnError = "stop", threads: int = 1
    ) -> None:
        self._pack, self._out, self._manifest, self._device = pack, out, manifest, device
        self._on_error, self._threads = on_error, threads
        self._parts: _Parts | None = None
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._slot_deviation: float | None = None
        self._at_work: dict[int, _AtWork] = {}
        self._finished = Counter[str]()  # busy seconds of each stage, of finished shards

    def start(self) -> dict[str, Any]:
        """Open the pack and load the encoder, and prove that they are the manifest's; returns what ``state`` says.

        Raises:
            CacheStale: this machine's pack or weights are not those of the manifest.
        """
        self._ready()
        return self.state()

    def state(self) -> dict[str, Any]:
        """Who this is, the shards in work with their rows done, busy seconds of each stage so far."""
        seconds, shards = Counter(self._finished), dict(self._at_work)
        for work in shards.values():
            seconds.update(work.clock.seconds)
        rows = {shard: work.rows for shard, work in shards.items()}
        return {"worker": _name(), "shards": rows, "seconds": dict(seconds), "slot_deviation": self._slot_deviation}

    def run(self, shard: int) -> ShardReport:
        """Make and commit one shard; doing it twice gives the same bytes.

        Raises:
            PackDamaged, InputError: a row cannot be read or encoded; with "mask": none of the shard's rows can.
        """
        parts, clock, started = self._ready(), Clock(), time.perf_counter()
        rows = shard_rows(shard, self._manifest.rows, self._manifest.rows_per_shard)
        size = self._manifest.recipe.spec.encoder_batch_size
        batches = (rows[start : start + size] for start in range(0, len(rows), size))
        masked: dict[int, str] = {}
        storing: deque[Future[_Stored]] = deque()
        sums: list[TokenSums] = []

        def encode(block: Block) -> tuple[Block, torch.Tensor]:
            return block, parts.tokens.encode(block)

        def store(tokens: torch.Tensor) -> _Stored:
            with one_thread():
                given = parts.form.prepare(tokens)
                stored = parts.form.codec.encode(given)
                return stored, TokenSums.of(parts.form.codec, given, stored)

        def take(sink: ShardSink) -> None:
            arrays, block_sums = storing.popleft().result()
            sink.append(arrays)
            sums.append(block_sums)

        self._at_work[shard] = work = _AtWork(clock)
        try:
            with ShardSink(self._out, self._manifest, shard) as sink:
                decoded = Ahead(parts.readers, clock.timed("decode", parts.tokens.decode), batches, _AHEAD)
                decoded.begin()
                with self._turn:  # one shard after the other, or both would reach their end, and the disk, together
                    for block, tokens in Ahead(parts.encoders, clock.timed("encode", encode), decoded, _GPU_CALLS):
                        masked |= block.bad
                        storing.append(parts.packers.submit(clock.timed("store", store), tokens))
                        work.rows += len(block.rows)
                        while storing and (storing[0].done() or len(storing) > _AHEAD):
                            take(sink)
                while storing:
                    take(sink)
                if len(masked) == len(rows) > size:  # the last shard may be one row
                    raise InputError(
                        f"no row of shard {shard} can be read and encoded",
                        expected="a few bad frames at most",
                        found=f"row {rows.start}: {masked[rows.start]}",
                        fix="this is no fault of single frames: mend its cause",
                    )
                seconds = {**clock.seconds, "wall": time.perf_counter() - started}
                commit = sink.commit(TokenSums.total(sums).statistics(), seconds)
        finally:
            del self._at_work[shard]
        with self._lock:
            self._finished.update({stage: spent for stage, spent in commit.seconds.items() if stage != "wall"})
        return ShardReport(commit, masked, _name())

    def close(self) -> None:
        """Let go of the pack and the encoder."""
        if self._parts is not None:
            self._parts.stack.close()
            self._parts = None

    def _ready(self) -> _Parts:
        with self._lock:
            if self._parts is None:
                recipe = self._manifest.recipe
                with ExitStack() as stack:
                    pack, encoder = open_encoder(self._pack, recipe, self._device)
                    stack.enter_context(pack)
                    calls = _GPU_CALLS if self._device.startswith("cuda") else 1

                    def pool(threads: int, name: str) -> ThreadPoolExecutor:
                        return stack.enter_context(ThreadPoolExecutor(threads, name))

                    self._parts = _Parts(
                        encoder=encoder,
                        tokens=FramesToTokens(pack, encoder, self._on_error),
                        form=StoredForm(recipe.spec),
                        readers=pool(self._threads, "decode"),
                        encoders=pool(calls, "encode"),
                        packers=pool(self._threads, "store"),
                        stack=stack.pop_all(),
                    )
                    if self._device.startswith("cuda"):
                        rows = range(min(self._manifest.rows, encoder.spec.encoder_batch_size))
                        with suppress(GeomcacheError):  # a bad frame; the run says so when it comes to it
                            self._slot_deviation = slot_deviation(encoder, pack.frames(rows))
            return self._parts


def _name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
