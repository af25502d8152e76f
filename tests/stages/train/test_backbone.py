import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from geomcache.cache_schemas.errors import ConfigError, InputError, MissingDependency
from geomcache.stages.train import tiny_vlm
from geomcache.stages.train.backbones.qwen2_5_vl import Backbone, Config
from geomcache.stages.train.batch import PolicyBatch

TEXTS = ["turn on the stove", "pick up the red bowl and place it in the basket, then close the drawer"]


@pytest.fixture
def make_backbone(small_vlm: dict[str, Any]) -> Callable[..., Backbone]:
    def make(layers: tuple[int, ...] = (1, 3), folder: Path | None = None, **options: Any) -> Backbone:
        return Backbone(Config.model_validate(small_vlm | options), layer_indices=layers, folder=folder).eval()

    return make


def pack(backbone: Backbone, texts: list[str], seed: int = 0) -> PolicyBatch:
    images = np.random.default_rng(seed).integers(0, 256, (2, 2, 56, 56, 3), dtype=np.uint8)[: len(texts)]
    return PolicyBatch(**backbone.packer(images, texts), proprio_BP=torch.zeros(len(texts), 8))


@pytest.fixture
def published(small_vlm: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint folder as the hub has them: written by transformers' own classes, with an LM head."""
    tokenizer = tiny_vlm.build_tokenizer()
    config = tiny_vlm.build_config(tiny_vlm.TinySizes(**small_vlm["tiny"]), tokenizer)
    config.tie_word_embeddings = False
    torch.manual_seed(5)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path / "vlm")
    tokenizer.save_pretrained(tmp_path / "vlm")
    tiny_vlm.build_image_processor().save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm"


