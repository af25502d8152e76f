from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from geomcache.cache_schemas.errors import ConfigError, UnknownName
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.policy import PolicyConfig, PolicyNet

MakePolicy = Callable[..., PolicyNet]
MakeBatch = Callable[..., PolicyBatch]
Draw = Callable[[int], torch.Generator]
KINDS = [(c, p) for c in ("none", "pool", "per_layer", "qformer", "gated") for p in ("self+cross", "interleaved")]


@pytest.mark.parametrize(("compressor", "pattern"), KINDS)
def test_every_trainable_tensor_gets_gradient(
    make_policy: MakePolicy, make_batch: MakeBatch, draw: Draw, compressor: str, pattern: str
) -> None:
    policy = make_policy(compressor, pattern)
    policy(make_batch(policy), draw(0)).loss.backward()
    without = [
        name
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.abs().sum() == 0)
    ]
    assert without == []


def test_frozen_vlm_gets_no_gradient_and_the_rest_does(
    make_policy: MakePolicy, make_batch: MakeBatch, draw: Draw
) -> None:
    policy = make_policy(backbone={"freeze": "all"})
    policy.loss(make_batch(policy), draw(0)).loss.backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone."), name


def test_loss_by_hand(make_policy: MakePolicy, make_batch: MakeBatch) -> None:
    """A head that always answers 0: the loss is the mean square of (action - noise) over real actions."""
    policy = make_policy()
    torch.nn.init.zeros_(policy.dit.out.weight)
    torch.nn.init.zeros_(policy.dit.out.bias)
    mask_BT = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    batch = make_batch(policy, action_mask_BT=mask_BT)
    noise_BRTA = torch.randn(3, 2, 4, 7)
    found = policy.loss(batch, noise_BRTA=noise_BRTA, time_BR=torch.rand(3, 2))
    squares = (batch.actions_BTA[:, None] - noise_BRTA).square()
    kept = [squares[b, r, t] for b in range(3) for r in range(2) for t in range(4) if mask_BT[b, t]]
    torch.testing.assert_close(found.per_dim_A, torch.stack(kept).mean(dim=0))
    torch.testing.assert_close(found.loss, torch.stack(kept).mean())
    assert found.valid_actions == 7
    assert found.per_dim_A.shape == (7,)


def test_padded_actions_do_not_change_the_loss(make_policy: MakePolicy, make_batch: MakeBatch, draw: Draw) -> None:
    """Neither by their own error nor, through self-attention, by that of the real ones."""
    policy = make_policy()
    mask_BT = torch.ones(3, 4, dtype=torch.bool)
    mask_BT[1, 2:] = False
    batch = make_batch(policy, action_mask_BT=mask_BT)
    soiled = replace(batch, actions_BTA=torch.where(mask_BT[..., None], batch.actions_BTA, 1e3))
    a, b = policy.loss(batch, draw(0)), policy.loss(soiled, draw(0))
    assert torch.equal(a.loss, b.loss)
    nan = replace(batch, actions_BTA=torch.where(mask_BT[..., None], batch.actions_BTA, float("nan")))
    assert torch.equal(a.loss, policy.loss(nan, draw(0)).loss)


