"""What every compressor must do, whatever its name; a new file in the folder is picked up by itself."""

from typing import Any

import pytest
import torch

from geomcache.cache_schemas.errors import GeomcacheError
from geomcache.pipeline import plugins
from geomcache.stages.train.batch import GeomSizes, GeomTokens
from geomcache.stages.train.building import seeded

VIEWS, GRID, DIM, CONTEXT, BLOCKS, K = 2, (2, 3), 5, 8, 3, 5
TOKENS = GRID[0] * GRID[1]
EMBEDDINGS = {"view_embedding": True, "position_embedding": True}
WITH_TOKENS = [name for name in plugins.names("compressor") if name != "none"]
ALL = [pytest.param(name, {}, id=name) for name in plugins.names("compressor")] + [
    pytest.param(name, EMBEDDINGS, id=f"{name} with embeddings") for name in WITH_TOKENS
]
every_compressor = pytest.mark.parametrize(("name", "options"), ALL)


def build(name: str, options: dict[str, Any] | None = None, views: int = VIEWS, num_tokens: int = K) -> Any:
    sizes = GeomSizes(views=views, grid=GRID, dim=DIM, context_dim=CONTEXT, num_blocks=BLOCKS, num_tokens=num_tokens)
    with seeded(0):
        return plugins.load("compressor", name)(plugins.config_class("compressor", name)(**(options or {})), sizes)


def inputs(batch: int = 4, views: int = VIEWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens_BVGD = torch.randn(batch, views, TOKENS, DIM, generator=generator)
    context_BSC = torch.randn(batch, 7, CONTEXT, generator=generator)
    mask_BVG = torch.ones(batch, views, TOKENS, dtype=torch.bool)
    return tokens_BVGD, mask_BVG, context_BSC, torch.ones(batch, 7, dtype=torch.bool)


@every_compressor
@pytest.mark.parametrize("views", [1, 2, 3])
def test_shapes_and_finite(name: str, options: dict[str, Any], views: int) -> None:
    compressor = build(name, options, views)
    found = compressor(*inputs(views=views))
    assert isinstance(found, GeomTokens)
    assert found.geom_LBKC.shape == (BLOCKS, 4, compressor.num_tokens, CONTEXT)
    assert found.mask_BK.shape == (4, compressor.num_tokens)
    assert found.mask_BK.dtype == torch.bool
    assert found.mask_BK.all()
    assert found.geom_LBKC.dtype == torch.float32
    assert found.geom_LBKC.isfinite().all()


@every_compressor
def test_same_numbers_every_time_and_in_every_batch(name: str, options: dict[str, Any]) -> None:
    arguments = inputs()
    first = build(name, options)(*arguments).geom_LBKC
    assert torch.equal(first, build(name, options)(*arguments).geom_LBKC)
    alone = build(name, options)(*(argument[1:2] for argument in arguments)).geom_LBKC
    torch.testing.assert_close(alone, first[:, 1:2], atol=1e-6, rtol=0)


@every_compressor
def test_every_parameter_gets_gradient(name: str, options: dict[str, Any]) -> None:
    compressor = build(name, options)
    compressor(*inputs()).geom_LBKC.square().sum().backward() if compressor.num_tokens else None
    for parameter_name, parameter in compressor.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@every_compressor
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_masked_tokens_leave_no_trace(name: str, options: dict[str, Any], bad: float) -> None:
    tokens_BVGD, mask_BVG, *context = inputs()
    mask_BVG[:, 0, 2] = False
    mask_BVG[1, 1] = False
    compressor = build(name, options)
    clean = compressor(tokens_BVGD, mask_BVG, *context)
    soiled_BVGD = tokens_BVGD.masked_fill(~mask_BVG[..., None], bad).requires_grad_()
    found = compressor(soiled_BVGD, mask_BVG, *context)
    assert torch.equal(found.geom_LBKC, clean.geom_LBKC)
    assert torch.equal(found.mask_BK, clean.mask_BK)
    if compressor.num_tokens:
        found.geom_LBKC.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in compressor.parameters())


