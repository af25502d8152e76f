"""Is the geometry used? One batch, seen through a policy as it is: attention, causal tests, gates, ranks, gradients.

``docs/diagnose.md`` says what each number is, where it comes from and how it can mislead. The policy is left exactly
as it was: weights, gradients, modes, and the global generators too.

Non-obvious:
- The VLM does not see the geometry, so its states are made once and shared by every way of giving the tokens.
- ``scaled_dot_product_attention`` returns no weights: a hook on ``CrossAttention`` makes them again from its inputs.
- Gradients come from ``torch.autograd.grad``, which touches no ``.grad`` and wakes no hook of DDP or DeepSpeed. Weights
  that FSDP has split over ranks are out of its reach.

Shape letters: I Euler steps, R draws of (noise, time); the others as in ``batch.py`` and ``dit.py``.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from geomcache.cache_schemas.errors import TrainingFailed
from geomcache.stages.train import flow
from geomcache.stages.train.batch import GeomTokens, PolicyBatch
from geomcache.stages.train.diagnosis import Block, Diagnosis, Effect, Gates, Gradient, Gradients, Spread
from geomcache.stages.train.dit import Context, CrossAttention
from geomcache.stages.train.policy import PolicyNet, mask_geometry

DRAWS = 8  # of (noise, time) for each sample's loss
SAMPLES_AT_A_TIME = 8  # what is in memory together; gradients are taken of no more
GATE_BINS = 10  # of [0, 1]: the first and the last are the shares below 0.1 and from 0.9 on


def measure(
    policy: PolicyNet,
    batch: PolicyBatch,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Diagnosis | None:
    """Measure ``policy`` on one batch; the same numbers for the same seed, whatever mode the policy is in.

    As in the policy, the VLM runs under the caller's autocast and the rest in float32.

    Args:
        policy: whole in this process (not split by FSDP); measured in eval mode.
        batch: with tokens and actions, on the policy's device; rows of many episodes, best held out.
        seed: of noise and times, which are the same for every way of giving the geometry.
        draws: R.

    Returns:
        None for a policy without geometry.

    Raises:
        TrainingFailed: the policy's losses, actions or gradients are not finite.
    """
    if policy.token_spec is None:
        return None
    assert batch.actions_BTA is not None, "a batch without actions has no loss"
    size, device = len(batch), batch.actions_BTA.device
    generator = torch.Generator().manual_seed(seed)
    random = _Random(
        time_BR=flow.sample_time((size, draws), generator).to(device),
        noise_BRTA=torch.randn((size, draws, *policy.chunk_shape), generator=generator).to(device),
        start_BTA=torch.randn((size, *policy.chunk_shape), generator=generator).to(device),
        other_start_BTA=torch.randn((size, *policy.chunk_shape), generator=generator).to(device),
    )
    changed = _changed(policy, batch)
    parts = []
    with _evaluating(policy):
        for start in range(0, size, SAMPLES_AT_A_TIME):
            rows = list(range(start, min(start + SAMPLES_AT_A_TIME, size)))
            given = {name: _take(other, rows) for name, other in changed.items()}
            with torch.no_grad():
                parts.append(_measure_part(policy, _take(batch, rows), given, random.take(rows)))
        some = torch.linspace(0, size - 1, min(size, SAMPLES_AT_A_TIME)).round().long().tolist()
        gradients = _gradients(policy, _take(batch, some), random.take(some))
    loss_B = {name: _finite(torch.cat([part.loss_B[name] for part in parts])) for name in parts[0].loss_B}
    actions_BTA = {
        name: _finite(torch.cat([part.actions_BTA[name] for part in parts])) for name in parts[0].actions_BTA
    }
    change_B = {name: (values - actions_BTA["own"]).abs().mean(dim=(1, 2)) for name, values in actions_BTA.items()}
    effects = {
        name: Effect(
            loss=_spread(loss_B[name] - loss_B["own"]),
            actions=_spread(change_B[name]),
            tokens_moved=None if name == "masked" else _tokens_moved(policy, batch, other),
        )
        for name, other in changed.items()
    }
    return Diagnosis(
        samples=size,
        draws=draws,
        compressor=policy.config.compressor,
        geometry_tokens=int(policy.compressor.num_tokens),
        prompt_tokens=float(batch.attention_mask_BS.sum(dim=1).float().mean()),
        uniform_share=float(torch.cat([part.uniform_B for part in parts]).mean()),
        loss=_spread(loss_B["own"]),
        noise_actions=_spread(change_B["other noise"]),
        shuffled=effects.get("shuffled"),
        masked=effects["masked"],
        zeroed=effects["zeroed"],
        blocks=_blocks(policy, parts),
        gates=_describe_gates([values for part in parts for values in part.gates]),
        gradients=gradients,
    )


def attention_weights(query_BhNd: torch.Tensor, keys_BhMd: torch.Tensor, mask_BM: torch.Tensor) -> torch.Tensor:
    """[B, h, N, M]: softmax(q k / sqrt(d)) over the tokens that ``mask_BM`` leaves, as the DiT's attention weighs."""
    scores_BhNM = query_BhNd @ keys_BhMd.transpose(-1, -2) / math.sqrt(query_BhNd.shape[-1])
    return scores_BhNM.masked_fill(~mask_BM[:, None, None, :], -math.inf).softmax(dim=-1)


