"""Training on K pooled tokens equals training on all of them, for the compressors that say so and for no others."""

from typing import Any

import pytest
import torch

from geomcache.pipeline import plugins
from geomcache.pipeline.pooling import pool_tokens
from geomcache.stages.train.batch import GeomTokens
from geomcache.stages.train.building import seeded

DIM, CONTEXT, BLOCKS, K = 64, 32, 3, 16
NAMES = [name for name in plugins.names("compressor") if name != "none"]
READS_POOLED = {name: plugins.load("compressor", name).reads_pooled for name in plugins.names("compressor")}
MEAN_D = torch.linspace(-1, 1, DIM)
STD_D = torch.logspace(-0.5, 0.5, DIM)


def build(name: str, views: int, tokens: int) -> Any:
    """The same weights whatever the number of tokens."""
    with seeded(0):
        return plugins.load("compressor", name)(
            plugins.config_class("compressor", name)(),
            views=views,
            tokens_per_view=tokens,
            dim=DIM,
            context_dim=CONTEXT,
            num_blocks=BLOCKS,
            num_tokens=K,
        )


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
