"""The module table against policies that are really built, published parameter counts and sums by hand."""

import copy
import importlib
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from geomcache.cache_schemas.errors import ConfigError, InputError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline import plugins
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.describe import ModuleInfo, assumed_tokens, build_architecture, describe
from geomcache.stages.train.policy import PolicyConfig, PolicyNet

MakePolicy = Callable[..., PolicyNet]


def config_of(policy: PolicyConfig, **fields: Any) -> TrainConfig:
    return TrainConfig.model_validate({"out": "unused", "data": [], "policy": policy, **fields})


def full_size(
    model: str = "3B", compressor: str = "pool", dit: dict[str, Any] | None = None, **vlm: Any
) -> TrainConfig:
    vlm = {"base_vlm": f"Qwen/Qwen2.5-VL-{model}-Instruct", "image_size": 224} | vlm
    options = {"backbone": {"config": vlm}, "dit": dit or {}, "geom_compression_type": compressor}
    return config_of(PolicyConfig.model_validate(options))


def table(lines: list[ModuleInfo]) -> dict[str, ModuleInfo]:
    assert len({line.module for line in lines}) == len(lines)
    return {line.module: line for line in lines}


def parameters(lines: list[ModuleInfo], prefix: str) -> int:
    return sum(line.parameters for line in lines if line.module.startswith(prefix) and "LoRA" not in line.module)


@pytest.mark.parametrize("compressor", plugins.names("compressor"))
@pytest.mark.parametrize("pattern", ["self+cross", "interleaved", "cross"])
def test_it_counts_what_is_really_built(
    make_policy: MakePolicy, spec: TokenSpec, compressor: str, pattern: str
) -> None:
    policy = make_policy(compressor, pattern, backbone={"freeze": "vision"})
    lines = describe(config_of(policy.config), spec)
    for part in ("backbone.vlm.visual", "backbone.vlm.language_model", "dit", "compressor"):
        built = list(policy.get_submodule(part).parameters())
        found = [line for line in lines if line.module.startswith(part)]
        assert sum(line.parameters for line in found) == sum(p.numel() for p in built)
        assert sum(line.trainable for line in found) == sum(p.numel() for p in built if p.requires_grad)
    assert lines[-1].module == "total"
    assert lines[-1].parameters == sum(p.numel() for p in policy.parameters())
    assert lines[-1].weight_bytes == sum(p.nbytes for p in policy.parameters())


def test_bytes_and_rates_by_hand(make_policy: MakePolicy, spec: TokenSpec) -> None:
    """Float32: weights 4 bytes; gradient, two moments and average 4 bytes each of what is trained."""
    policy = make_policy("pool", backbone={"freeze": "all", "dtype": "bfloat16"}).config
    rates = {"learning_rate": {"vlm": 1e-5, "lora": 2e-4, "head": 3e-4}}
    found = table(describe(config_of(policy, **rates), spec))
    count = 5 * 64 + 64
    assert found["compressor"] == ("compressor", count, count, 3e-4, "float32", 4 * count, 16 * count)
    assert table(describe(config_of(policy, ema_decay=None), spec))["compressor"].training_bytes == 12 * count
    layers = found["backbone.vlm.language_model.layers"]
    assert (layers.trainable, layers.learning_rate, layers.dtype, layers.training_bytes) == (0, None, "bfloat16", 0)
    assert layers.weight_bytes == 2 * layers.parameters
    assert found["total"].dtype == "bfloat16+float32"
    assert found["total"].training_bytes == 16 * found["total"].trainable
    adapted = policy.model_copy(deep=True)
    adapted.backbone.config.update(freeze="vision", lora={"rank": 4})
    lora = table(describe(config_of(adapted, **rates), spec))["backbone.vlm.language_model.layers (LoRA)"]
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 64), (64, 64), (64, 64)]  # q k v o gate up down: in, out
    assert lora.parameters == lora.trainable == 3 * sum(4 * (inputs + outputs) for inputs, outputs in widths)
    assert (lora.learning_rate, lora.dtype) == (2e-4, "float32")


