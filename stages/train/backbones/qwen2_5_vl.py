"""Qwen2.5-VL as a feature extractor: images + instruction -> the hidden states of chosen decoder layers.

``base_vlm: tiny`` is a random small model of the same classes; anything else is a local folder or a hub id.

Non-obvious:
- The bare ``Qwen2_5_VLModel`` is used: the LM head would be computed for nothing, its weight get no gradient.
- ``hidden_states[n]`` is the raw residual stream after decoder layer n, except the last, which has passed the
  final norm; scales differ by layer, so the action head normalises per layer.
- Decoder layers above the highest chosen one are never built, so "the last layer" is always in use.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError
from geomcache.stages.train import tiny_vlm
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.building import pair_layers, seeded
from geomcache.stages.train.packer import Packer

_LAYER = re.compile(r"language_model\.layers\.(\d+)\.")


class Config(Schema):
    """Which VLM, and how it is fed."""

    base_vlm: str = "tiny"  # "tiny", a local folder, or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct
    tiny: tiny_vlm.TinySizes = tiny_vlm.TinySizes()  # read for base_vlm "tiny" only
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; autocast is the caller's
    image_size: int = Field(112, gt=0)  # pixels, a multiple of 28
    prompt: str = "{instruction}"  # the text after the images
    prompt_length: int | None = Field(None, gt=0)  # padded length S; None = the longest of the batch
    max_prompt_tokens: int = Field(512, gt=0)  # longer prompts are refused
    freeze: Literal["none", "vision", "llm", "all"] = "none"
    seed: int = 0  # of random weights


class Backbone(nn.Module):
    """The VLM and its packer.

    Args:
        config: see ``Config``.
        layer_indices: the decoder layers wanted, 1-based, ascending (repeats allowed); see ``pair_layers``.
        folder: rebuild the architecture, tokenizer and image processor from what ``save`` wrote, with random
            weights (for ``load_state_dict``); ``config.base_vlm`` is not touched then.

    Raises:
        InputError: the folder or hub id cannot be read, or its weights do not fit.
        ConfigError: ``layer_indices`` or ``image_size`` do not fit the model.
    """

    def __init__(self, config: Config, *, layer_indices: Sequence[int], folder: Path | None = None) -> None:
        super().__init__()
        self.config = config
        vlm_config = _read_config(config, folder)
        pair_layers(vlm_config.text_config.num_hidden_layers, len(layer_indices), layer_indices)
        _cut_layers(vlm_config, max(layer_indices))
        self.layer_indices = tuple(layer_indices)
        self.packer = _build_packer(config, folder)
        if folder is not None or config.base_vlm == "tiny":
            with seeded(config.seed):
                self.vlm: Any = Qwen2_5_VLModel(vlm_config).to(getattr(torch, config.dtype))
        else:
            self.vlm = _load_weights(config, vlm_config)
        self._freeze()

    @staticmethod
    def count_layers(config: Config, folder: Path | None = None) -> int:
        """Number of decoder layers of the VLM, read without loading weights."""
        return int(_read_config(config, folder).text_config.num_hidden_layers)

    @property
    def context_dim(self) -> int:
        """C."""
        return int(self.vlm.config.text_config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Decoder layers that are kept."""
        return int(self.vlm.config.text_config.num_hidden_layers)

    def forward(self, batch: PolicyBatch) -> tuple[list[torch.Tensor], torch.Tensor]:
        """A hidden state [B, S, C] per entry of ``layer_indices``; the bool mask [B, S] of real tokens."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.freeze != "all"):
            hidden_states = self.vlm(
                input_ids=batch.input_ids_BS,
                attention_mask=batch.attention_mask_BS,
                mm_token_type_ids=batch.mm_token_type_ids_BS,
                pixel_values=batch.pixel_values,
                image_grid_thw=batch.image_grid_thw,
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        return [hidden_states[layer] for layer in self.layer_indices], batch.attention_mask_BS.bool()

    def train(self, mode: bool = True) -> Self:
        """As usual, but frozen parts stay in eval mode."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def save(self, folder: Path) -> None:
        """Write what the constructor's ``folder`` needs: config, tokenizer, image processor; no weights."""
        folder.mkdir(parents=True, exist_ok=True)
        self.vlm.config.save_pretrained(folder)
        self.packer.save(folder)

    def _frozen_parts(self) -> list[nn.Module]:
        visual, language_model = self.vlm.visual, self.vlm.language_model
        return {
            "none": [],
            "vision": [visual],
            "llm": [language_model],
            "all": [visual, language_model],
        }[self.config.freeze]

    def _freeze(self) -> None:
        for part in self._frozen_parts():
            part.requires_grad_(False)
            part.eval()


