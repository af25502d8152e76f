"""What only a GPU can show: the same numbers as on a CPU, bf16 beside a float32 head, and the full size at speed.

    python benchmarks/gpu_check.py [--json FILE] [--only parity bf16 feed speed kv_reuse] [--batches 1 8 16]

Says so and ends well where there is no CUDA device. Random weights throughout; exit 1 when a check fails.

Checks (of tiny policies, float32, TF32 off):
  parity_COMPRESSOR_{loss,gradient,actions}   largest difference between the CPU and the GPU, relative to the largest
                       value; at most PARITY_LIMIT
  bf16_loss            difference of the loss under bf16 autocast, relative; at most BF16_LIMIT, with every module of
                       the head computing in float32
  kv_reuse_loss        as parity: keys and values once per sample, against once per draw
  feed_exact           1 when every batch of the token feed is what was put in, bit for bit
Figures (full size: frozen VLM in bf16, float32 head, AdamW; `lora`: rank 16 adapters as well):
  step_seconds_{frozen,lora}[_checkpointing]_bB, peak_gb_...   a whole optimiser step at batch size B; null: no room
  build_gb             weights on the device
  kv_reuse_train, kv_reuse_sample   head time of the plain way over ours (above 1: ours is faster); full size
  answer_seconds_b1, answer_seconds_b8   a query of the policy in closed loop (VLM, compressor, 4 Euler steps)
  answers_batched_over_one_by_one        answers/s at 8 waiting observations, one batch over one by one
  answers_slot_deviation                 largest difference of an action when its sample has another slot and other
                       neighbours in a batch of 8; 0: reproducible mode may batch on this GPU
  feed_gb_per_second   host to device, from pinned buffers
  feed_wait_share      of a loop's time spent waiting for tokens that are copied while the GPU computes
"""

import argparse
import contextlib
import copy
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import FROZEN, draws, now, peak_gigabytes, policy_config, random_batch
from numpy.typing import NDArray

from geomcache.stages.train import flow
from geomcache.stages.train.batch import GeomTokens, PolicyBatch
from geomcache.stages.train.describe import assumed_tokens, build_architecture
from geomcache.stages.train.dit import Context
from geomcache.stages.train.policy import PolicyNet

PARITY_LIMIT, BF16_LIMIT = 1e-4, 0.05
PARTS = ["parity", "bf16", "feed", "speed", "kv_reuse", "answers"]
COMPRESSORS = ["none", "pool", "per_layer", "qformer", "gated"]
TIMED_STEPS, TIMED_PASSES, FEED_BATCHES = 3, 5, 24
BLOCKS = 16  # of the full-size DiT
LORA: dict[str, Any] = {"freeze": "vision", "dtype": "bfloat16", "lora": {}}
TINY_DIT = {"width": 64, "heads": 4, "blocks": 3, "future_tokens": 4}

Figures = dict[str, float | None]


def tiny_policy(compressor: str) -> PolicyNet:
    """Every part of the policy, on the CPU, in float32; the same weights at every call."""
    config = policy_config("tiny", compressor, 3, {"image_size": 224})
    dit = config.dit.model_copy(update=TINY_DIT)
    tokens = None if compressor == "none" else assumed_tokens("2x4x4x32")
    return build_architecture(config.model_copy(update={"dit": dit}), tokens, "cpu")


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    one, two = one.detach().cpu().double(), two.detach().cpu().double()
    return float((one - two).abs().max() / one.abs().max().clamp(min=1e-12))


def parity(device: str) -> Figures:
    """Loss, gradients and sampled actions of the same policy on the CPU and on ``device``."""
    figures: Figures = {}
    for compressor in COMPRESSORS:
        here = tiny_policy(compressor)
        there = copy.deepcopy(here).to(device)
        batch = random_batch(here, 2)
        losses = [
            policy.train().loss(batch.to(where), **draws(here, 2)).loss
            for policy, where in ((here, "cpu"), (there, device))
        ]
        for loss in losses:
            loss.backward()
        gradients = {name: p.grad for name, p in there.named_parameters() if p.grad is not None}
        assert gradients.keys() == {name for name, p in here.named_parameters() if p.grad is not None}
        largest = max(float(p.grad.abs().max()) for p in here.parameters() if p.grad is not None)
        worst = max(
            float((p.grad - gradients[name].cpu()).abs().max())
            for name, p in here.named_parameters()
            if p.grad is not None
        )
        noise_BTA = torch.randn((2, *here.chunk_shape), generator=torch.Generator().manual_seed(1))
        actions = [
            policy.eval().sample(batch.to(where), noise_BTA=noise_BTA)
            for policy, where in ((here, "cpu"), (there, device))
        ]
        figures[f"parity_{compressor}_loss"] = relative(*losses)
        figures[f"parity_{compressor}_gradient"] = worst / largest
        figures[f"parity_{compressor}_actions"] = relative(*actions)
    return figures


