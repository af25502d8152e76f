"""Depth-Anything-3's multi-view backbone: the views of one time step -> patch tokens that know each other.

Built from the package's own classes (depth-anything-3 0.1.1, code Apache-2.0); only the backbone, the heads
are not needed for features. Non-obvious:

- The views are a real axis: [B, V, 3, H, W]. View 0 is the reference (``ref_view_strategy="first"``), so view
  order matters and one view's tokens depend on all views.
- A feature is two halves of width C: the last per-view block, not normalised ("local"), and the last
  cross-view block, after LayerNorm ("global").
- The package's own loader is not strict. Stored checkpoints lack 6 of the module's keys, because four
  auxiliary levels share one LayerNorm (``head.scratch.output_conv2_aux.[0..3].2``). All 6 are in the head, so
  the backbone is loaded with no exception at all, and of the other parts only the names are checked.
- Importing the package registers an OmegaConf resolver "eval" (Python's eval); it is taken out again at once,
  and no YAML is read: the sizes stand in ``MODELS`` (a test compares them with the package's files).
"""

import os
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError, MissingDependency
from geomcache.cache_schemas.fingerprint import NOT_IN_FINGERPRINT
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.devices import require_device
from geomcache.pipeline.encoders._checkpoints import (
    WEIGHTS_FILE,
    checkpoint_folder,
    load_strictly,
    module_digest,
    require_model_name,
)
from geomcache.pipeline.encoders._common import (
    check_batch,
    frame_size,
    require_upright,
)
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.image_path import IMAGENET_MEAN, IMAGENET_STD, prepare
from geomcache.pipeline.interfaces import Need

PATCH = 14  # pixels
DEFAULT_CODEC = "bf16"
INSTALL = "pip install --no-deps depth-anything-3==0.1.1 && pip install 'geomcache[encoders]'"

_PREFIX = "model.backbone."
_NON_COMMERCIAL = "CC BY-NC 4.0 (non-commercial)"


@dataclass(frozen=True)
class Size:
    """One model of the package's registry; the numbers of its configs/*.yaml."""

    model_name: str  # as in the package's registry and in a checkpoint's config.json
    vit: str  # name of the package's DINOv2 builder
    width: int  # C
    blocks: int
    last_layer: int  # the last of the layers the package's heads read
    cross_view_from: int  # first block that may attend across views; qk-norm and rope start there too
    license: str  # of the published weights
    other_parts: tuple[str, ...] = ("model.head.", "model.cam_enc.", "model.cam_dec.")  # known, not loaded


_GAUSSIANS = ("model.gs_head.", "model.gs_adapter.")

MODELS = {
    # The package's own transformer class, small; there are no published weights of it.
    "tiny": Size("tiny", "", 64, 6, 5, 2, "unknown (not a published model)"),
    "da3-small": Size("da3-small", "vits", 384, 12, 11, 4, "Apache-2.0"),
    "da3-base": Size("da3-base", "vitb", 768, 12, 11, 4, "Apache-2.0"),
    "da3-large-1.1": Size("da3-large", "vitl", 1024, 24, 23, 8, _NON_COMMERCIAL),
    "da3-giant-1.1": Size("da3-giant", "vitg", 1536, 40, 39, 13, _NON_COMMERCIAL, (*Size.other_parts, *_GAUSSIANS)),
}