def effective_rank(rows_NC: torch.Tensor) -> float:
    """exp of the entropy of s / sum(s), s the singular values of the rows less their mean; 0 when all rows are equal.

    1 = the rows lie on a line; at most min(N - 1, C). Roy and Vetterli, "The effective rank: a measure of effective
    dimensionality", EUSIPCO 2007.
    """
    if len(rows_NC) < 2:
        return 0.0
    rows_NC = rows_NC.double()
    singular = torch.linalg.svdvals(rows_NC - rows_NC.mean(dim=0))
    rounding = torch.finfo(torch.float32).eps * float(rows_NC.norm())  # of float32 tokens: no direction of theirs
    singular = singular[singular > rounding]
    return float(torch.special.entr(singular / singular.sum()).sum().exp()) if len(singular) else 0.0


def varying_share(tokens_BKC: torch.Tensor) -> float:
    """Share of the tokens' variance about their common mean that lies between samples, token by token.

    0 = every sample has the same K tokens: nothing of the scene is in them.
    """
    tokens_BKC = tokens_BKC.double()
    every = (tokens_BKC - tokens_BKC.mean(dim=(0, 1))).square().sum()
    between = (tokens_BKC - tokens_BKC.mean(dim=0)).square().sum()
    return float(between / every) if every > 0 else 0.0


class _Random(NamedTuple):
    """Everything random, sample by sample, so that it does not matter how many are in memory together."""

    time_BR: torch.Tensor
    noise_BRTA: torch.Tensor
    start_BTA: torch.Tensor  # the sampler's noise
    other_start_BTA: torch.Tensor

    def take(self, rows: list[int]) -> "_Random":
        return _Random(*(values[rows] for values in self))


class _Part(NamedTuple):
    """Some samples; all on the CPU."""

    loss_B: dict[str, torch.Tensor]  # "own" and every changed geometry
    actions_BTA: dict[str, torch.Tensor]  # the same, and "other noise"
    uniform_B: torch.Tensor
    mass_LIB: torch.Tensor
    entropy_LIB: torch.Tensor
    geom: GeomTokens
    gates: list[torch.Tensor]


def _changed(policy: PolicyNet, batch: PolicyBatch) -> dict[str, PolicyBatch]:
    """The batch with another sample's geometry, with none, and with every token at its channels' mean."""
    tokens_BVGD, mask_BVG, size = batch.tokens_BVGD, batch.token_mask_BVG, len(batch)
    assert tokens_BVGD is not None, "a policy with geometry is measured on a batch with tokens"
    changed = {}
    if size > 1:
        shift = size // 2  # as far as possible: neighbours in a batch may be neighbours in an episode
        other_mask = None if mask_BVG is None else mask_BVG.roll(shift, dims=0)
        changed["shuffled"] = replace(batch, tokens_BVGD=tokens_BVGD.roll(shift, dims=0), token_mask_BVG=other_mask)
    changed["masked"] = mask_geometry(batch, torch.ones(size, dtype=torch.bool))
    there_BVG1 = tokens_BVGD.isfinite().all(dim=-1, keepdim=True)
    changed["zeroed"] = replace(batch, tokens_BVGD=torch.where(there_BVG1, policy.token_mean_D, tokens_BVGD))
    return changed


