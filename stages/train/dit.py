"""The layer-wise DiT action head: noisy actions + time + state -> velocity, one VLM layer per block.

Sequence: [state 1 ; learned future tokens F ; action tokens T]; the last T are decoded (``cross`` has action
tokens only). Every sub-layer is
pre-norm with AdaLN: a LayerNorm without weights whose scale and shift come from the time (no gates: nothing
starts switched off, so every weight has a gradient from the first step on).

Patterns (explicit, saved with the checkpoint):
- ``self+cross``: each block has self-attention, cross-attention and a feed-forward layer.
- ``interleaved``: even blocks cross-attend, odd blocks self-attend, each with a feed-forward layer; VLM
  layers and geometry are paired with the cross-attending blocks only, so that no projection is dead.
- ``cross``: every block cross-attends and none attends to the sequence itself, as the published QwenPI numbers were
  made (starVLA issues 372, 382): an action position sees neither the other positions nor the state. State encoder
  and future tokens could not reach the output, so they are not built.

The context of cross-attending block l is cat(vlm_hidden_l, geom_l), normalised by the block's own LayerNorm
(VLM layers differ in scale). Its keys and values do not depend on time or noise: ``encode_context`` makes
them once per sample, and all R repeated draws and all Euler steps use them. The R draws are folded into the
query axis, which copies nothing.

Shape letters: R draws of (noise, time) per sample, N = 1 + F + T sequence length, M = S + K context length,
E width, h heads, d width of a head; the others as in ``batch.py``.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import ACTION_DIM, STATE_DIM
from geomcache.cache_schemas.errors import ConfigError
from geomcache.stages.train.batch import GeomTokens

INIT_STD = 0.02  # of the AdaLN projections, the learned tokens and the output layer
TIME_SCALE = 1000.0  # time in [0, 1] is spread over the sinusoids' usual range


HEAD_WIDTH = 64  # of an attention head where ``heads`` is not given


class Config(Schema):
    """Sizes of the head."""

    width: int | None = Field(None, gt=0)  # E; None = the VLM's width C
    blocks: int = Field(16, gt=0)
    heads: int | None = Field(None, gt=0)  # None = one for 64 channels
    pattern: Literal["self+cross", "interleaved", "cross"] = "self+cross"
    future_tokens: int = Field(32, ge=0)  # F
    horizon: int = Field(8, gt=0)  # T, actions per chunk
    action_dim: int = Field(ACTION_DIM, gt=0)  # A
    state_dim: int = Field(STATE_DIM, gt=0)  # P
    mlp_ratio: int = Field(4, gt=0)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @property
    def num_cross_blocks(self) -> int:
        """L: blocks that cross-attend, each paired with a VLM layer."""
        return self.blocks // 2 if self.pattern == "interleaved" else self.blocks

    def resolved(self, context_dim: int) -> "Config":
        """With ``width`` and ``heads`` as numbers, for a VLM of width ``context_dim``.

        Raises:
            ConfigError: they do not fit each other.
        """
        width = self.width or context_dim
        heads = self.heads or max(1, width // HEAD_WIDTH)
        if width % heads or width % 2:
            raise ConfigError(
                "the DiT's width does not fit its heads",
                expected=f"an even dit.width that is a multiple of dit.heads ({heads})",
                found=str(width),
                fix=f"--set policy.dit.heads={math.gcd(width, heads)}, or choose another width",
            )
        return self.model_copy(update={"width": width, "heads": heads})

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.pattern == "interleaved" and self.blocks % 2:
            raise ValueError(f"interleaved needs an even number of blocks, not {self.blocks}")
        return self


class Context(NamedTuple):
    """Keys and values of a batch, ready for any number of draws and steps."""

    keys_LBhMd: list[torch.Tensor]  # L tensors [B, h, M, d]
    values_LBhMd: list[torch.Tensor]  # L tensors [B, h, M, d]
    mask_BM: torch.Tensor  # bool [B, M]


class AdaNorm(nn.Module):
    """LayerNorm without weights, then x * (1 + scale(time)) + shift(time)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        nn.init.normal_(self.modulation.weight, std=INIT_STD)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BRNE: torch.Tensor, time_BRE: torch.Tensor) -> torch.Tensor:
        scale_BRE, shift_BRE = self.modulation(functional.silu(time_BRE)).chunk(2, dim=-1)
        shifted: torch.Tensor = self.norm(x_BRNE) * (1 + scale_BRE[:, :, None]) + shift_BRE[:, :, None]
        return shifted


