import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from geomcache.cache_schemas.errors import ConfigError
from geomcache.stages.train.batch import GeomTokens
from geomcache.stages.train.building import seeded
from geomcache.stages.train.dit import Config, Context, DiT, sinusoid

PATTERNS = ["self+cross", "interleaved"]
B, R, T, S, K, C = 2, 3, 4, 6, 5, 16


@pytest.fixture(params=PATTERNS)
def head(request: pytest.FixtureRequest) -> DiT:
    config = Config(width=32, heads=2, blocks=4, pattern=request.param, future_tokens=2, horizon=T)
    with seeded(0):
        return DiT(config, context_dim=C)


@pytest.fixture
def make_context() -> Callable[..., Context]:
    def make(head: DiT, repeats: int = 1, geometry: float = 0.0) -> Context:
        generator = torch.Generator().manual_seed(1)
        blocks = head.config.num_cross_blocks
        # layers of very different scale, as a VLM's are
        hidden = [10.0**i * torch.randn(B, S, C, generator=generator) for i in range(blocks)]
        geom_LBKC = torch.randn(blocks, B, K, C, generator=generator) + geometry
        mask_BS, mask_BK = torch.ones(B, S, dtype=torch.bool), torch.ones(B, K, dtype=torch.bool)
        mask_BS[0, :2] = False
        mask_BK[1, 3:] = False
        spread = [states.repeat_interleave(repeats, dim=0) for states in hidden]
        return head.encode_context(
            spread,
            mask_BS.repeat_interleave(repeats, dim=0),
            GeomTokens(geom_LBKC.repeat_interleave(repeats, dim=1), mask_BK.repeat_interleave(repeats, dim=0)),
        )

    return make


@pytest.fixture
def points() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(B, R, T, 7, generator=generator),
        torch.rand(B, R, generator=generator),
        torch.randn(B, 8, generator=generator),
    )


def test_shared_keys_equal_repeating_the_context(
    head: DiT, make_context: Callable[..., Context], points: tuple[torch.Tensor, ...]
) -> None:
    noisy, time, proprio = points
    shared = head(noisy, time, proprio, make_context(head))
    plain = head(
        noisy.reshape(B * R, 1, T, 7),
        time.reshape(B * R, 1),
        proprio.repeat_interleave(R, dim=0),
        make_context(head, repeats=R),
    )
    assert shared.shape == (B, R, T, 7)
    torch.testing.assert_close(shared, plain.reshape(B, R, T, 7), atol=1e-6, rtol=0)


def test_every_action_position_influences_every_other(
    head: DiT, make_context: Callable[..., Context], points: tuple[torch.Tensor, ...]
) -> None:
    noisy, time, proprio = points
    context = make_context(head)
    jacobian = torch.autograd.functional.jacobian(lambda x: head(x, time, proprio, context).sum((0, 1, 3)), noisy)
    influence_TT = jacobian.abs().sum((1, 2, 4))
    assert (influence_TT > 0).all()


def test_state_time_and_position_influence_the_output(
    head: DiT, make_context: Callable[..., Context], points: tuple[torch.Tensor, ...]
) -> None:
    noisy, time, proprio = points
    context = make_context(head)
    out = head(noisy, time, proprio, context)
    assert not torch.allclose(out, head(noisy, time, proprio + 1, context))
    assert not torch.allclose(out, head(noisy, time * 0.5, proprio, context))
    same = head(noisy[:, :, :1].expand(-1, -1, T, -1), time, proprio, context)
    assert not torch.allclose(same[:, :, 0], same[:, :, 1])


def test_every_draw_is_by_itself(
    head: DiT, make_context: Callable[..., Context], points: tuple[torch.Tensor, ...]
) -> None:
    noisy, time, proprio = points
    context = make_context(head)
    changed = noisy.clone()
    changed[:, 0] += 1
    difference = (head(changed, time, proprio, context) - head(noisy, time, proprio, context)).abs().amax((0, 2, 3))
    assert difference[0] > 1e-4
    assert (difference[1:] == 0).all()


