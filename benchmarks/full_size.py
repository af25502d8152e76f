"""The plan's policy at its true size, once for real: one forward and one backward pass.

    python benchmarks/full_size.py [--json FILE] [--model 3B] [--batch 1] [--compressor pool] [--blocks 16]

Qwen2.5-VL at the published sizes with random weights, frozen, in bfloat16 (the whole vocabulary; the prompts come from
the tiny tokenizer); the DiT at the VLM's width and the compressor in float32; random tokens of MapAnything's shape, two
views of 224 px. The first pass pays for first allocations as well. On a CPU the 3B needs 20 GB of memory.

Keys:
  build_seconds, weight_gb       until random weights stand in memory; their bytes
  pack_seconds                   images and texts to the VLM's input
  vlm_seconds                    forward pass of the VLM (without a graph)
  head_seconds                   compressor, keys and values, DiT, loss: forward
  backward_seconds               of the compressor and the DiT
  peak_gb                        the process at its largest (on a GPU: of its memory)
  parameters, trainable, prompt_tokens, loss
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.describe import assumed_tokens, build_architecture
from geomcache.stages.train.policy import PolicyConfig, PolicyNet

VIEWS, SIDE = 2, 224
TEXT = "pick up the black bowl next to the plate and place it on the plate"
SEED = 0
FROZEN: dict[str, Any] = {"freeze": "all", "dtype": "bfloat16"}


def policy_config(base_vlm: str, compressor: str, blocks: int, vlm: dict[str, Any]) -> PolicyConfig:
    """The plan's policy: everything at its default but what is named here."""
    return PolicyConfig.model_validate(
        {
            "backbone": {"config": {"base_vlm": base_vlm, "image_size": SIDE} | vlm},
            "dit": {"blocks": blocks},
            "geom_compression_type": compressor,
        }
    )


def random_batch(policy: PolicyNet, size: int) -> PolicyBatch:
    """Noise as images and tokens, on the CPU; the same for the same policy and size."""
    rng = np.random.default_rng(SEED)
    images = rng.integers(0, 256, (size, VIEWS, SIDE, SIDE, 3), dtype=np.uint8)
    shapes = {"proprio_BP": (size, policy.config.dit.state_dim), "actions_BTA": (size, *policy.chunk_shape)}
    if policy.token_spec is not None:
        shapes["tokens_BVGD"] = (size, *policy.token_spec.row_shape)
    floats = {name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}
    return PolicyBatch(**policy.backbone.packer(images, [TEXT] * size), **floats)


def draws(policy: PolicyNet, size: int) -> dict[str, torch.Tensor]:
    """Times and noise of the loss, on the CPU."""
    generator, R = torch.Generator().manual_seed(SEED), policy.config.repeated_diffusion_steps
    return {
        "time_BR": torch.rand((size, R), generator=generator),
        "noise_BRTA": torch.randn((size, R, *policy.chunk_shape), generator=generator),
    }


def now(device: str) -> float:
    """Seconds, when what was asked for so far is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(policy: PolicyNet, size: int, device: str) -> dict[str, float]:
    """Seconds of each part of one training pass; gradients are left in place."""
    marks: dict[str, float] = {}
    hooks = [
        policy.backbone.register_forward_pre_hook(lambda *_: marks.update(begin=now(device))),
        policy.backbone.register_forward_hook(lambda *_: marks.update(encoded=now(device))),
    ]
    policy.train()
    began = now(device)
    batch = random_batch(policy, size).to(device)
    marks["packed"] = now(device)
    loss = policy.loss(batch, **draws(policy, size)).loss
    marks["loss"] = now(device)
    loss.backward()
    marks["end"] = now(device)
    for hook in hooks:
        hook.remove()
    return {
        "pack_seconds": marks["packed"] - began,
        "vlm_seconds": marks["encoded"] - marks["begin"],
        "head_seconds": marks["loss"] - marks["encoded"],
        "backward_seconds": marks["end"] - marks["loss"],
        "prompt_tokens": batch.input_ids_BS.shape[1],
        "loss": float(loss.detach()),
    }


def peak_gigabytes(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", choices=["tiny", "3B", "7B"], default="3B")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compressor", default="pool")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    base_vlm = "tiny" if arguments.model == "tiny" else f"Qwen/Qwen2.5-VL-{arguments.model}-Instruct"
    config = policy_config(base_vlm, arguments.compressor, arguments.blocks, FROZEN)
    began = now(arguments.device)
    policy = build_architecture(config, assumed_tokens(), arguments.device)
    parameters = list(policy.parameters())
    figures = {
        "build_seconds": now(arguments.device) - began,
        "weight_gb": sum(p.nbytes for p in parameters) / 1e9,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        **measure(policy, arguments.batch, arguments.device),
        "peak_gb": peak_gigabytes(arguments.device),
    }
    without = [name for name, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    text = json.dumps({name: round(value, 4) for name, value in figures.items()})
    print(text)
    if arguments.json:
        arguments.json.write_text(text)
    if without:
        print(f"no gradient reached {', '.join(without)}", file=sys.stderr)
    return int(bool(without))


if __name__ == "__main__":
    sys.exit(main())