def test_same_generator_same_loss_and_actions(make_policy: MakePolicy, make_batch: MakeBatch, draw: Draw) -> None:
    first, second = make_policy(), make_policy()
    batch = make_batch(first)
    state = torch.get_rng_state()
    assert torch.equal(first.loss(batch, draw(3)).loss, second.loss(batch, draw(3)).loss)
    assert not torch.equal(first.loss(batch, draw(3)).loss, first.loss(batch, draw(4)).loss)
    assert torch.equal(first.sample(batch, draw(3)), second.sample(batch, draw(3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_compressor_differs_between_seeds_of_one_ablation(make_policy: MakePolicy) -> None:
    none, pool = make_policy("none").state_dict(), make_policy("pool").state_dict()
    shared = [name for name in none if not name.startswith("token_")]
    assert all(torch.equal(none[name], pool[name]) for name in shared)
    assert {name.split(".")[0] for name in pool if name not in none} == {"compressor"}


def test_geometry_reaches_the_actions_unless_masked(make_policy: MakePolicy, make_batch: MakeBatch) -> None:
    policy = make_policy("pool").eval()
    mask_BVG = torch.ones(3, 2, 6, dtype=torch.bool)
    mask_BVG[:, 1, 2:] = False
    noise_BTA = torch.randn(3, 4, 7)
    batch = make_batch(policy, token_mask_BVG=mask_BVG)
    actions = policy.sample(batch, noise_BTA=noise_BTA)
    other = replace(batch, tokens_BVGD=torch.where(mask_BVG[..., None], batch.tokens_BVGD + 1, batch.tokens_BVGD))
    assert (policy.sample(other, noise_BTA=noise_BTA) - actions).abs().max() > 1e-5
    for bad in (float("nan"), 1e20):
        soiled = replace(batch, tokens_BVGD=torch.where(mask_BVG[..., None], batch.tokens_BVGD, bad))
        assert torch.equal(policy.sample(soiled, noise_BTA=noise_BTA), actions)


def test_without_geometry_tokens_are_not_looked_at(make_policy: MakePolicy, make_batch: MakeBatch) -> None:
    noise_BTA = torch.randn(3, 4, 7)
    for policy in (make_policy("none").eval(), make_policy("pool", geom_inject_to_dit=False).eval()):
        batch = make_batch(policy)
        bare = replace(batch, tokens_BVGD=None)
        assert torch.equal(policy.sample(bare, noise_BTA=noise_BTA), policy.sample(batch, noise_BTA=noise_BTA))
        assert not list(policy.compressor.parameters())


def test_masking_all_geometry_equals_the_baseline(make_policy: MakePolicy, make_batch: MakeBatch) -> None:
    pool, none = make_policy("pool").eval(), make_policy("none").eval()
    noise_BTA = torch.randn(3, 4, 7)
    batch = make_batch(pool, token_mask_BVG=torch.zeros(3, 2, 6, dtype=torch.bool))
    torch.testing.assert_close(
        pool.sample(batch, noise_BTA=noise_BTA), none.sample(batch, noise_BTA=noise_BTA), atol=1e-6, rtol=0
    )


def test_an_episode_does_not_depend_on_its_neighbours(make_policy: MakePolicy, make_batch: MakeBatch) -> None:
    policy = make_policy(backbone={"prompt_length": 48}).eval()
    assert not policy.training
    batch = make_batch(policy)
    noise_BTA = torch.stack([policy.draw_noise(seed) for seed in range(3)])
    together = policy.sample(batch, noise_BTA=noise_BTA)
    patches = len(batch.pixel_values) // 3
    for row in range(3):
        alone = PolicyBatch(
            batch.input_ids_BS[row : row + 1],
            batch.attention_mask_BS[row : row + 1],
            batch.mm_token_type_ids_BS[row : row + 1],
            batch.pixel_values[row * patches : (row + 1) * patches],
            batch.image_grid_thw[row * 2 : row * 2 + 2],
            batch.proprio_BP[row : row + 1],
            tokens_BVGD=batch.tokens_BVGD[row : row + 1],
        )
        found = policy.sample(alone, noise_BTA=policy.draw_noise(row)[None])
        torch.testing.assert_close(found[0], together[row], atol=1e-5, rtol=0)


def test_sampling_is_euler_on_the_head(make_policy: MakePolicy, make_batch: MakeBatch) -> None:
    policy = make_policy(num_inference_timesteps=2).eval()
    batch, noise_BTA = make_batch(policy), torch.randn(3, 4, 7)
    with torch.no_grad():
        context = policy.encode_context(batch)
        x_B1TA = noise_BTA[:, None]
        for t in (0.0, 0.5):
            x_B1TA = x_B1TA + 0.5 * policy.dit(x_B1TA, torch.full((3, 1), t), batch.proprio_BP, context)
    torch.testing.assert_close(policy.sample(batch, noise_BTA=noise_BTA), x_B1TA[:, 0])


def test_head_stays_in_float32_under_autocast(make_policy: MakePolicy, make_batch: MakeBatch, draw: Draw) -> None:
    policy = make_policy()
    batch = make_batch(policy)
    seen = []
    policy.dit.out.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    policy.compressor.projection.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = policy(batch, draw(0)).loss
        hidden, _ = policy.backbone(batch)
    assert seen == [torch.float32, (torch.float32, torch.float32)]
    assert mixed.dtype == torch.float32
    plain = policy(batch, draw(0)).loss
    assert not torch.equal(plain, mixed)  # the VLM did run in bfloat16
    torch.testing.assert_close(plain, mixed, rtol=0.05, atol=0)
    assert hidden[-1].isfinite().all()


def test_rebuilt_from_its_config_and_weights(
    make_policy: MakePolicy, make_batch: MakeBatch, spec: TokenSpec, tmp_path: Path
) -> None:
    policy = make_policy(seed=4).eval()
    policy.save_backbone(tmp_path)
    config = PolicyConfig.model_validate_json(policy.config.model_dump_json())
    assert config == policy.config
    assert config.vlm_layers == (2, 3)
    rebuilt = PolicyNet(config, spec, backbone_folder=tmp_path).eval()
    rebuilt.load_state_dict(policy.state_dict())
    assert rebuilt.token_mean_D.tolist() == [0.5] * 5
    assert rebuilt.config == policy.config
    batch, noise_BTA = make_batch(policy), torch.randn(3, 4, 7)
    assert torch.equal(rebuilt.sample(batch, noise_BTA=noise_BTA), policy.sample(batch, noise_BTA=noise_BTA))


def test_tokens_are_standardised(make_policy: MakePolicy, make_batch: MakeBatch, spec: TokenSpec) -> None:
    policy = make_policy()
    batch = make_batch(policy)
    seen = []
    policy.compressor.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    policy.sample(batch, noise_BTA=torch.zeros(3, 4, 7))
    torch.testing.assert_close(seen[0], (batch.tokens_BVGD - 0.5) / 2.0)
    constant = PolicyNet(policy.config, spec, torch.zeros(5), torch.zeros(5))
    assert constant.token_std_D.tolist() == [1.0] * 5


def test_what_does_not_fit_is_refused(make_policy: MakePolicy, make_batch: MakeBatch, spec: TokenSpec) -> None:
    policy = make_policy()
    with pytest.raises(ConfigError, match="needs geometry tokens"):
        PolicyNet(policy.config, None)
    with pytest.raises(ConfigError, match="geom_dit_tokens"):
        make_policy(geom_dit_tokens=13)
    with pytest.raises(UnknownName, match="compressor"):
        make_policy("pooll")
    with pytest.raises(ConfigError, match="token_mean_D"):
        PolicyNet(policy.config, spec, torch.zeros(4), torch.ones(4))
    with pytest.raises(ConfigError, match="tokens \\[B, V, G, D\\]"):
        policy.loss(make_batch(policy, tokens_BVGD=torch.zeros(3, 2, 6, 4)), torch.Generator())
    with pytest.raises(ConfigError, match="vlm_layers"):
        make_policy(vlm_layers=(1, 2, 3))


def test_batch_moves_whole(make_policy: MakePolicy, make_batch: MakeBatch) -> None:
    batch = make_batch(make_policy())
    moved = batch.to("meta")
    assert len(moved) == 3
    assert moved.tokens_BVGD.device.type == moved.pixel_values.device.type == "meta"
    assert moved.token_mask_BVG is None


@pytest.mark.slow
def test_overfits_one_batch(make_policy: MakePolicy, make_batch: MakeBatch, draw: Draw) -> None:
    """The loss falls to a third, and sampled actions come much closer to the data than the mean action."""
    policy = make_policy(dit={"width": 64, "heads": 4})
    batch = make_batch(policy, size=4)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    losses = []
    for step in range(300):
        loss = policy(batch, draw(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-20:]) < sum(losses[:20]) / 3
    error = (policy.eval().sample(batch, draw(0)) - batch.actions_BTA).abs().mean()
    assert error < 0.5 * (batch.actions_BTA - batch.actions_BTA.mean((0, 1))).abs().mean()
