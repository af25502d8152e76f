"""One tiny policy, small enough that building it and a step take well under a second."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.policy import PolicyConfig, PolicyNet

SMALL_VLM = {
    "hidden": 64,
    "layers": 3,
    "heads": 2,
    "kv_heads": 1,
    "mlp": 64,
    "vision_hidden": 32,
    "vision_layers": 1,
    "vision_mlp": 32,
}
INSTRUCTIONS = (
    "close the microwave door",
    "pick up the red bowl and place it in the basket",
    "turn on the stove",
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """accelerate keeps its state for the life of a process; each test is like a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def spec() -> TokenSpec:
    return TokenSpec(
        encoder="test",
        tap="t",
        cameras=("front", "wrist"),
        grid=(2, 3),
        dim=5,
        image_size=(56, 56),
        encoder_batch_size=1,
    )


@pytest.fixture
def small_vlm() -> dict[str, Any]:
    return {"tiny": SMALL_VLM, "image_size": 56}


@pytest.fixture
def make_policy(spec: TokenSpec, small_vlm: dict[str, Any]) -> Callable[..., PolicyNet]:
    def make(compressor: str = "pool", pattern: str = "self+cross", **options: Any) -> PolicyNet:
        config = PolicyConfig.model_validate(
            {
                "backbone": {"config": small_vlm | options.pop("backbone", {})},
                "dit": {
                    "width": 32,
                    "heads": 2,
                    "blocks": 2,
                    "pattern": pattern,
                    "future_tokens": 2,
                    "horizon": 4,
                }
                | options.pop("dit", {}),
                "geom_compression_type": compressor,
                "geom_dit_tokens": 5,
                **options,
            }
        )
        return PolicyNet(config, spec, torch.full((5,), 0.5), torch.full((5,), 2.0))

    return make


@pytest.fixture
def make_batch(spec: TokenSpec) -> Callable[..., PolicyBatch]:
    def make(policy: PolicyNet, size: int = 3, seed: int = 0, **fields: Any) -> PolicyBatch:
        rng = np.random.default_rng(seed)
        horizon, actions = policy.chunk_shape
        images = rng.integers(0, 256, (size, 2, 56, 56, 3), dtype=np.uint8)
        values = {
            "proprio_BP": rng.standard_normal((size, 8)),
            "tokens_BVGD": rng.standard_normal((size, *spec.row_shape)),
            "actions_BTA": rng.standard_normal((size, horizon, actions)),
        }
        tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
        texts = [INSTRUCTIONS[i % 3] for i in range(size)]
        return PolicyBatch(**policy.backbone.packer(images, texts), **(tensors | fields))

    return make


@pytest.fixture
def draw() -> Callable[[int], torch.Generator]:
    return lambda seed: torch.Generator().manual_seed(seed)