def test_masked_context_has_no_influence_and_the_rest_has(head: DiT, points: tuple[torch.Tensor, ...]) -> None:
    blocks = head.config.num_cross_blocks
    hidden, geom_LBKC = torch.randn(blocks, B, S, C), torch.randn(blocks, B, K, C)
    mask_BS, mask_BK = torch.ones(B, S, dtype=torch.bool), torch.ones(B, K, dtype=torch.bool)
    mask_BS[:, 0] = mask_BK[:, 4] = False

    def out(hidden: torch.Tensor, geom_LBKC: torch.Tensor) -> torch.Tensor:
        return head(*points, head.encode_context(list(hidden), mask_BS, GeomTokens(geom_LBKC, mask_BK)))

    reference = out(hidden, geom_LBKC)
    for block in range(blocks):  # every cross-attending block looks at its own layer and its own geometry
        for place, matters in ((0, False), (1, True)):
            changed = hidden.clone()
            changed[block, :, place, : C // 2] += 3
            assert torch.equal(out(changed, geom_LBKC), reference) != matters
        for place, matters in ((4, False), (0, True)):
            changed = geom_LBKC.clone()
            changed[block, :, place, : C // 2] += 3
            assert torch.equal(out(hidden, changed), reference) != matters


def test_patterns_build_what_they_say() -> None:
    both = DiT(Config(width=32, heads=2, blocks=4), context_dim=C)
    assert all(block.attends_self and block.attends_context for block in both.blocks)
    config = Config(width=32, heads=2, blocks=4, pattern="interleaved")
    assert config.num_cross_blocks == 2
    head = DiT(config, context_dim=C)
    assert [block.attends_context for block in head.blocks] == [True, False, True, False]
    assert [block.attends_self for block in head.blocks] == [False, True, False, True]


@pytest.mark.parametrize(
    "bad",
    [{"blocks": 3, "pattern": "interleaved"}, {"pattern": "cros"}, {"deph": 2}],
)
def test_bad_sizes_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate(bad)


def test_the_default_head_is_the_plans() -> None:
    config = Config().resolved(2048)
    assert (config.blocks, config.width, config.heads, config.future_tokens) == (16, 2048, 32, 32)
    assert Config(width=1024).resolved(2048).heads == 16
    assert Config().resolved(16).heads == 1
    with pytest.raises(ConfigError, match="heads"):
        Config(width=30, heads=4).resolved(C)


def test_cross_pattern_is_isolated_and_builds_nothing_that_cannot_be_reached(
    make_context: Callable[..., Context], points: tuple[torch.Tensor, ...]
) -> None:
    """The published QwenPI: no position sees another one, or the state; every weight still has a gradient."""
    with seeded(0):
        head = DiT(Config(width=32, heads=2, blocks=4, pattern="cross", future_tokens=2, horizon=T), context_dim=C)
    noisy, time, proprio = points
    context = make_context(head)
    assert not hasattr(head, "state_encoder")
    assert not hasattr(head, "future_FE")
    assert not any(block.attends_self for block in head.blocks)
    jacobian = torch.autograd.functional.jacobian(lambda x: head(x, time, proprio, context).sum((0, 1, 3)), noisy)
    influence_TT = jacobian.abs().sum((1, 2, 4))
    assert (influence_TT.diagonal() > 0).all()
    assert (influence_TT - influence_TT.diagonal().diag() == 0).all()
    assert torch.equal(head(noisy, time, proprio + 1, context), head(noisy, time, proprio, context))
    head(noisy, time, proprio, make_context(head)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_gradient_checkpointing_computes_blocks_twice_and_changes_nothing(
    head: DiT, make_context: Callable[..., Context], points: tuple[torch.Tensor, ...]
) -> None:
    calls = []
    head.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for on in (False, True):
        head.gradient_checkpointing = on
        head.zero_grad()
        calls.clear()
        head(*points, make_context(head)).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in head.parameters()])
        assert len(calls) == (2 if on else 1)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sinusoid_by_hand() -> None:
    found = sinusoid(torch.tensor([0.0, 0.001]), 4)
    expected = [[1, 1, 0, 0], [math.cos(1), math.cos(0.01), math.sin(1), math.sin(0.01)]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)
