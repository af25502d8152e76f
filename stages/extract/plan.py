"""What an extraction will do, known before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

import geomcache
from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.manifest import Manifest, TokenRecipe
from geomcache.cache_schemas.token_spec import ChannelStatistics, TokenSpec
from geomcache.pipeline import plugins
from geomcache.pipeline.devices import resolve_device
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.card import data_card
from geomcache.pipeline.store.commits import read_commits, whole_shards
from geomcache.pipeline.store.local_files import LocalFiles
from geomcache.pipeline.store.reader import open_manifest
from geomcache.pipeline.store.writer import create_or_open, require_same, standing_manifest
from geomcache.pipeline.tokens import build_codec, build_encoder, token_recipe
from geomcache.stages.extract.cluster import device_of_cluster
from geomcache.stages.extract.frames_to_tokens import OnError
from geomcache.stages.extract.sample import sample_statistics


class ExtractConfig(Schema):
    """``geomcache extract``: run a frozen encoder over every row of a pack, write the tokens as a cache."""

    pack: Path  # folder made by `geomcache pack build`
    out: Path  # the cache's folder
    encoder: str = "oracle_pointmap"  # plug-in name
    encoder_config: dict[str, Any] = Field(default_factory=dict)  # the encoder's own Config
    codec: str | None = None  # bf16 | fp32 | int8 | lossless; None: the encoder's own default, fp32 when pooled
    pool: int | None = Field(default=None, ge=1)  # K: keep the means of K groups of a row's tokens, not all of them
    # Cache whose channel statistics to take (codec int8, pooled tokens), so that several packs can be trained on
    # together; None: from a sample of this pack.
    statistics_from: str | None = None
    workers: int | None = Field(default=None, ge=1)  # encoders side by side; None: one per GPU, or one on a CPU
    device: str = "auto"  # auto | cpu | cuda
    cpus_per_worker: int | None = Field(default=None, ge=1)  # threads that decode and store; None: 1, beside a GPU <= 8
    gpus_per_worker: float = Field(default=1.0, gt=0)  # 0.5: two workers share a GPU
    on_error: OnError = "stop"  # a row that cannot be read or encoded: stop | mask (its tokens are NaN, left out later)
    ray_address: str | None = None  # an existing cluster; None: a local one for this run


@dataclass(frozen=True)
class ExtractPlan:
    """The cache's manifest and the shards that are still to do."""

    config: ExtractConfig
    manifest: Manifest
    remaining: tuple[int, ...]
    device: str
    non_commercial: bool  # by the licence of the weights


def make_plan(config: ExtractConfig, *, rough: bool = False) -> ExtractPlan:
    """Check everything that can be checked; writes nothing.

    ``rough``: for an estimate; the channel statistics are not taken from a sample but made up.

    Raises:
        InputError, PackDamaged, CacheStale, CacheDamaged, UnknownName, ConfigError: by name, before any work.
    """
    with PackReader(config.pack) as pack:
        device = device_of_cluster(config.device) if config.ray_address else resolve_device(config.device)
        encoder = build_encoder(config.encoder, config.encoder_config, pack.info.contract, device=None)
        require_enough_tokens(encoder.spec, config.pool)
        recipe = token_recipe(encoder, pack.info.contract, pack.info.digest, config.codec, pooled_to=config.pool)
        if config.pool is not None or plugins.load("codec", recipe.spec.codec).needs_statistics:
            made_up = ChannelStatistics(mean=(0.0,) * recipe.spec.dim, std=(1.0,) * recipe.spec.dim, rows=1)
            known = config.statistics_from is not None or standing_manifest(config.out) is not None
            statistics = made_up if rough and not known else _statistics(config, recipe, pack, device)
            storage = {**recipe.spec.storage, "channel_statistics": statistics}
            recipe = token_recipe(encoder, pack.info.contract, pack.info.digest, **storage)
        else:
            refuse_unused_statistics(config.statistics_from, recipe.spec)
        rows, rows_per_shard = len(pack), pack.info.request.rows_per_shard
    return plan_with(config, new_manifest(recipe, rows, rows_per_shard), device, encoder.non_commercial)


