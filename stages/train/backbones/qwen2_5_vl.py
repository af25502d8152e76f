"""Qwen2.5-VL as a feature extractor: images + instruction -> the hidden states of chosen decoder layers.

``base_vlm: tiny`` is a random small model of the same classes; anything else is a local folder or a hub id.

Non-obvious:
- The bare ``Qwen2_5_VLModel`` is used: the LM head would be computed for nothing, its weight get no gradient.
- ``hidden_states[n]`` is the raw residual stream after decoder layer n, except the last, which has passed the
  final norm; scales differ by layer, so the action head normalises per layer.
- Decoder layers above the highest chosen one are never built, so "the last layer" is always in use.
- A model without weights is built in its dtype, never cast: ``.to(bfloat16)`` would round the rotary frequencies, which
  ``from_pretrained`` keeps in float32, and a reloaded policy would see other positions than it was trained with.
- transformers reads another model type's config.json, or none at all, into this class with a mere warning, and makes an
  empty tokenizer where there are no tokenizer files; hence the checks here.
- A frozen part in which nothing needs a gradient builds no graph; torch sees to that, no ``no_grad`` is needed.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.modeling_layers import GradientCheckpointingLayer

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.stages.train import tiny_vlm
from geomcache.stages.train.backbones._lora import LoraOptions, add_lora
from geomcache.stages.train.backbones._published import PUBLISHED
from geomcache.stages.train.backbones._stem import Stem, StemConfig
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.building import pair_layers, seeded
from geomcache.stages.train.packer import Packer

_LAYER = re.compile(r"language_model\.layers\.(\d+)\.")


class Config(Schema):
    """Which VLM, and how it is fed."""

    # "tiny", a local folder, or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct
    base_vlm: str = Field("tiny", min_length=1)
    tiny: tiny_vlm.TinySizes = tiny_vlm.TinySizes()  # read for base_vlm "tiny" only
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; autocast is the caller's
    image_size: int = Field(112, gt=0)  # pixels, a multiple of 28
    images: Literal["seen", "none"] = "seen"  # none: the policy is blind (its prompt has no images): a control
    stem: StemConfig | None = None  # convolutions beside the vision tower; {} for its defaults
    prompt: str = "{instruction}"  # the text after the images
    prompt_length: int | None = Field(None, gt=0)  # padded length S; None = the longest of the batch
    max_prompt_tokens: int = Field(512, gt=0)  # longer prompts are refused
    freeze: Literal["none", "vision", "llm", "all"] = "none"
    # Adapters train the language model while its own weights (embeddings and norms too) stay as they are; ``freeze``
    # then says whether the vision tower is trained: none = yes, vision = no.
    lora: LoraOptions | None = None
    seed: int = 0  # of random weights, and of the adapters

    @model_validator(mode="after")
    def _stem_has_images(self) -> Self:
        if self.stem is not None and self.images == "none":
            raise ValueError("a stem has nothing to look at with images: none")
        return self

    @model_validator(mode="after")
    def _lora_trains_something(self) -> Self:
        if self.lora is not None and self.freeze in ("llm", "all"):
            raise ValueError(
                f"freeze {self.freeze!r} leaves lora nothing to train; with lora the language model's own weights are"
                " frozen anyway: set freeze to 'vision' (adapters alone are trained) or 'none' (the vision tower too)"
            )
        return self


class Backbone(nn.Module):
    """The VLM and its packer.

    Args:
        config: see ``Config``.
        layer_indices: the decoder layers wanted, 1-based, ascending (repeats allowed); see ``pair_layers``.
        folder: rebuild the architecture, tokenizer and image processor from what ``save`` wrote, with random
            weights (for ``load_state_dict``); ``config.base_vlm`` is not touched then.

    Raises:
        InputError: the folder or hub id cannot be read, or its weights or its tokenizer do not fit.
        ConfigError: ``layer_indices`` or ``image_size`` do not fit the model.
        MissingDependency: ``lora`` without peft.
    """

    def __init__(self, config: Config, *, layer_indices: Sequence[int], folder: Path | None = None) -> None:
        super().__init__()
        self.config = config
        vlm_config = _read_config(config, folder)
        pair_layers(vlm_config.text_config.num_hidden_layers, len(layer_indices), layer_indices)
        _cut_layers(vlm_config, max(layer_indices))
        self.layer_indices = tuple(layer_indices)
        self.packer = _build_packer(config, folder)
        _require_own_tokenizer(self.packer, vlm_config, str(folder or config.base_vlm))
        if folder is not None or config.base_vlm == "tiny":
            with seeded(config.seed):
                model_class: Any = Qwen2_5_VLModel
                self.vlm: Any = model_class._from_config(vlm_config, dtype=getattr(torch, config.dtype))
        else:
            self.vlm = _load_weights(config, vlm_config)
        if config.lora is not None:
            with seeded(config.seed):
                add_lora(self.vlm.language_model, config.lora)
        self.stem: Stem | None = None
        if config.stem is not None:
            with seeded(config.seed):
                self.stem = Stem(config.stem, image_size=config.image_size, width=self.context_dim)
        self._checkpointing = False
        self._freeze()

    @staticmethod
    def count_layers(config: Config, folder: Path | None = None) -> int:
        """Number of decoder layers of the VLM, read without loading weights."""
        return int(_read_config(config, folder).text_config.num_hidden_layers)

    @staticmethod
    def write_architecture(config: Config, folder: Path) -> None:
        """Write what the constructor's ``folder`` needs without having, or reading, any weights.

        So a policy of ``config.base_vlm``'s true sizes can be built with random weights, or with none on torch's meta
        device. The published sizes stand in for a hub id that is not in this machine's cache. The tokenizer is the
        tiny one: enough for a forward pass.

        Raises:
            InputError: the folder or hub id cannot be read.
        """
        tokenizer = tiny_vlm.build_tokenizer()
        tiny = tiny_vlm.build_config(config.tiny, tokenizer)
        vlm_config = tiny if config.base_vlm == "tiny" else _known_architecture(config)
        vlm_config.image_token_id, vlm_config.video_token_id = tiny.image_token_id, tiny.video_token_id
        vlm_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tiny_vlm.build_image_processor().save_pretrained(folder)

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
        trained = self.config.freeze != "all" or self.stem is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            hidden_states = self.vlm(
                input_ids=batch.input_ids_BS,
                attention_mask=batch.attention_mask_BS,
                mm_token_type_ids=batch.mm_token_type_ids_BS,
                output_hidden_states=True,
                use_cache=False,
                **self._images(batch),
            ).hidden_states
        return [hidden_states[layer] for layer in self.layer_indices], batch.attention_mask_BS.bool()

    def _images(self, batch: PolicyBatch) -> dict[str, Any]:
        """The VLM's arguments about images; none for a blind policy."""
        if self.config.images == "none":
            return {}
        if self.stem is None:
            return {"pixel_values": batch.pixel_values, "image_grid_thw": batch.image_grid_thw}
        seen = self.vlm.get_image_features(batch.pixel_values, batch.image_grid_thw)
        tokens_NC = torch.cat(seen.pooler_output)
        seen.pooler_output = (tokens_NC + self.stem(batch.pixel_values).to(tokens_NC.dtype),)
        return {"mm_encoder_outputs": {"image": seen}, "image_grid_thw": batch.image_grid_thw}

    def train(self, mode: bool = True) -> Self:
        """As usual, but frozen parts stay in eval mode."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        if self._checkpointing and self.config.freeze == "llm":
            # the vision tower's gradient passes through these: their own flag, which nothing but checkpointing reads;
            # the attention inside stays in eval mode
            for layer in self.vlm.language_model.layers:
                layer.training = mode
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Compute decoder layers and vision blocks again in backward, while in train mode; the same numbers.

        Set on the layers directly: transformers' own method has another name in each release, and makes the embeddings'
        output require a gradient, which a frozen VLM would pay for with a graph.
        """
        self._checkpointing = True
        layers: list[Any] = [part for part in self.vlm.modules() if isinstance(part, GradientCheckpointingLayer)]
        for layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.train(self.training)

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


