"""Is the geometry used: every number against another way to get it, and policies that must be told apart."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from geomcache.cache_schemas.errors import TrainingFailed
from geomcache.stages.train import flow
from geomcache.stages.train.batch import GeomTokens, PolicyBatch
from geomcache.stages.train.diagnose import DRAWS, attention_weights, effective_rank, measure, varying_share
from geomcache.stages.train.diagnose_picture import diagnosis_picture
from geomcache.stages.train.diagnosis import Diagnosis, Effect, Spread
from geomcache.stages.train.dit import CrossAttention
from geomcache.stages.train.policy import PolicyNet

Make = Callable[..., Any]


def measured(policy: PolicyNet, batch: PolicyBatch, **options: Any) -> Diagnosis:
    found = measure(policy, batch, **options)
    assert found is not None
    return found


def excite(policy: PolicyNet, scale: float = 10.0) -> None:
    """Fresh cross-attention is nearly uniform; larger queries make it look at something."""
    for module in policy.modules():
        if isinstance(module, CrossAttention):
            with torch.no_grad():
                module.query.weight.mul_(scale)


def draws_of(policy: PolicyNet, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Times, noise and starting noise of seed 0, as ``measure`` documents their order."""
    generator = torch.Generator().manual_seed(0)
    time_BR = flow.sample_time((size, DRAWS), generator)
    noise_BRTA = torch.randn((size, DRAWS, *policy.chunk_shape), generator=generator)
    return time_BR, noise_BRTA, torch.randn((size, *policy.chunk_shape), generator=generator)


def test_attention_weights_by_hand_and_against_torch() -> None:
    one = torch.ones(1, 1, 1, 4)
    keys = torch.stack([torch.zeros(4), torch.full((4,), math.log(3) / 2), torch.full((4,), 9.0)])[None, None]
    found = attention_weights(one, keys, torch.tensor([[True, True, False]]))  # scores 0 and log 3; the third masked
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0.25, 0.75, 0.0]))
    query, keys, values = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    expected = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask[:, None, None])
    torch.testing.assert_close(attention_weights(query, keys, mask) @ values, expected)