def new_manifest(recipe: TokenRecipe, rows: int, rows_per_shard: int, derived_from: str | None = None) -> Manifest:
    """The manifest of a cache that is to be made."""
    return Manifest(
        recipe=recipe,
        rows=rows,
        rows_per_shard=rows_per_shard,
        arrays=build_codec(recipe.spec).arrays(),
        geomcache_version=geomcache.__version__,
        derived_from=derived_from,
    )


def plan_with(config: ExtractConfig, manifest: Manifest, device: str, non_commercial: bool) -> ExtractPlan:
    """What is missing of this cache in ``config.out``."""
    standing = require_same(config.out, manifest)
    done = finished_shards(config.out, standing) if standing is not None else set()
    remaining = tuple(shard for shard in range(manifest.shards) if shard not in done)
    return ExtractPlan(config, standing or manifest, remaining, device, non_commercial)


def finished_shards(out: Path, manifest: Manifest) -> set[int]:
    """Shards that need not be made again; one whose file was lost is not among them, whatever its record says."""
    return whole_shards(out, manifest, read_commits(LocalFiles(out), manifest))


def begin(plan: ExtractPlan) -> ExtractPlan:
    """Make the cache's folder (under its write lock), and see again what is missing."""
    create_or_open(plan.config.out, plan.manifest, data_card(plan.manifest))
    return plan_with(plan.config, plan.manifest, plan.device, plan.non_commercial)


def _statistics(config: ExtractConfig, recipe: TokenRecipe, pack: PackReader, device: str) -> ChannelStatistics:
    if config.statistics_from is not None:
        return statistics_of(recipe, config.statistics_from)
    standing = standing_manifest(config.out)
    if standing is not None:  # a run that goes on keeps what it began with
        found = standing.recipe.spec.channel_statistics
        if found is None:
            raise InputError(
                f"{config.out} holds a cache of something else",
                expected=f"codec {recipe.spec.codec}, pooled to {recipe.spec.pooled_to}",
                found=f"codec {standing.recipe.spec.codec}, pooled to {standing.recipe.spec.pooled_to}",
                fix="choose another --out, or delete this folder if it is not needed",
            )
        return found
    return sample_statistics(config.pack, recipe, len(pack), device, config.ray_address, config.on_error)


def statistics_of(wanted: TokenRecipe, where: str) -> ChannelStatistics:
    """The channel statistics of the cache at ``where``.

    Raises:
        InputError: it has none, or they are of other tokens than ``wanted`` says.
    """
    recipe = open_manifest(where).recipe
    mine, theirs = (each.spec.full.model_copy(update={"codec": "any"}) for each in (wanted, recipe))
    differences = mine.describe_difference(theirs)
    for name in ("weights", "image_path"):
        if getattr(wanted.fingerprint, name) != getattr(recipe.fingerprint, name):
            differences.append(f"{name} of the encoder differ")
    if recipe.spec.channel_statistics is None or differences:
        raise InputError(
            f"the channel statistics of {where} do not fit",
            expected="a pooled or int8 cache of the same encoder",
            found="; ".join(differences) or "a cache without channel statistics",
            fix="name another cache, or leave statistics_from out",
        )
    return recipe.spec.channel_statistics


def require_enough_tokens(spec: TokenSpec, pool: int | None) -> None:
    """``InputError`` when there are fewer tokens than groups."""
    if pool is not None and pool > spec.views * spec.tokens_per_view:
        raise InputError(
            "there are not that many tokens to pool",
            expected=f"--pool at most {spec.views * spec.tokens_per_view} (views x tokens per view)",
            found=str(pool),
        )


def refuse_unused_statistics(statistics_from: str | None, spec: TokenSpec) -> None:
    """``InputError`` when channel statistics are named for tokens that have no use for them."""
    if statistics_from is not None:
        raise InputError(
            "statistics_from has no meaning here",
            expected="codec int8 or pooled tokens",
            found=f"codec {spec.codec}",
            fix="leave statistics_from out",
        )
