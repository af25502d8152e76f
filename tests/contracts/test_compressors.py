"""What every compressor must do, whatever its name; a new file in the folder is picked up by itself."""

from typing import Any

import pytest
import torch

from geomcache.cache_schemas.errors import GeomcacheError
from geomcache.pipeline import plugins
from geomcache.stages.train.batch import GeomTokens
from geomcache.stages.train.building import seeded

VIEWS, TOKENS, DIM, CONTEXT, BLOCKS, K = 2, 6, 5, 8, 3, 5
NAMES = plugins.names("compressor")
WITH_TOKENS = [name for name in NAMES if name != "none"]


def build(name: str, **sizes: int) -> Any:
    shape = {
        "views": VIEWS,
        "tokens_per_view": TOKENS,
        "dim": DIM,
        "context_dim": CONTEXT,
        "num_blocks": BLOCKS,
        "num_tokens": K,
    }
    with seeded(0):
        return plugins.load("compressor", name)(plugins.config_class("compressor", name)(), **(shape | sizes))


def inputs(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens_BVGD = torch.randn(batch, VIEWS, TOKENS, DIM, generator=generator)
    context_BSC = torch.randn(batch, 7, CONTEXT, generator=generator)
    mask_BVG = torch.ones(batch, VIEWS, TOKENS, dtype=torch.bool)
    return tokens_BVGD, mask_BVG, context_BSC, torch.ones(batch, 7, dtype=torch.bool)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_finite(name: str) -> None:
    compressor = build(name)
    found = compressor(*inputs())
    assert isinstance(found, GeomTokens)
    assert found.geom_LBKC.shape == (BLOCKS, 4, compressor.num_tokens, CONTEXT)
    assert found.mask_BK.shape == (4, compressor.num_tokens)
    assert found.mask_BK.dtype == torch.bool
    assert found.mask_BK.all()
    assert found.geom_LBKC.dtype == torch.float32
    assert found.geom_LBKC.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_same_numbers_every_time_and_in_every_batch(name: str) -> None:
    arguments = inputs()
    first = build(name)(*arguments).geom_LBKC
    assert torch.equal(first, build(name)(*arguments).geom_LBKC)
    alone = build(name)(*(argument[1:2] for argument in arguments)).geom_LBKC
    torch.testing.assert_close(alone, first[:, 1:2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_gradient(name: str) -> None:
    compressor = build(name)
    compressor(*inputs()).geom_LBKC.square().sum().backward() if compressor.num_tokens else None
    for parameter_name, parameter in compressor.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_masked_tokens_leave_no_trace(name: str, bad: float) -> None:
    tokens_BVGD, mask_BVG, *context = inputs()
    mask_BVG[:, 0, 2] = False
    mask_BVG[1, 1] = False
    compressor = build(name)
    clean = compressor(tokens_BVGD, mask_BVG, *context)
    soiled_BVGD = tokens_BVGD.masked_fill(~mask_BVG[..., None], bad).requires_grad_()
    found = compressor(soiled_BVGD, mask_BVG, *context)
    assert torch.equal(found.geom_LBKC, clean.geom_LBKC)
    assert torch.equal(found.mask_BK, clean.mask_BK)
    if compressor.num_tokens:
        found.geom_LBKC.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in compressor.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_without_tokens_is_masked_and_finite(name: str) -> None:
    tokens_BVGD, mask_BVG, *context = inputs()
    mask_BVG[2] = False
    found = build(name)(tokens_BVGD, mask_BVG, *context)
    assert not found.mask_BK[2].any()
    assert found.geom_LBKC.isfinite().all()


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_tokens_reach_the_output(name: str) -> None:
    tokens_BVGD, *rest = inputs()
    compressor = build(name)
    for view in range(VIEWS):
        changed = tokens_BVGD.clone()
        changed[:, view] += 1.0
        assert not torch.equal(compressor(changed, *rest).geom_LBKC, compressor(tokens_BVGD, *rest).geom_LBKC)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_padding_leaves_no_trace(name: str) -> None:
    tokens_BVGD, mask_BVG, context_BSC, context_mask_BS = inputs()
    context_mask_BS[:, :2] = False
    context_mask_BS[3] = False
    compressor = build(name)
    clean = compressor(tokens_BVGD, mask_BVG, context_BSC, context_mask_BS)
    soiled_BSC = context_BSC.masked_fill(~context_mask_BS[..., None], float("nan")).requires_grad_()
    found = compressor(tokens_BVGD, mask_BVG, soiled_BSC, context_mask_BS)
    assert found.geom_LBKC.isfinite().all()
    assert torch.equal(found.geom_LBKC, clean.geom_LBKC)
    if compressor.num_tokens:
        found.geom_LBKC.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in compressor.parameters())
        assert soiled_BSC.grad is None or soiled_BSC.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_numbers_do_not_depend_on_training_mode(name: str) -> None:
    compressor = build(name)
    assert torch.equal(compressor.train()(*inputs()).geom_LBKC, compressor.eval()(*inputs()).geom_LBKC)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_weights_come_back_from_their_state_dict(name: str) -> None:
    first, second = build(name), build(name)
    for parameter in second.parameters():
        torch.nn.init.zeros_(parameter)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(*inputs()).geom_LBKC, first(*inputs()).geom_LBKC)


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_more_tokens_out_than_in_is_refused(name: str) -> None:
    assert build(name, num_tokens=VIEWS * TOKENS).num_tokens == VIEWS * TOKENS
    for wrong in (VIEWS * TOKENS + 1, 0):
        with pytest.raises(GeomcacheError, match="geom_dit_tokens"):
            build(name, num_tokens=wrong)