def bf16(device: str) -> Figures:
    """Under bf16 autocast: whether the VLM computes in bf16, the head in float32, and what that does to the loss."""
    policy = tiny_policy("gated").to(device).train()
    batch = random_batch(policy, 2).to(device)
    exact = policy.loss(batch, **draws(policy, 2)).loss
    seen: dict[str, set[torch.dtype]] = {"vlm": set(), "head": set()}

    def watch(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen[name].add(output.dtype)

    for part, name in ((policy.backbone, "vlm"), (policy.dit, "head"), (policy.compressor, "head")):
        for module in part.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(watch(name))
    with policy.autocast("bf16"):
        rounded = policy.loss(batch, **draws(policy, 2)).loss
    assert seen == {"vlm": {torch.bfloat16}, "head": {torch.float32}}, seen
    rounded.backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters() if p.grad is not None)
    return {"bf16_loss": relative(exact, rounded)}


def step_seconds(policy: PolicyNet, optimizer: torch.optim.Optimizer, size: int, device: str) -> float | None:
    """Median of whole optimiser steps after one that allocates; None where the device has no room."""
    try:
        batch, times = random_batch(policy, size).to(device), []
        for _ in range(1 + TIMED_STEPS):
            began = now(device)
            with policy.autocast("bf16"):
                loss = policy.loss(batch, **draws(policy, size)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(now(device) - began)
    except torch.cuda.OutOfMemoryError:
        return None
    return statistics.median(times[1:])


@contextlib.contextmanager
def full_policy(base_vlm: str, vlm: dict[str, Any], device: str) -> Iterator[PolicyNet]:
    """On the device, and gone afterwards."""
    policy = build_architecture(policy_config(base_vlm, "per_layer", BLOCKS, vlm), assumed_tokens(), device).train()
    try:
        yield policy
    finally:
        policy.to("meta")
        gc.collect()
        torch.cuda.empty_cache()


def speed(base_vlm: str, batches: list[int], device: str) -> Figures:
    """Optimiser steps at full size, with and without adapters and gradient checkpointing."""
    figures: Figures = {}
    for name, vlm in (("frozen", FROZEN), ("lora", LORA)):
        with full_policy(base_vlm, vlm, device) as policy:
            figures.setdefault("build_gb", sum(p.nbytes for p in policy.parameters()) / 1e9)
            trained = [p for p in policy.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-5)
            for suffix in ("", "_checkpointing"):
                if suffix:
                    policy.enable_gradient_checkpointing()
                for size in batches:
                    if device != "cpu":
                        torch.cuda.reset_peak_memory_stats()
                    figures[f"step_seconds_{name}{suffix}_b{size}"] = step_seconds(policy, optimizer, size, device)
                    figures[f"peak_gb_{name}{suffix}_b{size}"] = peak_gigabytes(device)
                    optimizer.zero_grad()
                    torch.cuda.empty_cache()
            optimizer.state.clear()
            del trained, optimizer
    return figures


class Head:
    """The DiT on given VLM states: keys and values once per sample (ours), or for every draw and step (plain)."""

    def __init__(self, policy: PolicyNet, batch: PolicyBatch) -> None:
        self.policy, self.batch = policy, batch
        with torch.no_grad(), policy.autocast("bf16" if batch.proprio_BP.is_cuda else "no"):
            hidden_LBSC, self.mask_BS = policy.backbone(batch)
        self.hidden_LBSC = [hidden_BSC.float() for hidden_BSC in hidden_LBSC]

    def context(self, repeats: int = 1) -> Context:
        """Of every sample ``repeats`` times over, as if they were so many samples."""
        geom = self.policy.compress(self.batch, self.hidden_LBSC[-1], self.mask_BS)
        return self.policy.dit.encode_context(
            [hidden_BSC.repeat_interleave(repeats, dim=0) for hidden_BSC in self.hidden_LBSC],
            self.mask_BS.repeat_interleave(repeats, dim=0),
            GeomTokens(
                geom.geom_LBKC.repeat_interleave(repeats, dim=1), geom.mask_BK.repeat_interleave(repeats, dim=0)
            ),
        )

    def loss(self, *, plain: bool) -> torch.Tensor:
        device, actions_BTA = self.batch.proprio_BP.device, self.batch.actions_BTA
        assert actions_BTA is not None
        drawn = {name: value.to(device) for name, value in draws(self.policy, len(self.batch)).items()}
        time_BR, noise_BRTA = drawn["time_BR"], drawn["noise_BRTA"]
        noisy_BRTA = flow.interpolate(noise_BRTA, actions_BTA[:, None], time_BR)
        target_BRTA = flow.velocity_target(noise_BRTA, actions_BTA[:, None])
        R, proprio_BP = time_BR.shape[1], self.batch.proprio_BP
        if plain:
            noisy_BRTA, time_BR = noisy_BRTA.flatten(0, 1)[:, None], time_BR.flatten()[:, None]
            proprio_BP = proprio_BP.repeat_interleave(R, dim=0)
        velocity = self.policy.dit(noisy_BRTA, time_BR, proprio_BP, self.context(R if plain else 1))
        return (velocity.view_as(target_BRTA) - target_BRTA).square().mean()

    def train(self, *, plain: bool) -> torch.Tensor:
        loss = self.loss(plain=plain)
        loss.backward()
        self.policy.zero_grad()
        return loss

    @torch.no_grad()
    def sample(self, *, plain: bool) -> torch.Tensor:
        B, proprio_BP, context = len(self.batch), self.batch.proprio_BP, None if plain else self.context()
        return flow.euler(
            lambda x_B1TA, t: self.policy.dit(x_B1TA, t.expand(B, 1), proprio_BP, context or self.context()),
            torch.ones((B, 1, *self.policy.chunk_shape), device=proprio_BP.device),
            self.policy.config.num_inference_timesteps,
        )


def kv_reuse(policy: PolicyNet, size: int, device: str) -> Figures:
    """Ours beside the plain way: equal, and faster."""
    head = Head(policy, random_batch(policy, size).to(device))
    figures: Figures = {"kv_reuse_loss": relative(head.train(plain=True), head.train(plain=False))}
    for name, work in (("train", head.train), ("sample", head.sample)):
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(1 + TIMED_PASSES):
            for plain, taken in times.items():
                began = now(device)
                work(plain=plain)
                taken.append(now(device) - began)
        ours, theirs = (statistics.median(times[plain][1:]) for plain in (False, True))
        figures |= {f"kv_reuse_{name}": theirs / ours, f"head_{name}_seconds": ours}
    return figures


def select(batch: PolicyBatch, rows: list[int]) -> PolicyBatch:
    """Some samples; a sample has the same number of rows in every field."""
    size = len(batch)
    present = {name: value for name, value in vars(batch).items() if value is not None}
    chosen = {name: value.unflatten(0, (size, -1))[rows].flatten(0, 1) for name, value in present.items()}
    return replace(batch, **chosen)


@torch.no_grad()
def answers(policy: PolicyNet, device: str, size: int = 8) -> Figures:
    """Queries of evaluation, one by one and in a batch."""
    policy.eval()
    batch = random_batch(policy, size).to(device)
    noise_BTA = torch.stack([policy.draw_noise(seed) for seed in range(size)])

    def ask(rows: list[int]) -> torch.Tensor:
        with policy.autocast("bf16"):
            return policy.sample(select(batch, rows), noise_BTA=noise_BTA[rows]).cpu()

    def seconds(rows: list[int]) -> float:
        taken = []
        for _ in range(1 + TIMED_PASSES):
            began = now(device)
            ask(rows)
            taken.append(now(device) - began)
        return statistics.median(taken[1:])

    order = list(range(size))
    alone, together = seconds([0]), seconds(order)
    straight = ask(order)
    others = [*order[3:], *order[:3]]
    moved = ask(others)[[others.index(row) for row in order]]
    company = ask([0] * size)
    deviation = max(float((moved - straight).abs().max()), float((company - straight[:1]).abs().max()))
    return {
        "answer_seconds_b1": alone,
        f"answer_seconds_b{size}": together,
        "answers_batched_over_one_by_one": size * alone / together,
        "answers_slot_deviation": deviation,
    }


class TokensInMemory:
    """What the token feed asks of training data; rows lie in memory, so the copies alone are measured."""

    def __init__(self, rows: int) -> None:
        from geomcache.pipeline.tokens import build_codec

        spec = assumed_tokens()
        self.codec = build_codec(spec)
        bits = np.random.default_rng(0).integers(0, 2**15, (rows, *spec.row_shape), dtype=np.uint16)
        self.stored: NDArray[np.uint16] = bits & np.uint16(0xBFFF)  # an exponent below its maximum: finite

    def token_buffers(self, rows: int) -> dict[str, NDArray[Any]]:
        return {"tokens": np.empty((rows, *self.stored.shape[1:]), dtype=np.uint16)}

    def read_tokens(self, rows: NDArray[np.int64], out: dict[str, NDArray[Any]]) -> None:
        np.take(self.stored, rows, axis=0, out=out["tokens"])


def feed(device: str, size: int = 16) -> Figures:
    """The trainer's own feed: exact, and beside the computation."""
    from geomcache.stages.train.token_feed import TokenFeed

    data: Any = TokensInMemory(4 * size)
    batches = [np.random.default_rng(step).permutation(4 * size)[:size] for step in range(FEED_BATCHES)]
    with TokenFeed(data, batches, size, torch.device(device)) as tokens:
        exact = all(
            torch.equal(found.cpu(), torch.from_numpy(data.stored[rows]).view(torch.bfloat16).float())
            for rows, found in zip(batches, tokens, strict=True)
        )
    pinned = torch.from_numpy(data.stored)
    pinned = pinned.pin_memory() if device != "cpu" else pinned
    began = now(device)
    for _ in range(FEED_BATCHES):
        pinned.to(device, non_blocking=True)
    rate = FEED_BATCHES * pinned.nbytes / (now(device) - began) / 1e9
    matrix, waited = torch.eye(2048 if device != "cpu" else 64, device=device), 0.0
    with TokenFeed(data, batches, size, torch.device(device)) as tokens:
        start = now(device)
        for _ in batches:
            asked = now(device)
            next(tokens)
            waited += now(device) - asked
            for _ in range(20):
                matrix = matrix @ matrix
        total = now(device) - start
    return {"feed_exact": float(exact), "feed_gb_per_second": rate, "feed_wait_share": waited / total}


def failures(figures: Figures) -> list[str]:
    """Checks that did not hold."""
    limits = {"parity_": PARITY_LIMIT, "kv_reuse_loss": PARITY_LIMIT, "bf16_loss": BF16_LIMIT}
    wrong = [
        f"{name} is {value}, at most {limit}"
        for name, value in figures.items()
        for start, limit in limits.items()
        if name.startswith(start) and (value is None or not value <= limit)
    ]
    return wrong + ["feed_exact"] * (figures.get("feed_exact") == 0.0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", choices=["tiny", "3B", "7B"], default="3B", help="of speed and kv_reuse")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False  # the vision tower's patches are a convolution
    base_vlm = "tiny" if options.model == "tiny" else f"Qwen/Qwen2.5-VL-{options.model}-Instruct"
    figures: Figures = {}
    if "parity" in options.only:
        figures |= parity("cuda")
    if "bf16" in options.only:
        figures |= bf16("cuda")
    if "feed" in options.only:
        figures |= feed("cuda")
    if "speed" in options.only:
        figures |= speed(base_vlm, options.batches, "cuda")
    if "kv_reuse" in options.only:
        with full_policy(base_vlm, FROZEN, "cuda") as policy:
            figures |= kv_reuse(policy, options.batches[-1], "cuda")
    if "answers" in options.only:
        with full_policy(base_vlm, FROZEN, "cuda") as policy:
            figures |= answers(policy, "cuda")
    text = json.dumps({name: value if value is None else round(value, 7) for name, value in figures.items()})
    print(text)
    if options.json:
        options.json.write_text(text)
    wrong = failures(figures)
    print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