@pytest.mark.parametrize("pattern", ["self+cross", "interleaved", "cross"])
def test_attention_mass_is_what_torch_gives_geometry(make_policy: Make, make_batch: Make, pattern: str) -> None:
    """Torch's own attention, with values 1 for geometry and 0 for the prompt, returns the mass itself."""
    policy = make_policy("per_layer", pattern).eval()
    excite(policy)
    batch = make_batch(policy, 3)
    batch.tokens_BVGD[1, 0, :3] = math.nan  # a masked group of the first view
    seen: list[torch.Tensor] = []

    def look(attention: CrossAttention, given: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        x_BRNE, keys, _values, mask = given
        B, _R, N, E = x_BRNE.shape
        q = attention.query(x_BRNE).view(B, N, attention.heads, E // attention.heads).transpose(1, 2)
        is_geometry = torch.zeros(*keys.shape[:3], 1)
        is_geometry[:, :, -5:] = 1.0
        mass = functional.scaled_dot_product_attention(q, keys, is_geometry, attn_mask=mask[:, None, None])
        seen.append(mass[:, :, -4:].mean())  # four action positions

    attentions = [module for module in policy.modules() if isinstance(module, CrossAttention)]
    hooks = [module.register_forward_hook(look) for module in attentions]
    policy.sample(batch, noise_BTA=draws_of(policy, 3)[2])
    for hook in hooks:
        hook.remove()
    expected = torch.stack(seen).view(4, len(attentions)).T
    found = measured(policy, batch)
    torch.testing.assert_close(torch.tensor([block.mass for block in found.blocks]), expected)
    assert expected.std() > 1e-4  # else the order of blocks and steps could not be seen
    assert [block.vlm_layer for block in found.blocks] == list(policy.config.vlm_layers)


def test_indifferent_attention_has_the_uniform_share(make_policy: Make, make_batch: Make) -> None:
    policy = make_policy()
    excite(policy, 0.0)
    for module in policy.modules():
        if isinstance(module, CrossAttention):
            torch.nn.init.zeros_(module.query.bias)
    batch = make_batch(policy, 3)
    batch.tokens_BVGD[0, 0, :2] = math.nan  # the first of the five groups of 2, 2, 2, 2, 4 tokens
    prompt_B = batch.attention_mask_BS.sum(dim=1)
    assert len(prompt_B.unique()) > 1  # padding that must not be counted
    geometry_B = torch.tensor([4, 5, 5])
    share = float((geometry_B / (geometry_B + prompt_B)).mean())
    found = measured(policy, batch)
    assert found.uniform_share == pytest.approx(share)
    for block in found.blocks:
        assert block.mass == pytest.approx([share] * 4)
        assert block.entropy == pytest.approx([1.0] * 4)
    assert found.prompt_tokens == pytest.approx(float(prompt_B.float().mean()))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_losses_and_actions_are_the_policys_own(make_policy: Make, make_batch: Make, precision: str) -> None:
    """Eleven rows, so in two parts; each changed batch is given to the policy's own loss and sampler."""
    policy, size = make_policy().eval(), 11
    excite(policy)
    batch = make_batch(policy, size)
    time_BR, noise_BRTA, start_BTA = draws_of(policy, size)
    mean_BVGD = torch.full_like(batch.tokens_BVGD, 0.5)  # the fixture's channel means
    changed = {
        "own": batch,
        "shuffled": replace(batch, tokens_BVGD=torch.cat([batch.tokens_BVGD[-5:], batch.tokens_BVGD[:-5]])),
        "masked": replace(batch, token_mask_BVG=torch.zeros(size, 2, 6, dtype=torch.bool)),
        "zeroed": replace(batch, tokens_BVGD=mean_BVGD),
    }
    with policy.autocast(precision):
        with torch.no_grad():
            losses = {n: float(policy.loss(b, noise_BRTA=noise_BRTA, time_BR=time_BR).loss) for n, b in changed.items()}
        actions = {name: policy.sample(each, noise_BTA=start_BTA) for name, each in changed.items()}
        found = measured(policy, batch)
    close = 1e-5 if precision == "no" else 2e-3
    assert found.loss.mean == pytest.approx(losses["own"], abs=close)
    for name, effect in found.effects.items():
        assert effect.loss.mean == pytest.approx(losses[name] - losses["own"], abs=close)
        assert effect.actions.mean == pytest.approx(float((actions[name] - actions["own"]).abs().mean()), abs=close)
        assert effect.actions.mean > 0
    moved = ((changed["shuffled"].tokens_BVGD - batch.tokens_BVGD) / 2).square().mean().sqrt()
    assert found.shuffled is not None
    assert found.shuffled.tokens_moved == pytest.approx(float(moved))


def test_each_row_weighs_the_same_and_padded_actions_nothing(make_policy: Make, make_batch: Make) -> None:
    policy = make_policy().eval()
    mask_BT = torch.tensor([[True, False, False, False], [True] * 4, [True, True, True, False]])
    batch = make_batch(policy, 3, action_mask_BT=mask_BT)
    time_BR, noise_BRTA, _ = draws_of(policy, 3)
    found = measured(policy, batch)
    losses = []
    for row in range(3):  # a batch in which only this row has actions
        only = torch.zeros(3, 4, dtype=torch.bool)
        only[row] = mask_BT[row]
        with torch.no_grad():
            given = replace(batch, action_mask_BT=only)
            losses.append(float(policy.loss(given, noise_BRTA=noise_BRTA, time_BR=time_BR).loss))
    # positions behind the mask are 0 in the sequence for every row but the one that is left: the same as measured
    assert found.loss.mean == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert found.loss.error == pytest.approx(float(np.std(losses, ddof=1)) / math.sqrt(3), rel=1e-4)
    soiled = batch.actions_BTA.masked_fill(~mask_BT[..., None], 1e6)
    assert measured(policy, replace(batch, actions_BTA=soiled)) == found


def test_nothing_of_the_policy_changes(make_policy: Make, make_batch: Make) -> None:
    """Also in the middle of training: dropout, geometry dropout, gradients that stand, parts in another mode."""
    policy = make_policy("gated", dit={"dropout": 0.5})
    batch = make_batch(policy, 3)
    expected = measured(policy.eval(), batch)
    policy.train()
    policy.dit.blocks[1].eval()
    policy.compressor.projection.weight.grad = torch.ones_like(policy.compressor.projection.weight)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    modes = [module.training for module in policy.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in policy.parameters()]
    random, batch_before = torch.get_rng_state(), copy.deepcopy(batch)
    assert measured(policy, batch) == expected
    assert measured(policy, batch, seed=1).loss != expected.loss
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert [module.training for module in policy.modules()] == modes
    for parameter, grad in zip(policy.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for part in (policy.dit, policy.compressor) for module in part.modules())
    assert torch.equal(batch.tokens_BVGD, batch_before.tokens_BVGD)
    assert not batch.tokens_BVGD.requires_grad


@pytest.mark.parametrize("freeze", ["none", "all"])
def test_gradients_are_those_of_backward(make_policy: Make, make_batch: Make, freeze: str) -> None:
    policy = make_policy("qformer", backbone={"freeze": freeze}).eval()
    batch = make_batch(policy, 3)
    time_BR, noise_BRTA, _ = draws_of(policy, 3)
    found = measured(policy, batch).gradients
    other = copy.deepcopy(policy)
    tokens = batch.tokens_BVGD.clone().requires_grad_()
    other.loss(replace(batch, tokens_BVGD=tokens), noise_BRTA=noise_BRTA, time_BR=time_BR).loss.backward()
    modules = {"compressor": other.compressor, "dit": other.dit, "vlm": other.backbone}
    for name, gradient in {"compressor": found.compressor, "dit": found.dit, "vlm": found.vlm}.items():
        trained = [p for p in modules[name].parameters() if p.requires_grad]
        if name == "vlm" and freeze == "all":
            assert gradient is None
            continue
        assert gradient is not None
        norm = torch.cat([p.grad.flatten() for p in trained]).norm()
        assert gradient.norm == pytest.approx(float(norm), rel=1e-4)
        weights = torch.cat([p.detach().flatten() for p in trained]).norm()
        assert gradient.over_weights == pytest.approx(float(norm / weights), rel=1e-4)
    assert tokens.grad is not None
    by_standardised = 3 * 2.0 * tokens.grad.flatten(1).norm(dim=1).mean()  # a third of each row's loss; std 2
    assert found.tokens == pytest.approx(float(by_standardised), rel=1e-4)
    assert found.samples == 3


def test_effective_rank_by_hand() -> None:
    cross = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # singular values in the ratio 3 : 1
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(cross) == pytest.approx(expected)
    assert effective_rank(cross + 7.0) == pytest.approx(expected)  # less their mean
    assert effective_rank(torch.eye(5)) == pytest.approx(4.0)
    assert effective_rank(torch.tensor([[1.0, 2.0], [3.0, 6.0], [2.0, 4.0]])) == pytest.approx(1.0)
    assert effective_rank(torch.randn(7).expand(4, 7) * 1e3) == 0.0
    assert effective_rank(torch.ones(1, 3)) == 0.0


def test_varying_share_by_hand() -> None:
    tokens_KC = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert varying_share(tokens_KC.expand(3, 2, 2)) == 0.0  # the same tokens whatever is seen
    scenes_B = torch.tensor([1.0, -1.0])[:, None, None]
    assert varying_share(scenes_B.expand(2, 3, 4)) == 1.0
    half = tokens_KC + torch.tensor([0.0, 1.0]) * scenes_B  # one channel tells tokens apart, the other scenes
    assert varying_share(half) == pytest.approx(0.5)
    assert varying_share(torch.ones(2, 2, 2)) == 0.0


@pytest.mark.parametrize(("bias", "place"), [(0.0, 5), (10.0, 9), (-10.0, 0)])
def test_gates_are_read_where_tokens_are(make_policy: Make, make_batch: Make, bias: float, place: int) -> None:
    policy = make_policy("gated")
    for layer in (policy.compressor.token_gate, policy.compressor.context_gate):
        torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(policy.compressor.context_gate.bias, bias)
    batch = make_batch(policy, 2)
    batch.tokens_BVGD[0, 0] = math.nan
    gates = measured(policy, batch).gates
    assert gates is not None
    assert gates.histogram == pytest.approx([float(bin_ == place) for bin_ in range(10)])
    assert gates.mean == pytest.approx(1 / (1 + math.exp(-bias)))
    assert (gates.below, gates.above) == (float(place == 0), float(place == 9))


def test_without_geometry_there_is_nothing_to_measure(make_policy: Make, make_batch: Make) -> None:
    policy = make_policy("none")
    assert measure(policy, make_batch(policy, 2)) is None


def test_one_row_has_no_verdict_and_no_spread(make_policy: Make, make_batch: Make) -> None:
    policy = make_policy("gated")
    found = measured(policy, make_batch(policy, 1))
    assert found.shuffled is None
    assert found.used is None
    assert "one row cannot be shuffled" in found.verdict()
    assert (found.loss.error, found.blocks[0].rank_over_samples, found.blocks[0].varying_share) == (None, None, None)
    assert set(found.effects) == {"masked", "zeroed"}
    assert Diagnosis.model_validate_json(found.model_dump_json()) == found
    assert diagnosis_picture(found, "one row")[:4] == b"\x89PNG"


def test_equal_geometry_cannot_be_shuffled(make_policy: Make, make_batch: Make) -> None:
    policy = make_policy()
    batch = make_batch(policy, 4)
    found = measured(policy, replace(batch, tokens_BVGD=batch.tokens_BVGD[:1].expand(4, -1, -1, -1)))
    assert found.used is None
    assert "all rows have the same geometry" in found.verdict()
    assert found.masked.actions.mean > 0


def test_rows_without_any_token_are_finite(make_policy: Make, make_batch: Make) -> None:
    policy = make_policy()
    found = measured(policy, make_batch(policy, 3, tokens_BVGD=torch.full((3, 2, 6, 5), math.nan)))
    assert (found.mass, found.uniform_share, found.gradients.tokens) == (0.0, 0.0, 0.0)
    assert all(math.isfinite(value) for value in found.flat().values())
    assert diagnosis_picture(found, "no tokens")[:4] == b"\x89PNG"


def test_a_policy_that_is_not_finite_is_named(make_policy: Make, make_batch: Make) -> None:
    policy = make_policy()
    torch.nn.init.constant_(policy.dit.out.bias, math.nan)
    with pytest.raises(TrainingFailed, match="not finite"):
        measure(policy, make_batch(policy, 2))


def test_a_policy_cut_off_from_its_tokens_is_found_out(
    make_policy: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cuts: tokens that are never attended to, and tokens that are attended to and say nothing."""
    policy = make_policy()
    batch = make_batch(policy, 4)
    forward = policy.compressor.forward

    def masked(*given: torch.Tensor) -> GeomTokens:
        geom = forward(*given)
        return GeomTokens(geom.geom_LBKC, torch.zeros_like(geom.mask_BK))

    def constant(*given: torch.Tensor) -> GeomTokens:
        geom = forward(*given)
        return GeomTokens(torch.ones_like(geom.geom_LBKC), geom.mask_BK)

    for cut, mass in ((masked, False), (constant, True)):
        monkeypatch.setattr(policy.compressor, "forward", cut)
        found = measured(policy, batch)
        assert found.used == "unreached"
        assert "does not reach the actions" in found.verdict()
        assert found.gradients.compressor is not None
        assert (found.gradients.compressor.norm, found.gradients.tokens) == (0.0, 0.0)
        assert (found.mass > 0.01) == mass  # attention alone would not have told
        assert (found.masked.actions.mean > 0) == mass


@pytest.mark.parametrize("source", ["tokens", "state"])
def test_a_policy_that_learned_from_its_tokens_is_told_from_one_that_did_not(
    make_policy: Make, make_batch: Make, source: str
) -> None:
    """Actions that are a function of the tokens alone, or of the state alone; a short training on each."""
    policy = make_policy(backbone={"freeze": "all"}, repeated_diffusion_steps=8).train()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    template = make_batch(policy, 16)

    def fresh(seed: int) -> Any:
        random = torch.Generator().manual_seed(seed)
        scene_BD = torch.randn(16, 5, generator=random)
        tokens_BVGD = 0.5 + 2.0 * scene_BD[:, None, None].expand(-1, 2, 6, -1)
        state_BP = torch.randn(16, 8, generator=random)
        told = scene_BD if source == "tokens" else state_BP
        actions_BTA = told[:, None, :1].expand(-1, 4, 7)
        return replace(template, tokens_BVGD=tokens_BVGD, proprio_BP=state_BP, actions_BTA=actions_BTA)

    for step in range(60):
        policy.loss(fresh(step), generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = measured(policy, fresh(10_000))
    assert found.loss.mean < 0.7  # it learned
    assert found.shuffled is not None
    if source == "tokens":
        assert found.used == "yes"
        assert "uses its geometry" in found.verdict()
        assert found.shuffled.loss.mean > found.loss.mean
        assert found.shuffled.actions.mean > 3 * found.noise_actions.mean
    else:
        assert found.used in ("no sign", "hardly")
        assert found.shuffled.actions.mean < 0.1


@pytest.mark.parametrize(
    ("mean", "error", "moved", "word", "said"),
    [
        (0.10, 0.02, 1.0, "yes", "raises the loss by 20 % (+- 8 %, two standard errors over 4 rows): this policy uses"),
        (0.10, 0.06, 1.0, "no sign", "within its spread"),
        (0.004, 0.001, 1.0, "hardly", "raises the loss by 0.8 % (+- 0.4 %"),
        (-0.10, 0.02, 1.0, "harmful", "lowers the loss by 20 %"),
        (0.10, 0.06, 0.05, "no sign", "only 0.05 standard deviations apart"),
    ],
)
def test_the_rule_of_the_verdict(
    make_policy: Make, make_batch: Make, mean: float, error: float, moved: float, word: str, said: str
) -> None:
    policy = make_policy()
    effect = Effect(loss=Spread(mean=mean, error=error), actions=Spread(mean=0.1, error=0.0), tokens_moved=moved)
    found = measured(policy, make_batch(policy, 4))
    found = found.model_copy(update={"loss": Spread(mean=0.5, error=0.0), "shuffled": effect})
    assert found.used == word
    assert said in found.verdict()


def test_few_numbers_for_logging(make_policy: Make, make_batch: Make) -> None:
    policy = make_policy("gated")
    found = measured(policy, make_batch(policy, 3)).flat()
    assert list(found) == [
        "geometry/attention_mass",
        "geometry/uniform_share",
        "geometry/shuffled_loss_change",
        "geometry/shuffled_action_change",
        "geometry/masked_loss_change",
        "geometry/masked_action_change",
        "geometry/zeroed_loss_change",
        "geometry/zeroed_action_change",
        "geometry/effective_rank",
        "geometry/compressor_gradient_norm",
        "geometry/dit_gradient_norm",
        "geometry/gate_mean",
    ]
    assert all(type(value) is float for value in found.values())