def _measure_part(policy: PolicyNet, own: PolicyBatch, changed: dict[str, PolicyBatch], random: _Random) -> _Part:
    hidden_LBSC, prompt_mask_BS = policy.backbone(own)
    hidden_LBSC = [hidden_BSC.float() for hidden_BSC in hidden_LBSC]
    with torch.autocast(prompt_mask_BS.device.type, enabled=False):
        with _watching(policy) as seen:
            geom = policy.compress(own, hidden_LBSC[-1], prompt_mask_BS)
            context = policy.dit.encode_context(hidden_LBSC, prompt_mask_BS, geom)
            actions_BTA = {"own": policy.denoise(own, context, random.start_BTA)}
        actions_BTA["other noise"] = policy.denoise(own, context, random.other_start_BTA)
        loss_B = {"own": _losses(policy, own, context, random)}
        for name, batch in changed.items():
            other = policy.compress(batch, hidden_LBSC[-1], prompt_mask_BS)
            context = policy.dit.encode_context(hidden_LBSC, prompt_mask_BS, other)
            actions_BTA[name] = policy.denoise(batch, context, random.start_BTA)
            loss_B[name] = _losses(policy, batch, context, random)
    real_B = geom.mask_BK.sum(dim=1)
    return _Part(
        {name: values.cpu() for name, values in loss_B.items()},
        {name: values.cpu() for name, values in actions_BTA.items()},
        (real_B / (real_B + prompt_mask_BS.sum(dim=1))).cpu(),
        torch.stack([torch.stack(steps) for steps in seen.mass_LIB]).cpu(),
        torch.stack([torch.stack(steps) for steps in seen.entropy_LIB]).cpu(),
        GeomTokens(geom.geom_LBKC.cpu(), geom.mask_BK.cpu()),
        seen.gates,
    )


def _losses(policy: PolicyNet, batch: PolicyBatch, context: Context, random: _Random) -> torch.Tensor:
    """The loss of each sample by itself: [B]."""
    assert batch.actions_BTA is not None
    error_BRTA, _ = policy.velocity_error(batch, context, random.time_BR, random.noise_BRTA)
    horizon = batch.actions_BTA.shape[1]
    real_B = horizon if batch.action_mask_BT is None else batch.action_mask_BT.sum(dim=1).clamp(min=1)
    return error_BRTA.mean(dim=(1, 3)).sum(dim=1) / real_B