def _read_config(config: Config, folder: Path | None, *, local_only: bool = False) -> Any:
    """A ``Qwen2_5_VLConfig`` (whose parts transformers declares as "dict, config or None")."""
    if folder is None and config.base_vlm == "tiny":
        return tiny_vlm.build_config(config.tiny, tiny_vlm.build_tokenizer())
    source = str(config.base_vlm if folder is None else folder)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise _unreadable(source, "no config.json in it")
    try:
        fields = Qwen2_5_VLConfig.get_config_dict(source, local_files_only=local_only)[0]
        model_type = fields.get("model_type", "none")
        quantised = "quantization_config" in fields
        found: Any = None
        if model_type == Qwen2_5_VLConfig.model_type and not quantised:
            found = Qwen2_5_VLConfig.from_dict(_own_attention(fields))
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as problem:
        # no such file, no JSON; sizes that contradict each other, of the wrong type; JSON that is no object
        raise _unreadable(source, problem) from problem
    if quantised:
        raise InputError(
            f"base_vlm {source!r} is quantised",
            expected="the weights in full precision, such as Qwen/Qwen2.5-VL-3B-Instruct",
            found="quantization_config in its config.json",
            fix="set base_vlm to the model that it was quantised from",
        )
    if found is None:
        raise InputError(
            f"base_vlm {source!r} is another kind of model",
            expected=f"model_type {Qwen2_5_VLConfig.model_type!r} in its config.json",
            found=repr(model_type),
            fix="set base_vlm to a Qwen2.5-VL folder or hub id",
        )
    if found.vision_config.out_hidden_size != found.text_config.hidden_size:
        raise InputError(
            f"the config.json of base_vlm {source!r} contradicts itself",
            expected="vision features (out_hidden_size) as wide as the language model (hidden_size)",
            found=f"{found.vision_config.out_hidden_size} and {found.text_config.hidden_size}",
            fix="download the model's config.json again",
        )
    return found