@pytest.mark.parametrize(("model", "published"), [("3B", 3_754_622_976), ("7B", 8_292_166_656)])
def test_published_sizes_without_network_or_memory(monkeypatch: pytest.MonkeyPatch, model: str, published: int) -> None:
    """The hub's parameter counts (half the total_size of each model.safetensors.index.json) to the last one."""
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = describe(full_size(model, freeze="vision", dtype="bfloat16", lora={}), assumed_tokens())
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 500  # megabytes
    assert asked == []
    head = {"3B": 0, "7B": 152_064 * 3584}[model]  # the 3B's LM head is its embedding; the 7B's is not built here
    assert parameters(lines, "backbone.") + head == published
    lora = table(lines)["backbone.vlm.language_model.layers (LoRA)"]
    assert lora.parameters == {"3B": 29_933_568, "7B": 40_370_176}[model]  # as peft's users print them, rank 16


def test_the_plans_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressors at D = 1536, C = 2048, N = 16 by formula; unpaired trailing layers are not there."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    D, C, N = 1536, 2048, 16
    assert table(describe(full_size(compressor="pool"), assumed_tokens()))["compressor"].parameters == D * C + C
    lines = describe(full_size(compressor="per_layer"), assumed_tokens("3x8x8x1536"))
    assert table(lines)["compressor"].parameters == N * (D * C + C)
    interleaved = describe(full_size(compressor="per_layer", dit={"pattern": "interleaved"}), assumed_tokens())
    assert table(interleaved)["compressor"].parameters == N // 2 * (D * C + C)
    few = full_size().policy.model_copy(update={"vlm_layers": tuple(range(1, 17))})
    kept = table(describe(config_of(few), assumed_tokens()))["backbone.vlm.language_model.layers"]
    assert kept.parameters * 36 == table(lines)[kept.module].parameters * 16


def test_what_does_not_fit_is_said_here_too(make_policy: MakePolicy, spec: TokenSpec) -> None:
    config = config_of(make_policy("pool").config.model_copy(update={"geom_dit_tokens": 13}))
    with pytest.raises(ConfigError, match="geom_dit_tokens"):
        describe(config, spec)
    with pytest.raises(ConfigError, match="needs geometry tokens"):
        describe(config, None)
    for shape in ("2x16x16", "2x16x16xd", "0x16x16x5", "2x-1x16x5", ""):
        with pytest.raises(InputError, match="2x16x16x1536"):
            assumed_tokens(shape)
    assert assumed_tokens().row_shape == (2, 256, 1536)


def test_on_a_real_device_it_is_a_policy_that_runs(
    make_policy: MakePolicy, make_batch: Callable[..., Any], draw: Callable[..., Any], spec: TokenSpec
) -> None:
    policy = build_architecture(make_policy("pool").config, spec, "cpu")
    assert policy.loss(make_batch(policy), draw(0)).loss.isfinite()


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``benchmarks/gpu_check.py`` itself: all of it but the full-size steps runs on a CPU."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    return importlib.import_module("gpu_check")


def test_gpu_check_finds_a_device_that_computes_otherwise(gpu_check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "COMPRESSORS", ["gated"])
    same = gpu_check.parity("cpu")
    assert same == {"parity_gated_loss": 0.0, "parity_gated_gradient": 0.0, "parity_gated_actions": 0.0}
    assert gpu_check.failures(same) == []

    def almost(policy: PolicyNet) -> PolicyNet:
        twin = copy.deepcopy(policy)
        for parameter in twin.parameters():
            parameter.data = parameter.data.bfloat16().float()
        return twin

    monkeypatch.setattr(gpu_check, "copy", SimpleNamespace(deepcopy=almost))
    assert len(gpu_check.failures(gpu_check.parity("cpu"))) == 3
    assert len(gpu_check.failures({"bf16_loss": float("nan"), "kv_reuse_loss": 1e-3, "feed_exact": 0.0})) == 3


def test_gpu_checks_other_parts(gpu_check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "TIMED_STEPS", 1)
    monkeypatch.setattr(gpu_check, "TIMED_PASSES", 1)
    monkeypatch.setattr(gpu_check, "BLOCKS", 2)
    figures = gpu_check.bf16("cpu") | gpu_check.feed("cpu", 2)
    figures |= gpu_check.kv_reuse(gpu_check.tiny_policy("gated"), 2, "cpu")
    figures |= gpu_check.speed("tiny", [1], "cpu")
    assert gpu_check.failures(figures) == []
    assert figures["feed_exact"] == 1.0
    assert figures["bf16_loss"] > 0.0
    assert all(figures[f"step_seconds_{name}_b1"] for name in ("frozen", "lora", "frozen_checkpointing"))


def test_gpu_check_without_a_gpu(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out == "no CUDA device: nothing to check\n"
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "everything"])