def _whole_patches(pixels: int) -> int:
    if pixels < PATCH or pixels % PATCH:
        below = max(PATCH, pixels // PATCH * PATCH)
        raise ValueError(f"a multiple of {PATCH} pixels, such as {below} or {below + PATCH}")
    return pixels


Pixels = Annotated[int, AfterValidator(_whole_patches)]
Tap = Literal["features.global", "features.local", "features.both"]


class Config(Schema):
    """Settings of Depth-Anything-3."""

    model: Literal["tiny", "da3-small", "da3-base", "da3-large-1.1", "da3-giant-1.1"] = "tiny"
    # A folder as DepthAnything3.save_pretrained writes it, or a hub id; "random": from `seed`; None: "random" for tiny.
    weights: str | None = Field(None, json_schema_extra=NOT_IN_FINGERPRINT)
    seed: int = Field(0, ge=0, json_schema_extra=NOT_IN_FINGERPRINT)
    # H, W the model sees. 256-pixel frames: 224 or 252; the package's own 504 only invents pixels.
    process_size: tuple[Pixels, Pixels] = (224, 224)
    # Half of the last feature: cross-view (normalised), per-view (not normalised), or both, local first.
    tap: Tap = "features.global"
    batch_size: int = Field(4, ge=1)  # time steps per forward pass
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is autocast; weights stay float32

    @model_validator(mode="after")
    def _random_only_on_request(self) -> Self:
        if self.model != "tiny" and self.weights is None:
            raise ValueError(
                f"model {self.model} needs weights: a folder, a hub id such as depth-anything/{self.model.upper()}, "
                "or weights=random for features that mean nothing"
            )
        return self

    @property
    def is_random(self) -> bool:
        """Whether the weights come from the seed."""
        return self.weights in (None, "random")


class Encoder:
    """RGB frames -> Depth-Anything-3 features [B, V, G, C or 2C]."""

    version = 1
    needs: frozenset[Need] = frozenset({"images"})
    default_codec = DEFAULT_CODEC

    def __init__(self, config: Config, contract: Contract) -> None:
        """``ContractMismatch`` for frames that are not upright, ``InputError`` for differing view sizes."""
        require_upright(contract, "depth_anything3")
        self._frame_hw = frame_size(contract, "depth_anything3")
        self.config = config
        self._size = MODELS[config.model]
        height, width = config.process_size
        self.spec = TokenSpec(
            encoder="depth_anything3",
            tap=config.tap,
            cameras=contract.camera_names,
            grid=(height // PATCH, width // PATCH),
            dim=self._size.width * (2 if config.tap == "features.both" else 1),
            image_size=config.process_size,
            encoder_batch_size=config.batch_size,
            compute_dtype=config.compute_dtype,
            codec=DEFAULT_CODEC,
        )
        self._backbone: nn.Module | None = None
        self._device = torch.device("cpu")
        self._digest: str | None = None

    @property
    def license(self) -> str:
        """Of the weights."""
        if self.config.is_random:
            return f"none (random weights, seed {self.config.seed})"
        return self._size.license

    @property
    def description(self) -> str:
        """One line for tables; random weights are called that."""
        weights = f"RANDOM weights (seed {self.config.seed})"
        origin = weights if self.config.is_random else self.config.weights
        return f"Depth-Anything-3 {self.config.model}, {origin}, {self.license}"

    def weights_digest(self) -> str:
        """Digest of the backbone's named tensors; read on the CPU if they are not loaded yet."""
        if self._digest is None:
            self._digest = module_digest(self._backbone if self._backbone is not None else self._weights())
        return self._digest

    def load(self, device: str) -> None:
        """Build the backbone, fill it, move it to ``device`` and freeze it; a second call only moves it.

        Raises:
            MissingDependency: the package is not installed.
            InputError: weights that do not fit the model key for key; a device that is not there.
        """
        self._device = require_device(device)
        backbone = self._backbone if self._backbone is not None else self._weights()
        self._backbone = backbone.to(self._device).eval().requires_grad_(False)

    def encode(self, frames: FrameBatch) -> torch.Tensor:
        """[B, V, G, D] float32 on the encoder's device, B = ``spec.encoder_batch_size``; no gradients."""
        assert self._backbone is not None, "call load(device) first"
        check_batch(frames, self.spec, self._frame_hw)
        images_BVCHW = prepare(frames.images_BVHWC, self.spec.image_size, IMAGENET_MEAN, IMAGENET_STD)
        autocast = torch.autocast(
            self._device.type, dtype=torch.bfloat16, enabled=self.config.compute_dtype == "bfloat16"
        )
        with torch.no_grad(), autocast:
            transformer: Any = self._backbone.pretrained
            layers, _ = transformer.get_intermediate_layers(
                images_BVCHW.to(self._device), [self._size.last_layer], ref_view_strategy="first"
            )
        # (tokens, camera token) of the one layer asked for; the tokens no longer hold the camera's slot.
        halves_BVGD: torch.Tensor = layers[-1][0]
        C = self._size.width
        if self.spec.tap == "features.local":
            halves_BVGD = halves_BVGD[..., :C]
        elif self.spec.tap == "features.global":
            halves_BVGD = halves_BVGD[..., C:]
        return halves_BVGD.float().contiguous()

    def _weights(self) -> nn.Module:
        """The backbone on the CPU, filled from the checkpoint or from the seed."""
        backbone = build_backbone(self.config.model, self.config.seed)
        if self.config.weights is not None and not self.config.is_random:
            folder = checkpoint_folder(self.config.weights)
            require_model_name(folder, self._size.model_name)
            load_strictly(backbone, folder / WEIGHTS_FILE, _PREFIX, self._size.other_parts)
        return backbone


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
    transformer_class, dinov2_class = _package_classes()
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
            backbone = dinov2_class(name=size.vit, out_layers=[size.last_layer], cat_token=True, **starts)
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


def _package_classes() -> tuple[Any, Any]:
    """(DinoVisionTransformer, DinoV2) of the package, imported without its side effects."""
    try:
        from omegaconf import OmegaConf

        known = OmegaConf.has_resolver("eval")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's registration of its resolver is deprecated
            from depth_anything_3.model.dinov2.dinov2 import DinoV2
            from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer
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
    return DinoVisionTransformer, DinoV2