def test_hidden_states(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone((1, 1, 3))
    assert (backbone.context_dim, backbone.num_layers) == (64, 3)
    batch = pack(backbone, TEXTS)
    hidden, mask_BS = backbone(batch)
    assert len(hidden) == 3
    assert hidden[0] is hidden[1]
    assert hidden[2].shape == (*batch.input_ids_BS.shape, 64)
    assert mask_BS.dtype == torch.bool
    assert all(states.isfinite().all() for states in hidden)  # at padding too
    again, _ = backbone(batch)
    assert torch.equal(hidden[2], again[2])


def test_last_hidden_state_has_passed_the_norm(make_backbone: Callable[..., Backbone]) -> None:
    """RMSNorm with unit weights: mean square 1 at every token of the last layer, and of no other."""
    hidden, mask_BS = make_backbone()(pack(make_backbone(), TEXTS))
    torch.testing.assert_close(hidden[1].square().mean(-1)[mask_BS], torch.ones(int(mask_BS.sum())), atol=0.02, rtol=0)
    assert (hidden[0].square().mean(-1)[mask_BS] < 0.5).all()


def test_trailing_layers_are_not_built(make_backbone: Callable[..., Backbone]) -> None:
    full, cut = make_backbone((1, 2, 3)), make_backbone((1, 2))
    assert cut.num_layers == 2
    cut.vlm.load_state_dict(full.vlm.state_dict(), strict=False)
    batch = pack(cut, TEXTS)
    torch.testing.assert_close(full(batch)[0][0], cut(batch)[0][0])
    normed = full.vlm.language_model.norm(full(batch)[0][1])
    torch.testing.assert_close(normed, cut(batch)[0][1])


def test_left_padding_and_neighbours_do_not_matter(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone()
    alone, both = pack(backbone, TEXTS[:1]), pack(backbone, TEXTS)
    length = alone.input_ids_BS.shape[1]
    assert both.input_ids_BS.shape[1] > length
    for one, two in zip(backbone(alone)[0], backbone(both)[0], strict=True):
        torch.testing.assert_close(one[0], two[0, -length:], atol=1e-5, rtol=0)


def test_images_and_text_and_their_order_matter(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone()
    batch = pack(backbone, TEXTS)
    last = backbone(batch)[0][-1][:, -1]
    other_text = pack(backbone, [TEXTS[0], TEXTS[1].replace("red", "black")])
    changed = backbone(other_text)[0][-1][:, -1]
    torch.testing.assert_close(changed[0], last[0], atol=1e-5, rtol=0)
    assert (changed[1] - last[1]).abs().max() > 1e-3
    patches = batch.pixel_values.view(2, 2, -1, batch.pixel_values.shape[-1])
    swapped = replace(batch, pixel_values=patches.flip(1).reshape(batch.pixel_values.shape))
    assert (backbone(swapped)[0][-1][:, -1] - last).abs().max() > 1e-4


def test_save_then_rebuild_without_the_source(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone((1, 2))
    backbone.save(tmp_path)
    rebuilt = make_backbone((1, 2), folder=tmp_path, base_vlm="/nowhere", seed=9)
    batch = pack(backbone, TEXTS)
    assert not torch.equal(backbone(batch)[0][0], rebuilt(batch)[0][0])
    rebuilt.load_state_dict(backbone.state_dict())
    assert torch.equal(backbone(batch)[0][1], rebuilt(pack(rebuilt, TEXTS))[0][1])


def test_published_folder(published: Path, make_backbone: Callable[..., Backbone]) -> None:
    config = Config(base_vlm=str(published), image_size=56)
    assert Backbone.count_layers(config) == 3
    backbone = make_backbone((2, 3), base_vlm=str(published))
    batch = pack(backbone, TEXTS)
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(published).eval().model
    expected = reference(
        input_ids=batch.input_ids_BS,
        attention_mask=batch.attention_mask_BS,
        mm_token_type_ids=batch.mm_token_type_ids_BS,
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.image_grid_thw,
        output_hidden_states=True,
    ).hidden_states
    for layer, found in zip((2, 3), backbone(batch)[0], strict=True):
        torch.testing.assert_close(found, expected[layer], atol=1e-5, rtol=0)


def test_published_folder_cut_and_in_bfloat16(published: Path, make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone((1, 2), base_vlm=str(published), dtype="bfloat16")
    assert backbone.num_layers == 2
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    assert backbone(pack(backbone, TEXTS))[0][1].isfinite().all()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused(
    published: Path, make_backbone: Callable[..., Backbone], fault: str
) -> None:
    weights = load_file(published / "model.safetensors")
    name = next(name for name in weights if "layers.0.mlp.down_proj" in name)
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        weights[name.replace("down_proj", "side_proj")] = weights[name].clone()
    else:
        weights[name] = weights[name][:3].clone()
    save_file(weights, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"base_vlm|do not fit"):
        make_backbone((2, 3), base_vlm=str(published))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_text_config(folder: Path, **fields: Any) -> None:
    edit_config(folder, text_config=json.loads((folder / "config.json").read_text())["text_config"] | fields)


def cut(path: Path, size: int = 1000) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_a_foreign_config_does_not_choose_the_code_that_runs(
    published: Path, make_backbone: Callable[..., Backbone]
) -> None:
    """transformers would fetch a kernel of that name from the hub."""
    edit_config(published, attn_implementation="some-org/some-kernel", _attn_implementation="flash_attention_2")
    edit_text_config(published, attn_implementation="some-org/some-kernel")
    vlm = make_backbone((2, 3), base_vlm=str(published)).vlm
    assert vlm.language_model.config._attn_implementation == vlm.visual.config._attn_implementation == "sdpa"


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"cannot be read[^$]*no config\.json"),
    "config cut": (lambda f: cut(f / "config.json", 40), "not a valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "cannot be read"),
    "quantised": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), "is quantised"),
    "another model": (lambda f: edit_config(f, model_type="llama"), r"another kind of model[^$]*'llama'"),
    "size not a number": (lambda f: edit_text_config(f, hidden_size="wide"), r"cannot be read[^$]*hidden_size"),
    "heads do not divide": (lambda f: edit_text_config(f, num_attention_heads=7), r"cannot be read[^$]*divisible"),
    "widths differ": (lambda f: edit_text_config(f, hidden_size=96), "contradicts itself"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"cannot be read[^$]*no file named model"),
    "weights cut": (lambda f: cut(f / "model.safetensors"), r"cannot be read[^$]*header"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "tokenizer of base_vlm"),
    "no vocabulary": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer of base_vlm"),
    "tokenizer cut": (lambda f: cut(f / "tokenizer.json"), "tokenizer of base_vlm"),
    "vocabulary larger than the model's": (lambda f: edit_text_config(f, vocab_size=300), "tokenizer of base_vlm"),
    "image token of another tokenizer": (lambda f: edit_config(f, image_token_id=5), "tokenizer of base_vlm"),
    "no image processor": (lambda f: (f / "preprocessor_config.json").unlink(), "image processor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_folders_are_named(published: Path, make_backbone: Callable[..., Backbone], fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(published)
    with pytest.raises(InputError, match=message) as caught:
        make_backbone((2, 3), base_vlm=str(published))
    assert str(published) in str(caught.value)


def test_a_model_that_is_nowhere_is_named(
    make_backbone: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "absent"), "nobody/no-such-model", "two words"):
        with pytest.raises(InputError, match=r"cannot be read[^$]*asked as a hub id[^$]*hf download") as caught:
            make_backbone(base_vlm=name)
        assert repr(name) in str(caught.value)
    with pytest.raises(ValidationError, match="at least 1 character"):
        make_backbone(base_vlm="")
    with pytest.raises(ConfigError, match="between 1 and 3"):
        make_backbone((2, 9))


def test_rebuilt_in_bfloat16_is_the_same_to_the_bit(
    published: Path, make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    """As an evaluation rebuilds a training's VLM; casting the module would round its rotary frequencies."""
    backbone = make_backbone((1, 3), base_vlm=str(published), dtype="bfloat16")
    backbone.save(tmp_path / "saved")
    rebuilt = make_backbone((1, 3), base_vlm=str(published), dtype="bfloat16", folder=tmp_path / "saved")
    rebuilt.load_state_dict(backbone.state_dict())
    batch = pack(backbone, TEXTS)
    for one, two in zip(backbone(batch)[0], rebuilt(batch)[0], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["tiny", "Qwen/Qwen2.5-VL-3B-Instruct", "published"])
def test_architecture_without_weights(
    published: Path,
    make_backbone: Callable[..., Backbone],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    source = str(published) if name == "published" else name
    Backbone.write_architecture(make_backbone().config.model_copy(update={"base_vlm": source}), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with torch.device("meta"):
        backbone = make_backbone((2, 3), base_vlm=source, folder=tmp_path / "out", dtype="bfloat16")
    assert backbone.context_dim == (2048 if name.startswith("Qwen") else 64)
    assert {(p.device.type, p.dtype) for p in backbone.parameters()} == {("meta", torch.bfloat16)}
    with pytest.raises(InputError, match="cannot be read"):
        Backbone.write_architecture(Config(base_vlm="nobody/no-such-model"), tmp_path / "out")


@pytest.mark.parametrize(
    ("freeze", "visual", "language_model"),
    [("none", True, True), ("vision", False, True), ("llm", True, False), ("all", False, False)],
)
def test_freeze(make_backbone: Callable[..., Backbone], freeze: str, visual: bool, language_model: bool) -> None:
    backbone = make_backbone(freeze=freeze).train()
    assert all(p.requires_grad == visual for p in backbone.vlm.visual.parameters())
    assert all(p.requires_grad == language_model for p in backbone.vlm.language_model.parameters())
    assert backbone.vlm.visual.training == visual
    assert backbone(pack(backbone, TEXTS))[0][1].requires_grad == (visual or language_model)


def test_frozen_parts_and_the_graph(make_backbone: Callable[..., Backbone]) -> None:
    """A frozen tower builds none; a frozen language model still hands the tower its gradient, and keeps none."""
    made: list[bool] = []
    for freeze in ("vision", "llm"):
        backbone = make_backbone(freeze=freeze).train()
        backbone.vlm.visual.merger.register_forward_hook(lambda *_: made.append(_[2].requires_grad))
        backbone(pack(backbone, TEXTS))[0][1].sum().backward()
        for name, parameter in backbone.vlm.named_parameters():
            assert (parameter.grad is None) == name.startswith({"vision": "visual", "llm": "language"}[freeze]), name
    assert made == [False, True]


LORA: dict[str, Any] = {"rank": 4, "alpha": 8}


def adapters(backbone: Backbone, which: str = "lora_") -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in backbone.named_parameters() if which in name}


@pytest.mark.parametrize(("freeze", "visual"), [("none", True), ("vision", False)])
def test_lora_trains_adapters_in_float32(make_backbone: Callable[..., Backbone], freeze: str, visual: bool) -> None:
    backbone = make_backbone(freeze=freeze, lora=LORA, dtype="bfloat16")
    assert len(adapters(backbone)) == 3 * 7 * 2
    assert {p.dtype for p in adapters(backbone).values()} == {torch.float32}
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or (visual and "visual" in name)), name
        assert not ("lora_" in name and "visual" in name), name
    assert {s.dtype for s in backbone(pack(backbone, TEXTS))[0]} == {torch.bfloat16}


def test_every_adapter_gets_gradient_once_b_has_left_zero(make_backbone: Callable[..., Backbone]) -> None:
    """B starts at 0 and A's gradient is a multiple of B, so at the first step A's is 0 and that is right."""
    backbone = make_backbone(freeze="vision", lora=LORA).train()
    batch = pack(backbone, TEXTS)

    def step() -> dict[str, bool]:
        backbone.zero_grad()
        sum(states.square().mean() for states in backbone(batch)[0]).backward()
        return {name: bool(p.grad.abs().sum() > 0) for name, p in adapters(backbone).items() if p.grad is not None}

    first = step()
    assert all(moved == ("lora_B" in name) for name, moved in first.items())
    torch.optim.SGD(adapters(backbone).values(), lr=1.0).step()
    assert all(step().values())
    assert step().keys() == adapters(backbone).keys()


def test_lora_is_the_published_formula(make_backbone: Callable[..., Backbone]) -> None:
    """W + (alpha / rank) B A put into a model without adapters gives the same hidden states; B = 0 gives W's."""
    plain, adapted = make_backbone(), make_backbone(lora=LORA)
    batch = pack(plain, TEXTS)
    assert torch.equal(plain(batch)[0][1], adapted(batch)[0][1])
    for parameter in adapters(adapted, "lora_B").values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    state, merged = adapted.state_dict(), plain.state_dict()
    for name in merged:
        if (a := name.replace(".weight", ".lora_A.default.weight")) in state:
            merged[name] = merged[name] + 8 / 4 * state[a.replace("lora_A", "lora_B")] @ state[a]
    before = plain(batch)[0][1]
    plain.load_state_dict(merged)
    assert (before - plain(batch)[0][1]).abs().max() > 1e-2
    torch.testing.assert_close(adapted(batch)[0][1], plain(batch)[0][1], atol=1e-5, rtol=1e-5)


def test_lora_comes_back_from_a_saved_folder(
    published: Path, make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    """Seeded, and from the state dict, as a checkpoint is resumed and evaluated."""
    options: dict[str, Any] = {"base_vlm": str(published), "lora": LORA, "dtype": "bfloat16", "freeze": "vision"}
    global_state = torch.get_rng_state()
    backbone = make_backbone(**options)
    assert torch.equal(global_state, torch.get_rng_state())
    assert all(torch.equal(p, adapters(make_backbone(**options))[n]) for n, p in adapters(backbone).items())
    for parameter in adapters(backbone).values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    backbone.save(tmp_path / "saved")
    rebuilt = make_backbone(**options, folder=tmp_path / "saved", seed=7)
    assert not torch.equal(*(next(iter(adapters(b).values())) for b in (backbone, rebuilt)))
    rebuilt.load_state_dict(backbone.state_dict())
    batch = pack(backbone, TEXTS)
    assert torch.equal(backbone(batch)[0][1], rebuilt(batch)[0][1])


def test_lora_mistakes_are_named(make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    for freeze in ("llm", "all"):
        with pytest.raises(ValidationError, match="leaves lora nothing to train"):
            make_backbone(freeze=freeze, lora=LORA)
    with pytest.raises(ValidationError, match="'q_proj', 'k_proj'"):
        make_backbone(lora=LORA | {"targets": ["query"]})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependency, match="pip install 'peft"):
        make_backbone(lora=LORA)


@pytest.mark.parametrize(
    ("options", "recomputed"),
    [
        ({}, {"visual", "language"}),
        ({"freeze": "vision"}, {"language"}),
        ({"freeze": "llm"}, {"visual", "language"}),  # the tower's gradient passes through the language model
        ({"freeze": "all"}, set()),
        ({"freeze": "vision", "lora": LORA | {"dropout": 0.5}}, {"language"}),
        ({"freeze": "none", "lora": LORA}, {"visual", "language"}),
    ],
)
def test_gradient_checkpointing(
    make_backbone: Callable[..., Backbone], options: dict[str, Any], recomputed: set[str]
) -> None:
    """The same loss and gradients to the bit, every layer computed twice, and only while training."""

    def run(checkpointing: bool, training: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor], Counter[str]]:
        backbone, calls = make_backbone(**options), Counter[str]()
        for part in [*backbone.vlm.visual.blocks, *backbone.vlm.language_model.layers]:
            attention, side = (part.attn, "visual") if hasattr(part, "attn") else (part.self_attn, "language")
            attention.register_forward_pre_hook(lambda *_, side=side: calls.update([side]))
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        backbone.train(training)
        torch.manual_seed(0)  # the adapters' dropout
        loss = sum(states.square().mean() for states in backbone(pack(backbone, TEXTS))[0])
        assert isinstance(loss, torch.Tensor)
        if loss.requires_grad:
            loss.backward()
        return loss, {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}, calls

    (loss, grads, once), (again, regrads, twice) = run(False), run(True)
    assert torch.equal(loss, again)
    assert grads.keys() == regrads.keys()
    assert all(torch.equal(grad, regrads[name]) for name, grad in grads.items())
    assert once == {"visual": 1, "language": 3}
    assert twice == {side: count * (2 if side in recomputed else 1) for side, count in once.items()}
    assert run(True, training=False)[2] == once