@dataclass
class _Seen:
    """What the hooks of ``_watching`` write down."""

    mass_LIB: list[list[torch.Tensor]]
    entropy_LIB: list[list[torch.Tensor]]
    gates: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def _watching(policy: PolicyNet) -> Iterator[_Seen]:
    """Writes down gates where the compressor runs, attention on geometry where the sampler runs (one draw a sample)."""
    attentions = [module for module in policy.dit.modules() if isinstance(module, CrossAttention)]
    horizon, _ = policy.chunk_shape
    seen = _Seen([[] for _ in attentions], [[] for _ in attentions])

    def see_gates(compressor: Any, given: tuple[torch.Tensor, ...], _output: GeomTokens) -> None:
        gate_BNC = compressor.gates(*given)
        if gate_BNC is not None:
            seen.gates.append(gate_BNC[~gate_BNC.isnan()].cpu())  # NaN: no token there

    def see_attention(block: int) -> Any:
        def look(attention: CrossAttention, given: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            x_BRNE, keys_BhMd, _, mask_BM = given
            B, R, _, E = x_BRNE.shape
            assert R == 1, "sampling has one draw a sample"
            query_BTE = attention.query(x_BRNE[:, 0, -horizon:])  # the action positions are the last
            query_BhTd = query_BTE.view(B, horizon, attention.heads, E // attention.heads).transpose(1, 2)
            weights_BhTM = attention_weights(query_BhTd, keys_BhMd, mask_BM)
            geometry_BhT = weights_BhTM[..., -policy.compressor.num_tokens :].sum(dim=-1)
            entropy_BhT = torch.special.entr(weights_BhTM).sum(dim=-1)
            seen.mass_LIB[block].append(geometry_BhT.mean(dim=(1, 2)))
            seen.entropy_LIB[block].append(entropy_BhT.mean(dim=(1, 2)) / mask_BM.sum(dim=1).clamp(min=2).log())

        return look

    hooks = [policy.compressor.register_forward_hook(see_gates)]
    hooks += [module.register_forward_hook(see_attention(block)) for block, module in enumerate(attentions)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(policy: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _gradients(policy: PolicyNet, batch: PolicyBatch, random: _Random) -> Gradients:
    """One backward of the loss, by the weights of each module and by the standardised tokens."""
    assert batch.tokens_BVGD is not None
    batch = replace(batch, tokens_BVGD=batch.tokens_BVGD.detach().float().requires_grad_())
    modules = {"compressor": policy.compressor, "dit": policy.dit, "vlm": policy.backbone}
    weights = {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
    with torch.enable_grad():
        loss = policy.loss(batch, noise_BRTA=random.noise_BRTA, time_BR=random.time_BR).loss
    every = [batch.tokens_BVGD, *(parameter for some in weights.values() for parameter in some)]
    found = iter(torch.autograd.grad(loss, every, allow_unused=True, materialize_grads=True))
    by_tokens_BVGD = next(found) * policy.token_std_D * len(batch)  # of a sample's own loss, by standardised tokens
    return Gradients(
        samples=len(batch),
        tokens=float(_finite(by_tokens_BVGD.flatten(1).norm(dim=1).mean())),
        **{name: _gradient(some, [next(found) for _ in some]) for name, some in weights.items()},
    )


def _gradient(weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> Gradient | None:
    if not weights:
        return None
    norms = [torch.stack([tensor.detach().norm() for tensor in some]).norm() for some in (gradients, weights)]
    norm, size = (float(_finite(tensor)) for tensor in norms)
    return Gradient(norm=norm, over_weights=norm / size if size > 0 else 0.0)


def _blocks(policy: PolicyNet, parts: Sequence[_Part]) -> tuple[Block, ...]:
    assert policy.config.vlm_layers is not None, "a built policy knows its pairing"
    geom_LBKC = torch.cat([part.geom.geom_LBKC for part in parts], dim=1)
    mask_BK = torch.cat([part.geom.mask_BK for part in parts])
    mass_LI = torch.cat([part.mass_LIB for part in parts], dim=2).mean(dim=2)
    entropy_LI = torch.cat([part.entropy_LIB for part in parts], dim=2).mean(dim=2)
    whole_B = mask_BK.all(dim=1)  # samples whose K tokens are all there can be compared token by token
    blocks = []
    for block, layer in enumerate(policy.config.vlm_layers):
        geom_BKC = geom_LBKC[block]
        ranks = [effective_rank(geom_KC[mask_K]) for geom_KC, mask_K in zip(geom_BKC, mask_BK, strict=True)]
        comparable_BKC = geom_BKC[whole_B]
        several = len(comparable_BKC) > 1
        blocks.append(
            Block(
                vlm_layer=layer,
                mass=tuple(mass_LI[block].tolist()),
                entropy=tuple(entropy_LI[block].tolist()),
                rank=sum(ranks) / len(ranks),
                rank_over_samples=effective_rank(comparable_BKC.flatten(1)) if several else None,
                varying_share=varying_share(comparable_BKC) if several else None,
            )
        )
    return tuple(blocks)


def _describe_gates(gates: Sequence[torch.Tensor]) -> Gates | None:
    values = torch.cat(list(gates)) if gates else torch.empty(0)
    if not len(values):
        return None
    counts = torch.histc(values, bins=GATE_BINS, min=0.0, max=1.0)
    return Gates(mean=float(values.mean()), histogram=tuple((counts / len(values)).tolist()))


def _tokens_moved(policy: PolicyNet, own: PolicyBatch, other: PolicyBatch) -> float:
    """Root mean square change of the tokens that are there in both, in standard deviations of their channels."""
    assert own.tokens_BVGD is not None
    assert other.tokens_BVGD is not None
    moved_BVGD = ((other.tokens_BVGD - own.tokens_BVGD) / policy.token_std_D).square()
    there_BVG = moved_BVGD.isfinite().all(dim=-1)
    for batch in (own, other):
        if batch.token_mask_BVG is not None:
            there_BVG &= batch.token_mask_BVG
    return float(moved_BVGD[there_BVG].mean().sqrt()) if there_BVG.any() else 0.0


def _finite(values: torch.Tensor) -> torch.Tensor:
    if not values.isfinite().all():
        raise TrainingFailed(
            "the use of geometry cannot be measured: the policy's losses, actions or gradients are not finite",
            expected="finite numbers",
            found=f"{int((~values.isfinite()).sum())} of {values.numel()} are not",
            fix="look in metrics.jsonl where the loss left its course, and take a checkpoint from before that",
        )
    return values


def _spread(values_B: torch.Tensor) -> Spread:
    values_B = values_B.double()
    several = len(values_B) > 1
    return Spread(
        mean=float(values_B.mean()), error=float(values_B.std() / math.sqrt(len(values_B))) if several else None
    )


def _take(batch: PolicyBatch, rows: list[int]) -> PolicyBatch:
    """Some samples of a batch; a field has the same number of lines (patches, images) for each sample."""
    present = {each.name: value for each in fields(batch) if (value := getattr(batch, each.name)) is not None}
    size = len(batch)
    return PolicyBatch(**{name: value.unflatten(0, (size, -1))[rows].flatten(0, 1) for name, value in present.items()})
