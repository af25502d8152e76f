"""One stateful worker: one encoder on one device; its unit of work is one shard, written whole."""

import os
import time
from pathlib import Path

from geomcache.cache_schemas.errors import CacheStale
from geomcache.cache_schemas.layout import shard_rows
from geomcache.cache_schemas.manifest import Manifest, ShardCommit, TokenRecipe
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.interfaces import GeometryEncoder
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.statistics import shard_statistics
from geomcache.pipeline.store.writer import commit_shard
from geomcache.pipeline.tokens import StoredForm, build_encoder


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


class ShardWorker:
    """Reads a shard's frames, encodes them, commits the shard. Ray runs it as an actor; tests call it directly.

    Everything heavy happens in ``start`` and not in the constructor, so that Ray hands out its errors as they are.

    Args:
        pack: the pack's folder.
        out: the cache's folder.
        manifest: of the cache.
        device: "cpu", "cuda", ...
    """

    def __init__(self, pack: Path, out: Path, manifest: Manifest, device: str) -> None:
        self._pack, self._out, self._manifest, self._device = pack, out, manifest, device
        self._parts: tuple[PackReader, GeometryEncoder, StoredForm] | None = None

    def start(self) -> int:
        """Open the pack and load the encoder, and prove that they are the manifest's; returns the process id.

        Raises:
            CacheStale: this machine's pack or weights are not those of the manifest.
        """
        self._ready()
        return os.getpid()

    def run(self, shard: int) -> ShardCommit:
        """Make and commit one shard; doing it twice gives the same bytes."""
        pack, encoder, form = self._ready()
        started = time.perf_counter()
        pack.verify_shard(shard)  # tokens of damaged frames would carry the good cache's name
        frames = pack.frames(shard_rows(shard, self._manifest.rows, self._manifest.rows_per_shard))
        read = time.perf_counter()
        given = form.prepare(encode_padded(encoder, frames))
        encoded = form.codec.encode(given)
        statistics = shard_statistics(form.codec, given, encoded)
        finished = time.perf_counter()
        return commit_shard(
            self._out,
            self._manifest,
            shard,
            encoded,
            statistics=statistics,
            seconds={"read": read - started, "encode": finished - read},
        )

    def close(self) -> None:
        """Let go of the pack and the encoder."""
        self._parts = None

    def _ready(self) -> tuple[PackReader, GeometryEncoder, StoredForm]:
        if self._parts is None:
            recipe = self._manifest.recipe
            self._parts = *open_encoder(self._pack, recipe, self._device), StoredForm(recipe.spec)
        return self._parts