def _own_attention(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what picks an implementation: torch's own attention is used; a foreign file could name code to fetch."""
    kept = {name: value for name, value in fields.items() if "attn_implementation" not in name}
    kept = {name: value for name, value in kept.items() if name != "experts_implementation"}
    return {name: _own_attention(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _known_architecture(config: Config) -> Any:
    """As ``_read_config``; of a published model also where this machine does not have it, without asking the hub."""
    if config.base_vlm not in PUBLISHED:
        return _read_config(config, None)
    try:
        return _read_config(config, None, local_only=True)
    except InputError:
        return Qwen2_5_VLConfig(**PUBLISHED[config.base_vlm])


def _cut_layers(vlm_config: Any, layers: int) -> None:
    vlm_config.text_config.num_hidden_layers = layers
    vlm_config.text_config.layer_types = vlm_config.text_config.layer_types[:layers]


def _build_packer(config: Config, folder: Path | None) -> Packer:
    options: dict[str, Any] = {
        "image_size": config.image_size,
        "shows_images": config.images == "seen",
        "prompt": config.prompt,
        "prompt_length": config.prompt_length,
        "max_prompt_tokens": config.max_prompt_tokens,
    }
    if folder is None and config.base_vlm == "tiny":
        return Packer(tiny_vlm.build_tokenizer(), tiny_vlm.build_image_processor(), **options)
    source = config.base_vlm if folder is None else folder
    try:
        return Packer.load(source, **options)
    except GeomcacheError:
        raise
    except (ValueError, IndexError) as problem:  # a tokenizer.json that is no JSON; an empty vocabulary
        raise _wrong_tokenizer(str(source), f"{type(problem).__name__}: {problem}") from problem


def _require_own_tokenizer(packer: Packer, vlm_config: Any, source: str) -> None:
    """Ids of another tokenizer would be looked up in the embedding without a word."""
    found = packer.tokenizer.encode("<|image_pad|>")
    if found != [vlm_config.image_token_id] or len(packer.tokenizer) > vlm_config.text_config.vocab_size:
        raise _wrong_tokenizer(source, f"{len(packer.tokenizer)} tokens, <|image_pad|> = {found}")


def _load_weights(config: Config, vlm_config: Any) -> Qwen2_5_VLModel:
    try:
        loaded: Any = Qwen2_5_VLModel.from_pretrained(
            config.base_vlm,
            config=vlm_config,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,  # a .bin is a pickle
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed in the report and refused below, under its name
        )
    except (OSError, SafetensorError, ValueError) as problem:  # ValueError: sizes that no model can have
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


def _unreadable(source: str, problem: Exception | str) -> InputError:
    reason = " ".join(str(problem).split())[:200]
    here = Path(source).exists()
    return InputError(
        f"base_vlm {source!r} cannot be read",
        expected="a folder as published (config.json, *.safetensors, tokenizer.json, preprocessor_config.json)"
        if here
        else '"tiny", a folder, or a hub id that is cached or reachable',
        found=reason if here else f"no such folder; asked as a hub id: {reason}",
        fix=_fix(source),
    )


def _wrong_tokenizer(source: str, found: str) -> InputError:
    return InputError(
        f"the tokenizer of base_vlm {source!r} is damaged, missing or another model's",
        expected="the tokenizer.json (or vocab.json and merges.txt) that was published with the weights",
        found=found,
        fix=_fix(source),
    )


def _fix(source: str) -> str:
    model = source if source in PUBLISHED else next(iter(PUBLISHED))
    return f"hf download {model} --local-dir FOLDER, then --set policy.backbone.config.base_vlm=FOLDER"
