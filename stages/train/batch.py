"""What the policy is given and what a compressor returns: tensors, one shape comment a field.

Shape letters: B batch, V views, H,W image, G geometry tokens per view, D geometry dim, K compressed tokens,
L cross-attending DiT blocks, C context dim, S prompt tokens, T action horizon, A action dim, P dim of the
proprioceptive state.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch

SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class PolicyBatch:
    """B samples as the policy takes them; the backbone's packer makes the first five fields, by name."""

    input_ids_BS: torch.Tensor  # int64 [B, S], left padded
    attention_mask_BS: torch.Tensor  # int64 [B, S], 0 = padding
    mm_token_type_ids_BS: torch.Tensor  # int64 [B, S], 1 = image token
    pixel_values: torch.Tensor  # float32 [B * V * patches per image, 3 * 2 * patch ** 2], (B, V) order
    image_grid_thw: torch.Tensor  # int64 [B * V, 3]: frames, patch rows, patch columns
    proprio_BP: torch.Tensor  # float32 [B, P], normalised
    tokens_BVGD: torch.Tensor | None = None  # float32 [B, V, G, D] as the codec gives them, not standardised
    token_mask_BVG: torch.Tensor | None = None  # bool [B, V, G], False = no token there; None = all are there
    actions_BTA: torch.Tensor | None = None  # float32 [B, T, A], normalised; None when sampling
    action_mask_BT: torch.Tensor | None = None  # bool [B, T], False = past the episode's end

    def __len__(self) -> int:
        return self.input_ids_BS.shape[0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Small tensors travel from loader processes as arrays: each shared tensor costs half a millisecond."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        small = {name: value.numpy() for name, value in values.items() if value is not None and _is_small(value)}
        return _rebuilt, (type(self), values | small)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch on ``device``."""
        present = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        return replace(self, **{name: value.to(device, non_blocking=non_blocking) for name, value in present.items()})


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.nbytes < SMALL_BYTES


def _rebuilt(cls: type[PolicyBatch], values: dict[str, Any]) -> PolicyBatch:
    return cls(**{name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in values.items()})


@dataclass(frozen=True)
class GeomSizes:
    """Sizes of a compressor: the tokens that come in and those that go out. All 0 in V, G, D without geometry."""

    views: int  # V
    grid: tuple[int, int]  # rows and columns of tokens in a view; G = rows * columns
    dim: int  # D
    context_dim: int  # C, the width of the VLM's hidden states
    num_blocks: int  # L, the number of cross-attending DiT blocks
    num_tokens: int  # K

    @property
    def tokens_per_view(self) -> int:
        """G."""
        return self.grid[0] * self.grid[1]


class GeomTokens(NamedTuple):
    """What every compressor returns, whatever its type."""

    geom_LBKC: torch.Tensor  # float32 [L, B, K, C], finite everywhere; K = 0 without geometry
    mask_BK: torch.Tensor  # bool [B, K], False = the DiT must not attend to it
