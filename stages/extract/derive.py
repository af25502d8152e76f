"""A smaller cache from a full one, without the encoder: pooled tokens, or another codec."""

import time
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.layout import shard_rows
from geomcache.cache_schemas.manifest import Manifest, TokenRecipe
from geomcache.cache_schemas.token_spec import ChannelStatistics
from geomcache.pipeline import plugins
from geomcache.pipeline.files import write_config
from geomcache.pipeline.store.card import data_card
from geomcache.pipeline.store.commits import read_commits
from geomcache.pipeline.store.local_files import LocalFiles
from geomcache.pipeline.store.lock import write_lock
from geomcache.pipeline.store.objects import is_remote
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.statistics import (
    STATISTICS_ROWS,
    TokenSums,
    channel_statistics,
    even_rows,
    rows_in_blocks,
)
from geomcache.pipeline.store.writer import ShardSink, create_or_open, require_same, standing_manifest
from geomcache.pipeline.tokens import StoredForm, stored_digest
from geomcache.stages.extract.plan import (
    finished_shards,
    new_manifest,
    refuse_unused_statistics,
    require_enough_tokens,
    statistics_of,
)

_BLOCK_ROWS = 32


class DeriveConfig(Schema):
    """``geomcache cache derive``: keep a full cache's tokens in another form."""

    cache: str  # folder or URL of the full cache
    out: Path
    pool: int | None = Field(default=None, ge=1)  # K: means of K groups of a row's V * G tokens
    codec: str | None = None  # None: fp32 for pooled tokens
    statistics_from: str | None = None  # cache whose channel statistics to take; None: from the full cache


class DeriveResult(Schema):
    """What one run of ``geomcache cache derive`` did."""

    cache: str
    cache_id: str
    rows: int
    row_shape: tuple[int, ...]
    codec: str
    bytes_per_row: float
    source_bytes_per_row: float
    codec_rms_error: float | None  # of the codec, each channel divided by its std; largest of the shards
    shards_done_before: int
    seconds: float


def derive(config: DeriveConfig, progress: Callable[[int, int], None], *, unlock: bool = False) -> DeriveResult:
    """Make, or go on making, the derived cache.

    Args:
        config: what to do.
        progress: called with (shards done, shards).
        unlock: take over the write lock that a dead run on another machine left.

    Raises:
        InputError: the source is itself pooled or int8, or ``out`` holds something else.
        CacheLocked: another run is writing ``out``. CacheDamaged, CacheIncomplete: the source cannot be read.
    """
    started = time.perf_counter()
    if config.pool is None and config.codec is None:
        raise InputError(
            "there is nothing to derive",
            expected="--pool K (tokens to keep), --codec NAME, or both",
            found="neither",
            fix=f"geomcache cache derive {config.cache} --pool 16 --out {config.out}",
        )
    with CachedTokens(config.cache) as source:
        manifest = _plan(config, source)
        with write_lock(config.out, "geomcache cache derive", unlock=unlock):
            create_or_open(config.out, manifest, data_card(manifest))
            write_config(config.out, config)
            done = finished_shards(config.out, manifest)
            form = StoredForm(manifest.recipe.spec)
            for shard in range(manifest.shards):
                if shard not in done:
                    _derive_shard(config.out, manifest, form, source, shard)
                progress(shard + 1, manifest.shards)
        commits = read_commits(LocalFiles(config.out), manifest)
        return DeriveResult(
            cache=str(config.out),
            cache_id=manifest.recipe.fingerprint.cache_id,
            rows=manifest.rows,
            row_shape=manifest.recipe.spec.row_shape,
            codec=manifest.recipe.spec.codec,
            bytes_per_row=sum(sum(commit.sizes.values()) for commit in commits.values()) / max(manifest.rows, 1),
            source_bytes_per_row=sum(sum(c.sizes.values()) for c in source.commits.values()) / max(manifest.rows, 1),
            codec_rms_error=max((c.statistics.codec_rms_error or 0.0 for c in commits.values()), default=None),
            shards_done_before=len(done),
            seconds=round(time.perf_counter() - started, 3),
        )


def _plan(config: DeriveConfig, source: CachedTokens) -> Manifest:
    parent, spec = source.recipe, source.spec
    if spec != spec.full:
        raise InputError(
            f"{config.cache} does not hold full tokens",
            expected="a cache as extract makes it with codec bf16, fp32 or lossless, without --pool",
            found=f"codec {spec.codec}" + (f", pooled to {spec.pooled_to}" if spec.pooled_to is not None else ""),
            fix="derive from the full cache",
        )
    require_enough_tokens(spec, config.pool)
    update = {"source_codec": spec.codec, "codec": config.codec or "fp32", "pooled_to": config.pool}
    new = spec.model_copy(update=update)
    if config.pool is not None or plugins.load("codec", new.codec).needs_statistics:
        new = new.model_copy(update={"channel_statistics": _statistics(config, source)})
    else:
        refuse_unused_statistics(config.statistics_from, new)
    encoder_config = stored_digest(parent.fingerprint.encoder_config, new)
    fingerprint = parent.fingerprint.model_copy(update={"encoder_config": encoder_config})
    recipe: TokenRecipe = parent.model_copy(update={"spec": new, "fingerprint": fingerprint})
    manifest = new_manifest(
        recipe, source.manifest.rows, source.manifest.rows_per_shard, derived_from=parent.fingerprint.cache_id
    )
    if not is_remote(config.cache) and config.out.resolve().is_relative_to(Path(config.cache).resolve()):
        raise InputError(f"{config.out} lies inside the cache it would be made from", fix="choose another --out")
    require_same(config.out, manifest)
    return manifest


def _statistics(config: DeriveConfig, source: CachedTokens) -> ChannelStatistics:
    if config.statistics_from is not None:
        return statistics_of(source.recipe, config.statistics_from)
    standing = standing_manifest(config.out)
    if standing is not None and standing.recipe.spec.channel_statistics is not None:
        return standing.recipe.spec.channel_statistics  # require_same tells whether the rest is the same
    # As training takes them from the full cache, so that it standardises pooled tokens alike.
    return channel_statistics(rows_in_blocks(source.tokens, even_rows(len(source), STATISTICS_ROWS)))


def _derive_shard(out: Path, manifest: Manifest, form: StoredForm, source: CachedTokens, shard: int) -> None:
    rows = shard_rows(shard, manifest.rows, manifest.rows_per_shard)
    seconds, sums = {"read": 0.0, "store": 0.0}, []
    with ShardSink(out, manifest, shard) as sink:
        for start in range(0, len(rows), _BLOCK_ROWS):
            started = time.perf_counter()
            tokens = source.tokens(rows[start : start + _BLOCK_ROWS])
            read = time.perf_counter()
            given = form.prepare(tokens, from_source=True)
            stored = form.codec.encode(given)
            sums.append(TokenSums.of(form.codec, given, stored))
            seconds["read"] += read - started
            seconds["store"] += time.perf_counter() - read
            sink.append(stored)
        sink.commit(TokenSums.total(sums).statistics(), seconds)
