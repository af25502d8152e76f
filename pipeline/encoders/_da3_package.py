"""What the depth-anything-3 package gives us: its backbone and head as modules, and what is known of each model.

Only this file and its tests know the package's import names. Non-obvious:

- Importing the package registers an OmegaConf resolver "eval" (Python's eval); it is taken out again at once,
  and no YAML is read: the sizes stand in ``MODELS`` (a test compares them with the package's files).
- Its logger writes to stdout, where ``--json`` results go; it is set to warnings.
- The head's four auxiliary levels share one LayerNorm object. A state dict names it eight times, a checkpoint
  stores it twice (weight and bias), hence 437 stored tensors for 443 names; ``load_strictly`` knows aliases.
- The rotary embedding asks for the largest position in every block, which makes a GPU wait and cuts
  torch.compile's graph into pieces; ``fix_rope`` answers beforehand, with the same bits.
"""

import os
import types
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geomcache.cache_schemas.errors import InputError, MissingDependency
from geomcache.pipeline.encoders._common import PATCH

INSTALL = "pip install --no-deps depth-anything-3==0.1.1 && pip install 'geomcache[encoders]'"

_NON_COMMERCIAL = "CC BY-NC 4.0 (non-commercial)"


@dataclass(frozen=True)
class Size:
    """One model of the package's registry; the numbers of its configs/*.yaml."""

    model_name: str  # as in the package's registry and in a checkpoint's config.json
    vit: str  # name of the package's DINOv2 builder
    width: int  # C
    blocks: int
    out_layers: tuple[int, int, int, int]  # blocks whose outputs the heads read
    cross_view_from: int  # first block that may attend across views; qk-norm and rope start there too
    head_features: int
    head_channels: tuple[int, int, int, int]
    license: str  # of the published weights
    other_parts: tuple[str, ...] = ("model.cam_enc.", "model.cam_dec.")  # known, never loaded

    @property
    def last_block(self) -> int:
        """The one that features come from by default."""
        return self.out_layers[-1]

    @property
    def cross_view_blocks(self) -> tuple[int, ...]:
        """Blocks that attend across views: the odd ones from ``cross_view_from`` on."""
        return tuple(block for block in range(self.cross_view_from, self.blocks) if block % 2)

    @property
    def non_commercial(self) -> bool:
        """Whether the published weights' licence forbids commercial use."""
        return self.license == _NON_COMMERCIAL


_GIANT_PARTS = (*Size.other_parts, "model.gs_head.", "model.gs_adapter.")  # Gaussian splatting, not loaded either
_WIDE = (256, 512, 1024, 1024)

MODELS = {
    # The package's own classes, small; there are no published weights of it.
    "tiny": Size("tiny", "", 64, 6, (2, 3, 4, 5), 2, 32, (16, 16, 32, 32), "unknown (not a published model)"),
    "da3-small": Size("da3-small", "vits", 384, 12, (5, 7, 9, 11), 4, 64, (48, 96, 192, 384), "Apache-2.0"),
    "da3-base": Size("da3-base", "vitb", 768, 12, (5, 7, 9, 11), 4, 128, (96, 192, 384, 768), "Apache-2.0"),
    "da3-large-1.1": Size("da3-large", "vitl", 1024, 24, (11, 15, 19, 23), 8, 256, _WIDE, _NON_COMMERCIAL),
    "da3-giant-1.1": Size(
        "da3-giant", "vitg", 1536, 40, (19, 27, 33, 39), 13, 256, _WIDE, _NON_COMMERCIAL, _GIANT_PARTS
    ),
}


def build_backbone(model: str, seed: int) -> nn.Module:
    """The package's backbone with random weights: the same for the same seed, whatever the global generator's
    state.

    Position table and class token, which the package leaves at zero, are drawn as DINOv2 does (normal, 0.02).

    Returns:
        A module whose ``pretrained`` is the package's DinoVisionTransformer; float32 on the CPU.

    Raises:
        MissingDependency: the package is not installed.
        InputError: the installed package's model has other sizes than ``MODELS``.
    """
    transformer_class, dinov2_class, _ = package_classes()
    size = MODELS[model]
    starts = dict.fromkeys(("alt_start", "qknorm_start", "rope_start"), size.cross_view_from)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if model == "tiny":
            backbone = nn.Module()
            backbone.pretrained = transformer_class(
                img_size=518, patch_size=PATCH, embed_dim=size.width, depth=size.blocks, num_heads=2, **starts
            )
        else:
            backbone = dinov2_class(name=size.vit, out_layers=list(size.out_layers), cat_token=True, **starts)
        transformer: Any = backbone.pretrained
        nn.init.trunc_normal_(transformer.pos_embed, std=0.02)
        nn.init.normal_(transformer.cls_token, std=0.02)
    found = (transformer.embed_dim, len(transformer.blocks), transformer.patch_size)
    if found != (size.width, size.blocks, PATCH):
        raise InputError(
            f"the installed depth-anything-3 builds another {model}",
            expected=f"width {size.width}, {size.blocks} blocks, patch {PATCH}",
            found=f"width {found[0]}, {found[1]} blocks, patch {found[2]}",
            fix=INSTALL,
        )
    return backbone.eval()


def build_head(model: str, seed: int) -> nn.Module:
    """The package's DualDPT (depth and rays) with random weights of this seed; raises ``MissingDependency``."""
    size = MODELS[model]
    _, _, head_class = package_classes()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head: nn.Module = head_class(
            2 * size.width, output_dim=2, features=size.head_features, out_channels=size.head_channels
        )
    return head.eval()


def fix_rope(backbone: nn.Module, patches: tuple[int, int]) -> None:
    """Tell the rotary embedding how many positions a view of ``patches`` rows and columns has.

    The package reads ``positions.max()`` from the device in every block. The table it wants is a function of the
    process size (positions 1..max(rows, columns), 0 for the camera token), and its first rows do not depend on its
    length.
    """
    positions_used = max(patches) + 1

    def forward(rope: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        halves = tokens.chunk(2, dim=-1)  # turned by row and by column
        tables = rope._compute_frequency_components(halves[0].size(-1), positions_used, tokens.device, tokens.dtype)
        turned = [rope._apply_1d_rope(half, positions[..., axis], *tables) for axis, half in enumerate(halves)]
        return torch.cat(turned, dim=-1)

    transformer: Any = backbone.pretrained
    transformer.rope.forward = types.MethodType(forward, transformer.rope)


def package_classes() -> tuple[Any, Any, Any]:
    """(DinoVisionTransformer, DinoV2, DualDPT) of the package, imported without its side effects."""
    try:
        from omegaconf import OmegaConf

        known = OmegaConf.has_resolver("eval")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's registration of its resolver is deprecated
            from depth_anything_3.model.dinov2.dinov2 import DinoV2
            from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer
            from depth_anything_3.model.dualdpt import DualDPT
            from depth_anything_3.utils.logger import LOG_LEVELS, logger
    except ModuleNotFoundError as problem:
        raise MissingDependency(
            "encoder depth_anything3 needs a package that is not installed",
            expected="depth-anything-3 0.1.1 with addict, einops and omegaconf",
            found=f"no module named {problem.name}",
            fix=INSTALL,
        ) from problem
    if not known:
        OmegaConf.clear_resolver("eval")
    if "DA3_LOG_LEVEL" not in os.environ:
        logger.level = LOG_LEVELS["WARN"]  # it prints to stdout, where --json results go
    return DinoVisionTransformer, DinoV2, DualDPT
