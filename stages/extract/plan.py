"""What an extraction will do, known before anything expensive starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

import geomcache
from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.manifest import Manifest
from geomcache.pipeline.devices import resolve_device
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.card import data_card
from geomcache.pipeline.store.writer import create_or_open, read_commits
from geomcache.pipeline.tokens import build_codec, build_encoder, token_recipe


class ExtractConfig(Schema):
    """``geomcache extract``: run a frozen encoder over every row of a pack, write the tokens as a cache."""

    pack: Path  # folder made by `geomcache pack build`
    out: Path  # the cache's folder
    encoder: str = "oracle_pointmap"  # plug-in name
    encoder_config: dict[str, Any] = Field(default_factory=dict)  # the encoder's own Config
    codec: str | None = None  # bf16 | fp32; None: the encoder's own default
    workers: int = Field(default=1, ge=1)  # encoders running side by side, one per GPU or CPU core
    device: str = "auto"  # auto | cpu | cuda
    ray_address: str | None = None  # an existing cluster; None: a local one for this run


@dataclass(frozen=True)
class ExtractPlan:
    """The cache's manifest and the shards that are still to do."""

    config: ExtractConfig
    manifest: Manifest
    remaining: tuple[int, ...]
    device: str


def make_plan(config: ExtractConfig) -> ExtractPlan:
    """Check everything that can be checked without work, create or open the cache, list what is missing.

    Raises:
        InputError, PackDamaged, CacheStale, CacheDamaged, UnknownName, ConfigError: by name, before any work.
    """
    with PackReader(config.pack) as pack:
        device = resolve_device(config.device)
        encoder = build_encoder(config.encoder, config.encoder_config, pack.info.contract, device=None)
        recipe = token_recipe(encoder, pack.info.contract, pack.info.digest, config.codec)
        codec = build_codec(recipe.spec.codec)
        manifest = Manifest(
            recipe=recipe,
            rows=len(pack),
            rows_per_shard=pack.info.request.rows_per_shard,
            arrays=codec.arrays(recipe.spec),
            geomcache_version=geomcache.__version__,
        )
    create_or_open(config.out, manifest, data_card(manifest))
    done = read_commits(config.out, manifest)
    return ExtractPlan(config, manifest, tuple(k for k in range(manifest.shards) if k not in done), device)