class SelfAttention(nn.Module):
    """Full attention among the N tokens of one draw."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BRNE: torch.Tensor) -> torch.Tensor:
        B, R, N, E = x_BRNE.shape
        q, k, v = self.qkv(x_BRNE).view(B * R, N, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)  # [B R, h, N, d]
        out_BRNE: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(B, R, N, E))
        return out_BRNE


class KeysValues(nn.Module):
    """The context of one block, normalised and projected; a module of its own, as it is called outside its block."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(context_dim)
        self.kv = nn.Linear(context_dim, 2 * width)

    def forward(self, context_BMC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, both [B, h, M, d]."""
        B, M, _ = context_BMC.shape
        kv = self.kv(self.norm(context_BMC)).view(B, M, 2, self.heads, -1)
        keys_BhMd, values_BhMd = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return keys_BhMd, values_BhMd


class CrossAttention(nn.Module):
    """Queries from the action sequence; keys and values from the context, made beforehand by ``keys_values``."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.keys_values = KeysValues(width, heads, context_dim)
        self.query = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x_BRNE: torch.Tensor, keys_BhMd: torch.Tensor, values_BhMd: torch.Tensor, mask_BM: torch.Tensor
    ) -> torch.Tensor:
        B, R, N, E = x_BRNE.shape
        # the R draws share their keys: fold them into the query axis instead of repeating the keys
        q = self.query(x_BRNE).view(B, R * N, self.heads, E // self.heads).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, keys_BhMd, values_BhMd, attn_mask=mask_BM[:, None, None, :])
        out_BRNE: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(B, R, N, E))
        return out_BRNE


class Block(nn.Module):
    """Self-attention and/or cross-attention, then a feed-forward layer; residual, each with an AdaNorm."""

    def __init__(self, config: Config, context_dim: int, *, attends_self: bool, attends_context: bool) -> None:
        super().__init__()
        width, heads = sizes_of(config)
        self.attends_self, self.attends_context = attends_self, attends_context
        if attends_self:
            self.self_norm = AdaNorm(width)
            self.self_attention = SelfAttention(width, heads)
        if attends_context:
            self.cross_norm = AdaNorm(width)
            self.cross_attention = CrossAttention(width, heads, context_dim)
        self.mlp_norm = AdaNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_ratio * width, width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BRNE: torch.Tensor,
        time_BRE: torch.Tensor,
        context: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """``context`` = (keys, values, mask) for blocks that cross-attend."""
        if self.attends_self:
            x_BRNE = x_BRNE + self.dropout(self.self_attention(self.self_norm(x_BRNE, time_BRE)))
        if context is not None:
            x_BRNE = x_BRNE + self.dropout(self.cross_attention(self.cross_norm(x_BRNE, time_BRE), *context))
        out_BRNE: torch.Tensor = x_BRNE + self.dropout(self.mlp(self.mlp_norm(x_BRNE, time_BRE)))
        return out_BRNE


def sizes_of(config: Config) -> tuple[int, int]:
    """(width, heads) of a resolved config."""
    assert config.width is not None, "resolve the config first"
    assert config.heads is not None
    return config.width, config.heads


