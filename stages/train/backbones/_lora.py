"""LoRA for the language model of a backbone: low-rank updates of its linear layers, through peft.

W x + (alpha / rank) B A x with A [rank, in] random and B [out, rank] zero (Hu et al., LoRA, 2021), so the first forward
pass is that of the published weights.

Non-obvious:
- Layers are replaced in place: ``q_proj.weight`` is ``q_proj.base_layer.weight`` afterwards, in the state dict too.
- peft matches layers by the end of their name. Qwen2.5-VL's vision tower has projections of the same names, so the
  language model alone is handed over.
- peft gives an adapter the base weights' dtype and device. AdamW's steps vanish in bfloat16, so adapters are float32;
  peft casts the activations on their way in and out.
- While B is zero no gradient reaches A; from the second step on it does.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import MissingDependency

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraOptions(Schema):
    """Which linear layers of every decoder layer get an adapter, and its size."""

    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)  # the update is scaled by alpha / rank
    dropout: float = Field(0.0, ge=0.0, lt=1.0)  # of the adapter's input, while training
    targets: tuple[Projection, ...] = Field(PROJECTIONS, min_length=1)


def add_lora(language_model: nn.Module, options: LoraOptions) -> None:
    """Freeze ``language_model`` and give its target layers trainable float32 adapters, in place.

    Initial values are drawn from the global generator.

    Raises:
        MissingDependency: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as problem:
        raise MissingDependency(
            "LoRA needs the Python package peft",
            expected="`import peft` works",
            found=str(problem),
            fix="pip install 'peft>=0.18'",
        ) from problem
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
    )
    inject_adapter_in_model(config, language_model)
    for module in language_model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A.float()
            module.lora_B.float()
