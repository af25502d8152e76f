from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from geomcache.cache_schemas.errors import ConfigError, InputError
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


def test_unreadable_folders_are_named(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        make_backbone(base_vlm=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="between 1 and 3"):
        make_backbone((2, 9))


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
