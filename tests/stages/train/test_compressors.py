"""Compressors one by one: parameter formulas, and values against plain computation, token by token."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from geomcache.cache_schemas.errors import ConfigError
from geomcache.pipeline import plugins
from geomcache.stages.train.batch import GeomSizes
from geomcache.stages.train.building import seeded

BOTH = {"view_embedding": True, "position_embedding": True}


def build(
    name: str,
    views: int,
    tokens: int | tuple[int, int],
    dim: int,
    context: int,
    k: int,
    blocks: int = 2,
    **options: Any,
) -> Any:
    grid = tokens if isinstance(tokens, tuple) else (1, tokens)
    sizes = GeomSizes(views=views, grid=grid, dim=dim, context_dim=context, num_blocks=blocks, num_tokens=k)
    with seeded(0):
        return plugins.load("compressor", name)(plugins.config_class("compressor", name)(**options), sizes)


def no_context(batch: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(batch, 1, context), torch.ones(batch, 1, dtype=torch.bool)


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "dim", "expected"),  # C 2048, L 16, K 16: the plan's sizes
    [
        ("pool", 1024, 2_099_200),  # D C + C
        ("pool", 1536, 3_147_776),
        ("per_layer", 1024, 33_587_200),  # L (D C + C)
        ("per_layer", 1536, 50_364_416),
        ("qformer", 1024, 18_925_568),  # D C + C + K C + 4 C^2 + 4 C + 4 C
        ("qformer", 1536, 19_974_144),
        ("gated", 1024, 8_392_704),  # 2 D C + C^2 + 2 C
        ("gated", 1536, 10_489_856),
        ("none", 1024, 0),
    ],
)
def test_parameters_follow_the_formula(name: str, dim: int, expected: int) -> None:
    with torch.device("meta"):
        built = build(name, 2, 256, dim, 2048, 16, blocks=16)
    assert sum(p.numel() for p in built.parameters()) == expected
    assert all(p.requires_grad and p.is_meta for p in built.parameters())


@pytest.mark.parametrize(
    ("options", "added"),  # 2 views of 16 x 16 tokens, C 2048
    [
        ({"view_embedding": True}, 4_096),  # V C
        ({"position_embedding": True}, 65_536),  # (rows + columns) C
        (BOTH, 69_632),
    ],
)
def test_embeddings_are_factorised_and_shared_by_the_blocks(options: dict[str, bool], added: int) -> None:
    plain = {"pool": 2_099_200, "per_layer": 33_587_200, "qformer": 18_925_568, "gated": 8_392_704}
    for name, expected in plain.items():
        with torch.device("meta"):
            built = build(name, 2, (16, 16), 1024, 2048, 16, blocks=16, **options)
        assert sum(p.numel() for p in built.parameters()) == expected + added, name


def place_table(compressor: Any, views: int, rows: int, columns: int) -> NDArray[np.float64]:
    """What the embeddings add to each token, [N, C], one token after another in (view, row, column) order."""
    w = {key.removeprefix("embedding."): value.double().numpy() for key, value in compressor.state_dict().items()}
    table = [
        sum(w[key][i] for key, i in (("view_VC", v), ("row_hC", r), ("column_wC", c)) if key in w)
        for v in range(views)
        for r in range(rows)
        for c in range(columns)
    ]
    return np.array(table)


@pytest.mark.parametrize("name", ["pool", "per_layer", "gated"])
@pytest.mark.parametrize(("views", "grid", "k"), [(1, (3, 4), 5), (2, (3, 3), 4), (3, (2, 5), 7), (2, (2, 2), 8)])
@pytest.mark.parametrize(
    "options",
    [{}, {"view_embedding": True}, {"position_embedding": True}, BOTH],
    ids=["none", "view", "position", "both"],
)
def test_each_tokens_projection_and_place_then_the_mean_of_those_that_are_there(
    name: str, views: int, grid: tuple[int, int], k: int, options: dict[str, bool]
) -> None:
    """In numpy and float64, token by token: nothing of the order of mean, projection and embedding is reused."""
    compressor = build(name, views, grid, 6, 8, k, **options)
    for parameter in compressor.embedding.parameters():
        torch.nn.init.normal_(parameter)  # large enough to be seen beside rounding
    per_view = grid[0] * grid[1]
    tokens_BVGD, context_BSC = randn(3, views, per_view, 6), randn(3, 4, 8, seed=3)
    mask_BVG = randn(3, views, per_view, seed=2) > -0.5
    mask_BVG[1, -1] = False  # a camera without a frame
    context = context_BSC, torch.ones(3, 4, dtype=torch.bool)
    found = compressor(tokens_BVGD, mask_BVG, *context)
    w = {key: value.double().numpy() for key, value in compressor.state_dict().items()}
    place_NC = place_table(compressor, views, *grid) if options else np.zeros((views * per_view, 8))
    tokens_BND, mask_BN = tokens_BVGD.flatten(1, 2).double().numpy(), mask_BVG.flatten(1).numpy()
    state_BC = context_BSC.double().numpy().mean(axis=1)
    state_BC = (state_BC - state_BC.mean(axis=1, keepdims=True)) / np.sqrt(state_BC.var(axis=1, keepdims=True) + 1e-5)
    total = views * per_view
    for block in range(2):
        linear = f"projections.{block}" if name == "per_layer" else "projection"
        for b in range(3):
            for group in range(k):
                values = []
                for n in range(group * total // k, (group + 1) * total // k):
                    value_C = w[f"{linear}.weight"] @ tokens_BND[b, n] + w[f"{linear}.bias"] + place_NC[n]
                    if name == "gated":
                        logit_C = w["token_gate.weight"] @ tokens_BND[b, n] + w["context_gate.bias"]
                        value_C = value_C / (1 + np.exp(-logit_C - w["context_gate.weight"] @ state_BC[b]))
                    values += [value_C] * int(mask_BN[b, n])
                assert bool(found.mask_BK[b, group]) == bool(values)
                if values:
                    got_C = found.geom_LBKC[block, b, group].detach().double().numpy()
                    np.testing.assert_allclose(got_C, np.mean(values, axis=0), atol=2e-6)


def test_pool_by_hand() -> None:
    """Seven tokens in three groups: 0-1, 2-3, 4-6; equal to projecting first and averaging afterwards."""
    compressor = build("pool", 1, 7, 1, 2, 3)
    tokens_BVGD = torch.tensor([1.0, 3.0, 10.0, 20.0, 1.0, 2.0, 6.0]).view(1, 1, 7, 1)
    mask_BVG = torch.ones(1, 1, 7, dtype=torch.bool)
    mask_BVG[0, 0, 3] = False  # leaves 10 alone in its group
    found = compressor(tokens_BVGD, mask_BVG, *no_context(1, 2))
    expected_KC = compressor.projection(torch.tensor([[2.0], [10.0], [3.0]]))
    torch.testing.assert_close(found.geom_LBKC[0, 0], expected_KC)
    projected_GC = compressor.projection(tokens_BVGD[0, 0])
    torch.testing.assert_close(found.geom_LBKC[1, 0, 2], projected_GC[4:].mean(dim=0))


@pytest.mark.parametrize("name", ["pool", "per_layer", "gated"])
def test_a_group_whose_tokens_are_all_masked_is_masked(name: str) -> None:
    mask_BVG = torch.tensor([True, True, False, False, False, True]).view(1, 1, 6)
    found = build(name, 1, 6, 1, 2, 3)(torch.ones(1, 1, 6, 1), mask_BVG, *no_context(1, 2))
    assert found.mask_BK.tolist() == [[True, False, True]]


@pytest.mark.parametrize("name", ["pool", "qformer", "gated"])
def test_shared_tokens_are_not_copied_per_block(name: str) -> None:
    found = build(name, 1, 6, 1, 8, 3)(torch.ones(1, 1, 6, 1), torch.ones(1, 1, 6, dtype=torch.bool), *no_context(1, 8))
    assert found.geom_LBKC.stride(0) == 0


def test_each_block_trains_its_own_projection() -> None:
    compressor = build("per_layer", 1, 6, 4, 8, 3, blocks=3)
    found = compressor(randn(1, 1, 6, 4), torch.ones(1, 1, 6, dtype=torch.bool), *no_context(1, 8))
    found.geom_LBKC[1].square().sum().backward()
    moved = [
        projection.weight.grad is not None and bool(projection.weight.grad.any())
        for projection in compressor.projections
    ]
    assert moved == [False, True, False]


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("options", [{}, BOTH], ids=["set", "placed"])
def test_qformer_is_softmax_attention_over_the_tokens_that_are_there(heads: int, options: dict[str, bool]) -> None:
    """Recomputed in float64 sample by sample with masked tokens taken out, in plain torch functions."""
    compressor = build("qformer", 2, (3, 3), 6, 16, 5, heads=heads, **options).double()
    for norm in (compressor.token_norm, compressor.query_norm):  # else its weight and bias are not seen
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    torch.nn.init.normal_(compressor.attention.in_proj_bias)
    torch.nn.init.normal_(compressor.attention.out_proj.bias)
    tokens_BVGD, mask_BVG = randn(3, 2, 9, 6).double(), randn(3, 2, 9, seed=2) > -0.5
    mask_BVG[2, 1] = False  # a camera without a frame
    found = compressor(tokens_BVGD, mask_BVG, *no_context(3, 16))
    w = compressor.state_dict()
    place_NC = torch.from_numpy(place_table(compressor, 2, 3, 3)) if options else torch.zeros(18, 16)
    query_w, key_w, value_w = w["attention.in_proj_weight"].chunk(3)
    query_b, key_b, value_b = w["attention.in_proj_bias"].chunk(3)
    normed_KC = functional.layer_norm(w["queries_KC"], (16,), w["query_norm.weight"], w["query_norm.bias"])
    for b in range(3):
        there_N = mask_BVG[b].flatten()
        kept_ND = tokens_BVGD[b].flatten(0, 1)[there_N]
        tokens_NC = functional.linear(kept_ND, w["projection.weight"], w["projection.bias"]) + place_NC[there_N]
        tokens_NC = functional.layer_norm(tokens_NC, (16,), w["token_norm.weight"], w["token_norm.bias"])
        q_KC, k_NC, v_NC = normed_KC @ query_w.T + query_b, tokens_NC @ key_w.T + key_b, tokens_NC @ value_w.T + value_b
        mixed = []
        for head in range(heads):
            part = slice(head * 16 // heads, (head + 1) * 16 // heads)
            weights_KN = torch.softmax(q_KC[:, part] @ k_NC[:, part].T / (16 / heads) ** 0.5, dim=-1)
            mixed.append(weights_KN @ v_NC[:, part])
        expected_KC = torch.cat(mixed, dim=1) @ w["attention.out_proj.weight"].T + w["attention.out_proj.bias"]
        torch.testing.assert_close(found.geom_LBKC[0, b], expected_KC, atol=1e-12, rtol=1e-12)


def test_qformer_sees_a_set_unless_it_is_told_the_places() -> None:
    """The same tokens in another order."""
    tokens_BVGD, mask_BVG = randn(1, 2, 6, 4), torch.ones(1, 2, 6, dtype=torch.bool)
    moved_BVGD = tokens_BVGD.flatten(1, 2)[:, randn(12).argsort()].view(1, 2, 6, 4)
    for options, differs in (({}, False), ({"view_embedding": True}, True), ({"position_embedding": True}, True)):
        compressor = build("qformer", 2, (2, 3), 4, 16, 3, **options)
        first, second = (compressor(x, mask_BVG, *no_context(1, 16)).geom_LBKC for x in (tokens_BVGD, moved_BVGD))
        assert bool((first - second).abs().max() > 1e-4) == differs


def test_qformer_looks_where_the_tokens_say() -> None:
    """What is attended to depends on the tokens: no matrix of fixed weights gives the same."""
    compressor = build("qformer", 1, 8, 4, 16, 3)
    mask_BVG = torch.ones(1, 1, 8, dtype=torch.bool)
    first, second = randn(1, 1, 8, 4), randn(1, 1, 8, 4, seed=2)
    of_mean, *of_each = (
        compressor(tokens, mask_BVG, *no_context(1, 16)).geom_LBKC for tokens in ((first + second) / 2, first, second)
    )
    assert (of_mean - sum(of_each) / 2).abs().max() > 1e-3


def test_qformer_without_any_token_gives_zeros_and_no_gradient() -> None:
    compressor = build("qformer", 1, 6, 4, 8, 3)
    mask_BVG = torch.ones(2, 1, 6, dtype=torch.bool)
    mask_BVG[1] = False
    tokens_BVGD = randn(2, 1, 6, 4).masked_fill(~mask_BVG[..., None], float("nan"))
    ignored: list[torch.Tensor] = []
    compressor.attention.register_forward_pre_hook(
        lambda _m, _i, options: ignored.append(options["key_padding_mask"]), with_kwargs=True
    )
    found = compressor(tokens_BVGD, mask_BVG, *no_context(2, 8))
    assert not ignored[0].all(dim=1).any()  # kernels differ in what attention to nothing gives: 0 here, NaN elsewhere
    assert found.mask_BK.tolist() == [[True] * 3, [False] * 3]
    assert found.geom_LBKC[:, 1].eq(0).all()
    found.geom_LBKC[:, 1].sum().backward()
    assert all(parameter.grad.eq(0).all() for parameter in compressor.parameters())


def test_qformer_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"heads of qformer[\s\S]*divisor of 64[\s\S]*found: +12[\s\S]*heads to 4"):
        build("qformer", 1, 6, 4, 64, 3, heads=12)


def test_gates_are_what_forward_multiplies_with() -> None:
    """One token a group and a projection that gives 1: what comes out is the gate; prompt padding is taken out."""
    compressor = build("gated", 2, 3, 3, 4, 6)
    tokens_BVGD, context_BSC = randn(2, 2, 3, 3), randn(2, 6, 4, seed=2)
    mask_BVG, context_mask_BS = torch.ones(2, 2, 3, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    context_mask_BS[1, :4] = False
    torch.nn.init.zeros_(compressor.projection.weight)
    torch.nn.init.ones_(compressor.projection.bias)
    gate_BNC = compressor.gates(tokens_BVGD, mask_BVG, context_BSC, context_mask_BS)
    found = compressor(tokens_BVGD, mask_BVG, context_BSC, context_mask_BS)
    torch.testing.assert_close(found.geom_LBKC[0], gate_BNC, atol=1e-7, rtol=0)
    w = compressor.state_dict()
    for b in range(2):
        state_C = context_BSC[b, context_mask_BS[b]].mean(dim=0)
        state_C = (state_C - state_C.mean()) / (state_C.var(correction=0) + 1e-5).sqrt()
        for n, x_D in enumerate(tokens_BVGD[b].flatten(0, 1)):
            logit_C = w["token_gate.weight"] @ x_D + w["context_gate.weight"] @ state_C + w["context_gate.bias"]
            torch.testing.assert_close(gate_BNC[b, n], 1 / (1 + (-logit_C).exp()))


def test_only_gated_has_gates() -> None:
    arguments = randn(2, 1, 6, 4), torch.ones(2, 1, 6, dtype=torch.bool), *no_context(2, 8)
    gates = {name: build(name, 1, 6, 4, 8, 3).gates(*arguments) for name in plugins.names("compressor")}
    assert {name for name, gate_BNC in gates.items() if gate_BNC is not None} == {"gated"}
    assert build("none", 1, 6, 4, 8, 3).gates(None, None, *no_context(2, 8)) is None


def test_only_gated_looks_at_the_context_and_its_gradient_reaches_it() -> None:
    tokens_BVGD, mask_BVG = randn(2, 1, 6, 4), torch.ones(2, 1, 6, dtype=torch.bool)
    context_mask_BS = torch.ones(2, 3, dtype=torch.bool)
    looks = {}
    for name in plugins.names("compressor"):
        compressor, context_BSC = build(name, 1, 6, 4, 8, 3), randn(2, 3, 8, seed=2).requires_grad_()
        found = compressor(tokens_BVGD, mask_BVG, context_BSC, context_mask_BS).geom_LBKC
        other = compressor(tokens_BVGD, mask_BVG, context_BSC.flip(0), context_mask_BS).geom_LBKC
        looks[name] = not torch.equal(found, other)
        if looks[name]:
            found.sum().backward()
            assert context_BSC.grad is not None
            assert context_BSC.grad.abs().amax(dim=(1, 2)).gt(0).all()
    assert looks == {name: name == "gated" for name in looks}


def test_gated_is_not_switched_off_by_an_outlier_channel_of_the_vlm() -> None:
    """One channel of the last hidden state a thousand times the others: the gate still learns from every sample."""
    compressor = build("gated", 1, 6, 4, 64, 3)
    context_BSC = randn(2, 3, 64, seed=2)
    context_BSC[..., 5] += 3000.0
    gate_BNC = compressor.gates(
        randn(2, 1, 6, 4), torch.ones(2, 1, 6, dtype=torch.bool), context_BSC, torch.ones(2, 3, dtype=torch.bool)
    )
    assert gate_BNC.min() > 0.05
    assert gate_BNC.max() < 0.95
