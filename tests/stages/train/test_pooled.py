"""Training on K pooled tokens equals training on all of them, for the compressors that say so and for no others."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from geomcache.cache_schemas.errors import ConfigError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline import plugins
from geomcache.pipeline.pooling import pool_tokens
from geomcache.stages.train.batch import GeomSizes, GeomTokens
from geomcache.stages.train.building import seeded
from geomcache.stages.train.policy import PolicyConfig, PolicyNet

DIM, CONTEXT, BLOCKS, K = 64, 32, 3, 16
NAMES = [name for name in plugins.names("compressor") if name != "none"]
MEAN_D = torch.linspace(-1, 1, DIM)
STD_D = torch.logspace(-0.5, 0.5, DIM)


def reads_pooled(name: str, **options: bool) -> bool:
    answer: bool = plugins.load("compressor", name).reads_pooled(plugins.config_class("compressor", name)(**options))
    return answer


READS_POOLED = {name: reads_pooled(name) for name in plugins.names("compressor")}


def build(name: str, views: int, tokens: int) -> Any:
    """The same weights whatever the number of tokens."""
    sizes = GeomSizes(views=views, grid=(1, tokens), dim=DIM, context_dim=CONTEXT, num_blocks=BLOCKS, num_tokens=K)
    with seeded(0):
        return plugins.load("compressor", name)(plugins.config_class("compressor", name)(), sizes)


def tokens_of(views: int, per_view: int, missing: float) -> torch.Tensor:
    """Unstandardised tokens, a share of them NaN; the second sample's first two groups are missing as a whole."""
    generator = torch.Generator().manual_seed(0)
    tokens_BVGD = torch.randn(4, views, per_view, DIM, generator=generator) * STD_D + MEAN_D
    missing_BVG = torch.rand(4, views, per_view, generator=generator) < missing
    if missing:
        missing_BVG.view(4, -1)[1, : -(-2 * views * per_view // K)] = True
    return tokens_BVGD.masked_fill(missing_BVG[..., None], float("nan"))


def compress(compressor: Any, tokens_BVGD: torch.Tensor) -> GeomTokens:
    """Mask, standardise and compress, as the policy does."""
    mask_BVG = tokens_BVGD.isfinite().all(dim=-1)
    context_BSC = torch.randn(4, 5, CONTEXT, generator=torch.Generator().manual_seed(1))
    standard_BVGD = (tokens_BVGD - MEAN_D) / STD_D
    found: GeomTokens = compressor(standard_BVGD, mask_BVG, context_BSC, torch.ones(4, 5, dtype=torch.bool))
    return found


def gradients(compressor: Any, geom: GeomTokens) -> list[torch.Tensor]:
    torch.where(geom.mask_BK[..., None], geom.geom_LBKC, 0.0).square().mean().backward()
    return [parameter.grad for parameter in compressor.parameters()]


def test_which_compressors_read_pooled_tokens() -> None:
    assert READS_POOLED == {"none": True, "pool": True, "per_layer": True, "qformer": False, "gated": False}


@pytest.mark.parametrize("name", [name for name in NAMES if READS_POOLED[name]])
@pytest.mark.parametrize(("views", "per_view"), [(2, 256), (2, 98)])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_pooled_tokens_train_the_same(name: str, views: int, per_view: int, missing: float) -> None:
    """Outputs and gradients; 2 x 98 tokens do not divide by 16."""
    tokens_BVGD = tokens_of(views, per_view, missing)
    pooled_BVGD = pool_tokens(tokens_BVGD, K)
    full, pooled = build(name, views, per_view), build(name, 1, K)
    expected, found = compress(full, tokens_BVGD), compress(pooled, pooled_BVGD)
    assert torch.equal(found.mask_BK, expected.mask_BK)
    assert bool(expected.mask_BK.all()) == (missing == 0)
    torch.testing.assert_close(found.geom_LBKC, expected.geom_LBKC, atol=1e-6, rtol=0)
    for mine, theirs in zip(gradients(pooled, found), gradients(full, expected), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if not READS_POOLED[name]])
def test_the_others_would_train_something_else(name: str) -> None:
    """Their refusal of a pooled cache is needed: group means in place of tokens change what they give."""
    tokens_BVGD = tokens_of(2, 98, 0.0)
    expected, found = (
        compress(build(name, 2, 98), tokens_BVGD),
        compress(build(name, 1, K), pool_tokens(tokens_BVGD, K)),
    )
    assert (found.geom_LBKC - expected.geom_LBKC).abs().max() > 1e-3


@pytest.mark.parametrize("compressor", ["pool", "per_layer"])
def test_a_policy_gives_the_same_loss_from_the_full_and_from_the_pooled_tokens(
    spec: TokenSpec, small_vlm: dict[str, Any], make_batch: Any, compressor: str
) -> None:
    """The whole way that a user's training goes: spec, standardising, masks, compressor, DiT."""
    losses = []
    for stored in (spec, spec.model_copy(update={"pooled_to": 5})):
        policy = _policy(stored, small_vlm, compressor)
        batch = make_batch(policy)
        tokens = batch.tokens_BVGD.clone()
        tokens[1, 0, 2] = float("nan")  # no token there
        if stored.pooled_to is not None:
            tokens = pool_tokens(tokens, 5)
        losses.append(policy(replace(batch, tokens_BVGD=tokens), torch.Generator().manual_seed(0)).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("compressor", ["qformer", "gated"])
def test_a_policy_that_looks_at_single_tokens_is_not_built_on_a_pooled_cache(
    spec: TokenSpec, small_vlm: dict[str, Any], compressor: str
) -> None:
    with pytest.raises(ConfigError, match=f"compressor '{compressor}' reads every token"):
        _policy(spec.model_copy(update={"pooled_to": 5}), small_vlm, compressor)
    with pytest.raises(ConfigError, match="geom_dit_tokens=4"):
        _policy(spec.model_copy(update={"pooled_to": 4}), small_vlm, "pool")


@pytest.mark.parametrize("compressor", ["pool", "per_layer"])
@pytest.mark.parametrize("option", ["view_embedding", "position_embedding"])
def test_a_policy_that_is_told_the_tokens_places_is_not_built_on_a_pooled_cache(
    spec: TokenSpec, small_vlm: dict[str, Any], compressor: str, option: str
) -> None:
    """Its K means have no places: one view of one row would be embedded, silently."""
    with pytest.raises(ConfigError, match=rf"reads every token[\s\S]*without [\s\S]*{option}"):
        _policy(spec.model_copy(update={"pooled_to": 5}), small_vlm, compressor, {option: True})
    assert _policy(spec, small_vlm, compressor, {option: True}).config.geom_compression[option]


@pytest.mark.parametrize("compressor", ["pool", "per_layer", "qformer", "gated"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_is_no_token(
    spec: TokenSpec, small_vlm: dict[str, Any], make_batch: Any, compressor: str, bad: float
) -> None:
    """An encoder's hole must neither make the loss NaN nor change it by its value."""
    policy = _policy(spec, small_vlm, compressor)
    batch = make_batch(policy)
    mask = torch.ones(3, 2, 6, dtype=torch.bool)
    mask[1, 0, 2] = False
    tokens = batch.tokens_BVGD.clone()
    tokens[1, 0, 2, 3] = bad
    losses = [
        policy(each, torch.Generator().manual_seed(0)).loss
        for each in (replace(batch, tokens_BVGD=tokens), replace(batch, token_mask_BVG=mask))
    ]
    assert torch.equal(losses[0], losses[1])
    assert losses[0].isfinite()


def _policy(
    spec: TokenSpec, small_vlm: dict[str, Any], compressor: str, options: dict[str, bool] | None = None
) -> PolicyNet:
    dit = {"width": 32, "heads": 2, "blocks": 2, "future_tokens": 2, "horizon": 4}
    config = {
        "backbone": {"config": small_vlm},
        "dit": dit,
        "geom_compression_type": compressor,
        "geom_compression": options or {},
        "geom_dit_tokens": 5,
    }
    return PolicyNet(PolicyConfig.model_validate(config), spec, torch.full((5,), 0.5), torch.full((5,), 2.0))
