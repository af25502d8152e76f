"""One stateful worker: one encoder on one device; its unit of work is one shard, written whole."""

import os
import time

from geomcache.cache_schemas.layout import shard_rows
from geomcache.cache_schemas.manifest import Manifest, ShardCommit
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.writer import commit_shard, token_statistics
from geomcache.pipeline.tokens import build_codec, build_encoder
from geomcache.stages.extract.plan import ExtractConfig


class ShardWorker:
    """Reads a shard's frames, encodes them, commits the shard. Ray runs it as an actor; tests call it directly."""

    def __init__(self, config: ExtractConfig, manifest: Manifest, device: str) -> None:
        self._manifest = manifest
        self._out = config.out
        self._pack = PackReader(config.pack)
        recipe = manifest.recipe
        self._codec = build_codec(recipe.spec.codec)
        self._encoder = build_encoder(recipe.encoder.name, recipe.encoder.config, recipe.contract, device)

    def run(self, shard: int) -> ShardCommit:
        """Make and commit one shard; doing it twice gives the same bytes."""
        started = time.perf_counter()
        frames = self._pack.frames(shard_rows(shard, self._manifest.rows, self._manifest.rows_per_shard))
        read = time.perf_counter()
        encoded = self._codec.encode(encode_padded(self._encoder, frames))
        statistics = token_statistics(self._codec.decode(encoded))
        finished = time.perf_counter()
        return commit_shard(
            self._out,
            self._manifest,
            shard,
            encoded,
            statistics=statistics,
            seconds={"read": read - started, "encode": finished - read},
        )

    def process_id(self) -> int:
        """For tests that kill a worker."""
        return os.getpid()