@every_compressor
def test_a_sample_without_tokens_is_masked_and_finite(name: str, options: dict[str, Any]) -> None:
    tokens_BVGD, mask_BVG, *context = inputs()
    mask_BVG[2] = False
    found = build(name, options)(tokens_BVGD, mask_BVG, *context)
    assert not found.mask_BK[2].any()
    assert found.geom_LBKC.isfinite().all()


@pytest.mark.parametrize("name", WITH_TOKENS)
@pytest.mark.parametrize("views", [1, 2, 3])
def test_every_token_counts(name: str, views: int) -> None:
    """5 groups of 6, 12 or 18 tokens never come out even: none may be left over."""
    tokens_BVGD, *rest = inputs(views=views)
    tokens_BVGD.requires_grad_()
    build(name, views=views)(tokens_BVGD, *rest).geom_LBKC.square().sum().backward()
    assert tokens_BVGD.grad is not None
    assert tokens_BVGD.grad.abs().amax(dim=-1).gt(0).all()


@every_compressor
def test_prompt_padding_leaves_no_trace(name: str, options: dict[str, Any]) -> None:
    tokens_BVGD, mask_BVG, context_BSC, context_mask_BS = inputs()
    context_mask_BS[:, :2] = False
    context_mask_BS[3] = False
    compressor = build(name, options)
    clean = compressor(tokens_BVGD, mask_BVG, context_BSC, context_mask_BS)
    soiled_BSC = context_BSC.masked_fill(~context_mask_BS[..., None], float("nan")).requires_grad_()
    found = compressor(tokens_BVGD, mask_BVG, soiled_BSC, context_mask_BS)
    assert found.geom_LBKC.isfinite().all()
    assert torch.equal(found.geom_LBKC, clean.geom_LBKC)
    if compressor.num_tokens:
        found.geom_LBKC.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in compressor.parameters())
        assert soiled_BSC.grad is None or soiled_BSC.grad.isfinite().all()


@every_compressor
def test_numbers_do_not_depend_on_training_mode(name: str, options: dict[str, Any]) -> None:
    compressor = build(name, options)
    assert torch.equal(compressor.train()(*inputs()).geom_LBKC, compressor.eval()(*inputs()).geom_LBKC)


@every_compressor
def test_the_same_weights_come_back_from_their_state_dict(name: str, options: dict[str, Any]) -> None:
    first, second = build(name, options), build(name, options)
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


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_embeddings_tell_where_tokens_stand_and_nothing_else_changes(name: str) -> None:
    """Each adds its own tables, the other initial weights stay; every view, row and column gets its own gradient."""
    plain = build(name).state_dict()
    tables = {"view_embedding": {(VIEWS, CONTEXT)}, "position_embedding": {(side, CONTEXT) for side in GRID}}
    for option, shapes in tables.items():
        compressor = build(name, {option: True})
        added = {key: value for key, value in compressor.state_dict().items() if key not in plain}
        assert {tuple(table.shape) for table in added.values()} == shapes
        assert all(torch.equal(compressor.state_dict()[key], value) for key, value in plain.items())
        compressor(*inputs()).geom_LBKC.square().sum().backward()
        for key in added:
            assert compressor.get_parameter(key).grad.abs().amax(dim=1).gt(0).all(), key
        assert not torch.equal(compressor(*inputs()).geom_LBKC, build(name)(*inputs()).geom_LBKC)


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_with_embeddings_no_compressor_takes_means_for_tokens(name: str) -> None:
    compressor, config = plugins.load("compressor", name), plugins.config_class("compressor", name)
    for options in ({"view_embedding": True}, {"position_embedding": True}):
        assert not compressor.reads_pooled(config(**options))


@every_compressor
def test_gates_are_those_of_the_tokens_that_are_there(name: str, options: dict[str, Any]) -> None:
    tokens_BVGD, mask_BVG, *context = inputs()
    mask_BVG[1, 0, 2:] = False
    gate_BNC = build(name, options).gates(
        tokens_BVGD.masked_fill(~mask_BVG[..., None], float("nan")), mask_BVG, *context
    )
    if gate_BNC is None:
        return
    assert gate_BNC.shape == (4, VIEWS * TOKENS, CONTEXT)
    there_BN = mask_BVG.flatten(1)
    assert gate_BNC[~there_BN].isnan().all()
    assert gate_BNC[there_BN].gt(0).all()
    assert gate_BNC[there_BN].lt(1).all()