def sinusoid(time: torch.Tensor, width: int) -> torch.Tensor:
    """[...] times in [0, 1] -> [..., width]: cosines, then sines, of 1000 t; periods 2 pi to 2 pi 10^4."""
    frequency = torch.exp(
        -math.log(10_000.0) * torch.arange(width // 2, device=time.device, dtype=torch.float32) / (width // 2)
    )
    angle = TIME_SCALE * time[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class DiT(nn.Module):
    """The head; float32 throughout (the policy switches autocast off around it).

    Args:
        config: sizes and pattern.
        context_dim: C, of VLM hidden states and of geometry tokens.
    """

    def __init__(self, config: Config, *, context_dim: int) -> None:
        super().__init__()
        self.config = config = config.resolved(context_dim)
        self.gradient_checkpointing = False  # blocks are computed again in backward instead of remembered
        width, _ = sizes_of(config)
        attends_self = config.pattern != "cross"
        self.time_encoder = _mlp(width, width)
        if attends_self:
            self.state_encoder = _mlp(config.state_dim, width)
        self.action_encoder = _mlp(config.action_dim, width)
        self.positions_TE = nn.Parameter(INIT_STD * torch.randn(config.horizon, width))
        if config.future_tokens and attends_self:
            self.future_FE = nn.Parameter(INIT_STD * torch.randn(config.future_tokens, width))
        kinds = {
            "self+cross": ((True, True),),
            "interleaved": ((False, True), (True, False)),
            "cross": ((False, True),),
        }
        kind = kinds[config.pattern]
        self.blocks = nn.ModuleList(
            Block(config, context_dim, attends_self=both[0], attends_context=both[1])
            for both in (kind[i % len(kind)] for i in range(config.blocks))
        )
        self.out_norm = AdaNorm(width)
        self.out = nn.Linear(width, config.action_dim)
        nn.init.normal_(self.out.weight, std=INIT_STD)
        nn.init.zeros_(self.out.bias)

    def encode_context(self, hidden_LBSC: Sequence[torch.Tensor], mask_BS: torch.Tensor, geom: GeomTokens) -> Context:
        """Keys and values of cat(vlm_hidden_l, geom_l) for every cross-attending block l.

        Args:
            hidden_LBSC: L tensors [B, S, C].
            mask_BS: bool, False = prompt padding.
            geom: geom_LBKC and mask_BK; K may be 0.
        """
        cross: list[Any] = [block.cross_attention for block in self.blocks if block.attends_context]
        encoded = [
            attention.keys_values(torch.cat([hidden_BSC, geom_BKC], dim=1))
            for attention, hidden_BSC, geom_BKC in zip(cross, hidden_LBSC, geom.geom_LBKC, strict=True)
        ]
        return Context(
            [keys for keys, _ in encoded],
            [values for _, values in encoded],
            torch.cat([mask_BS, geom.mask_BK], dim=1),
        )

    def forward(
        self, noisy_BRTA: torch.Tensor, time_BR: torch.Tensor, proprio_BP: torch.Tensor, context: Context
    ) -> torch.Tensor:
        """Velocity [B, R, T, A] at the points ``noisy_BRTA`` and times ``time_BR`` in [0, 1]."""
        B, R, T, _ = noisy_BRTA.shape
        time_BRE = self.time_encoder(sinusoid(time_BR, self.positions_TE.shape[1]))
        parts = []
        if self.config.pattern != "cross":
            parts.append(self.state_encoder(proprio_BP)[:, None, None].expand(B, R, 1, -1))
            if self.config.future_tokens:
                parts.append(self.future_FE.expand(B, R, -1, -1))
        parts.append(self.action_encoder(noisy_BRTA) + self.positions_TE)
        x_BRNE = torch.cat(parts, dim=2)
        paired = iter(zip(context.keys_LBhMd, context.values_LBhMd, strict=True))
        for block in self.blocks:
            given = (*next(paired), context.mask_BM) if block.attends_context else None
            if self.gradient_checkpointing and self.training:
                x_BRNE = checkpoint(block, x_BRNE, time_BRE, given, use_reentrant=False)
            else:
                x_BRNE = block(x_BRNE, time_BRE, given)
        velocity_BRTA: torch.Tensor = self.out(self.out_norm(x_BRNE[:, :, -T:], time_BRE))
        return velocity_BRTA


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))