def _read_config(config: Config, folder: Path | None) -> Any:
    """A ``Qwen2_5_VLConfig`` (whose parts transformers declares as "dict, config or None")."""
    if folder is None and config.base_vlm == "tiny":
        return tiny_vlm.build_config(config.tiny, tiny_vlm.build_tokenizer())
    source = config.base_vlm if folder is None else folder
    try:
        found: Any = Qwen2_5_VLConfig.from_pretrained(source)
    except OSError as problem:
        raise _unreadable(source, problem) from problem
    if found.vision_config.out_hidden_size != found.text_config.hidden_size:
        raise InputError(
            f"{source} is not a Qwen2.5-VL model",
            expected="vision features as wide as the language model",
            found=f"{found.vision_config.out_hidden_size} and {found.text_config.hidden_size}",
            fix="set base_vlm to a Qwen2.5-VL folder or hub id",
        )
    return found


def _cut_layers(vlm_config: Any, layers: int) -> None:
    vlm_config.text_config.num_hidden_layers = layers
    vlm_config.text_config.layer_types = vlm_config.text_config.layer_types[:layers]


def _build_packer(config: Config, folder: Path | None) -> Packer:
    options: dict[str, Any] = {
        "image_size": config.image_size,
        "prompt": config.prompt,
        "prompt_length": config.prompt_length,
        "max_prompt_tokens": config.max_prompt_tokens,
    }
    if folder is None and config.base_vlm == "tiny":
        return Packer(tiny_vlm.build_tokenizer(), tiny_vlm.build_image_processor(), **options)
    return Packer.load(config.base_vlm if folder is None else folder, **options)


def _load_weights(config: Config, vlm_config: Any) -> Qwen2_5_VLModel:
    try:
        loaded: Any = Qwen2_5_VLModel.from_pretrained(
            config.base_vlm,
            config=vlm_config,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed in the report and refused below, under its name
        )
    except OSError as problem:
        raise _unreadable(config.base_vlm, problem) from problem
    vlm: Qwen2_5_VLModel = loaded[0]
    report: dict[str, list[str]] = loaded[1]
    kept = vlm_config.text_config.num_hidden_layers
    unexpected = [
        key
        for key in report["unexpected_keys"]
        if not key.startswith("lm_head.") and not ((layer := _LAYER.search(key)) and int(layer.group(1)) >= kept)
    ]
    wrong = [*report["missing_keys"], *unexpected, *report["mismatched_keys"]]
    if wrong:
        raise InputError(
            f"the weights of {config.base_vlm} do not fit Qwen2.5-VL",
            expected="every weight of the model, and no other but the LM head",
            found=f"{len(wrong)} missing, unexpected or of another shape, first {wrong[0]}",
            fix="set base_vlm to a complete Qwen2.5-VL folder or hub id",
        )
    return vlm


def _unreadable(source: str | Path, problem: OSError) -> InputError:
    return InputError(
        f"base_vlm {str(source)!r} cannot be read",
        expected='"tiny", a folder with config.json and *.safetensors, or a cached or reachable hub id',
        found=str(problem).splitlines()[0],
        fix="download the model into a folder and name that folder",
    )
