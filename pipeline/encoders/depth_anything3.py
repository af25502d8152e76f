"""Depth-Anything-3: the views of one time step -> tokens that know each other, or the maps its head makes of them.

Built from the package's own classes (depth-anything-3 0.1.1, code Apache-2.0; ``_da3_package``). Taps:

- ``features.local|global|both`` of one block of the backbone (``block``, default the last). Local: the output of the
  last per-view block up to it, not normalised. Global: its own output, across views, after LayerNorm. Blocks attend
  across views when they are odd and not below the model's ``cross_view_from``; global and both need such a block. Local
  of an odd one is its predecessor's output.
- ``ray``: direction (3), origin (3), confidence (1). Directions have no unit length: where the package finds cameras
  from them it divides by their third number, so nothing is renormalised after averaging either.
- ``depth``: depth and confidence; the model's own scale, one for the views of a row, not metres. ``depth.ray``: all 9.

Confidences are exp + 1, so above 1. Maps are brought to the patch grid or to ``geom_target_hw`` by the image path's
rule, torch's antialiased bilinear in float32: every pixel counts, and weights do not jump where the sizes do not
divide, as those of an area mean do. At depth edges it gives values between the surfaces. Non-obvious:

- The views are a real axis: [B, V, 3, H, W]. View 0 is the reference (``ref_view_strategy="first"``), so view
  order matters and one view's tokens depend on all views.
- The package's API is not what is called, because it is not right for this: ``inference(list)`` takes the list as
  one scene and its autocast is float16 even on a CPU; ``forward`` deletes the rays whenever there is a camera
  decoder; auxiliary features of three or more views come back in another order than the views.
- The head is given one time step at a time, in float32 outside autocast. Its own chunking counts views, so with two
  of them it never splits; a fixed step gives a row the same bits in every slot, and memory that does not grow.
- The package's own loader is not strict; ours is, for the parts that run.
"""

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.fingerprint import IN_FINGERPRINT_UNLESS_DEFAULT, NOT_IN_FINGERPRINT
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
    PATCH,
    Checkpoint,
    PatchedPixels,
    check_batch,
    compiling,
    frame_size,
    precision,
    require_upright,
    resample,
)
from geomcache.pipeline.encoders._da3_package import INSTALL as INSTALL
from geomcache.pipeline.encoders._da3_package import MODELS, build_backbone, build_head, fix_rope
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.image_path import IMAGENET_MEAN, IMAGENET_STD, prepare
from geomcache.pipeline.interfaces import Need

CHECKPOINTS = tuple(
    Checkpoint(
        f"depth-anything/{model.upper()}",
        size.license,
        size.non_commercial,
        f"model={model}: {size.blocks} blocks, {size.width} numbers a token",
    )
    for model, size in MODELS.items()
    if model != "tiny"
)
PACKAGES = ("depth_anything_3", "addict", "einops", "omegaconf")

_MAP_DIM = {"depth": 2, "ray": 7}  # with the confidence

Cells = Annotated[int, Field(ge=1)]
Tap = Literal["features.global", "features.local", "features.both", "ray", "depth", "depth.ray"]


class Config(Schema):
    """Settings of Depth-Anything-3."""

    model: Literal["tiny", "da3-small", "da3-base", "da3-large-1.1", "da3-giant-1.1"] = "tiny"
    # A folder as DepthAnything3.save_pretrained writes it, or a hub id; "random": from `seed`; None: "random" for tiny.
    weights: str | None = Field(None, json_schema_extra=NOT_IN_FINGERPRINT)
    seed: int = Field(0, ge=0, json_schema_extra=NOT_IN_FINGERPRINT)
    # H, W the model sees. 256-pixel frames: 224, better 252; the package's own 504 only invents pixels, at 4x the cost.
    process_size: tuple[PatchedPixels, PatchedPixels] = (224, 224)
    tap: Tap = "features.global"
    # Of the backbone, counted from 0; features only. Blocks after it are not run.
    block: int | None = Field(None, ge=0, json_schema_extra=IN_FINGERPRINT_UNLESS_DEFAULT)
    # Token rows and columns per view; None: one token a patch.
    geom_target_hw: tuple[Cells, Cells] | None = Field(None, json_schema_extra=IN_FINGERPRINT_UNLESS_DEFAULT)
    batch_size: int = Field(4, ge=1)  # time steps per forward pass
    # Halves are autocast of the backbone; weights and the head stay float32.
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # torch.compile of the backbone: a minute at the start, other last bits, a quarter less time on a CPU.
    compile: bool = Field(False, json_schema_extra=IN_FINGERPRINT_UNLESS_DEFAULT)

    @model_validator(mode="after")
    def _random_only_on_request(self) -> Self:
        if self.model != "tiny" and self.weights is None:
            raise ValueError(
                f"model {self.model} needs weights: a folder, a hub id such as depth-anything/{self.model.upper()}, "
                "or weights=random for features that mean nothing"
            )
        return self

    @model_validator(mode="after")
    def _block_has_what_the_tap_names(self) -> Self:
        if self.block is None:
            return self
        size = MODELS[self.model]
        if self.maps:
            raise ValueError(f"block is for features; the head behind tap {self.tap} reads blocks {size.out_layers}")
        allowed = range(size.blocks) if self.tap == "features.local" else size.cross_view_blocks
        if self.block not in allowed:
            raise ValueError(
                f"tap {self.tap} of {self.model} is there for block {', '.join(map(str, allowed))}, not {self.block}"
            )
        return self

    @property
    def is_random(self) -> bool:
        """Whether the weights come from the seed."""
        return self.weights in (None, "random")

    @property
    def maps(self) -> tuple[str, ...]:
        """The head's maps that make up a token, in order; none for features."""
        return () if self.tap.startswith("features.") else tuple(self.tap.split("."))


class Encoder:
    """RGB frames -> Depth-Anything-3 tokens [B, V, G, D]; D = C or 2C for features, 7 ray, 2 depth, 9 depth.ray."""

    version = 1
    needs: frozenset[Need] = frozenset({"images"})

    def __init__(self, config: Config, contract: Contract) -> None:
        """``ContractMismatch`` for frames that are not upright, ``InputError`` for differing view sizes."""
        require_upright(contract, "depth_anything3")
        self._frame_hw = frame_size(contract, "depth_anything3")
        self.config = config
        self._size = MODELS[config.model]
        features = self._size.width * (2 if config.tap == "features.both" else 1)
        self._patches = (config.process_size[0] // PATCH, config.process_size[1] // PATCH)
        self.spec = TokenSpec(
            encoder="depth_anything3",
            tap=config.tap if config.block is None else f"{config.tap}.block{config.block}",
            cameras=contract.camera_names,
            grid=config.geom_target_hw or self._patches,
            dim=sum(_MAP_DIM[name] for name in config.maps) or features,
            image_size=config.process_size,
            encoder_batch_size=config.batch_size,
            compute_dtype=config.compute_dtype,
            codec=self.default_codec,
        )
        self._parts: nn.ModuleDict | None = None
        self._intermediate_layers: Any = None  # the package's method, compiled if asked for
        self._device = torch.device("cpu")
        self._digest: str | None = None

    @property
    def default_codec(self) -> str:
        """Maps are small, and bf16 would round a depth by 0.4 %."""
        return "fp32" if self.config.maps else "bf16"

    @property
    def license(self) -> str:
        """Of the weights."""
        if self.config.is_random:
            return f"none (random weights, seed {self.config.seed})"
        return self._size.license

    @property
    def non_commercial(self) -> bool:
        """Whether the weights' licence forbids commercial use."""
        return not self.config.is_random and self._size.non_commercial

    @property
    def description(self) -> str:
        """One line for tables; random weights are called that."""
        weights = f"RANDOM weights (seed {self.config.seed})"
        origin = weights if self.config.is_random else self.config.weights
        return f"Depth-Anything-3 {self.config.model}, {origin}, {self.license}"

    def weights_digest(self) -> str:
        """Digest of the named tensors of the whole backbone, and of the head where it is used; read on the CPU if they
        are not loaded yet.
        """
        if self._digest is None:
            self._digest = _digest(self._parts if self._parts is not None else self._weights())
        return self._digest

    def load(self, device: str) -> None:
        """Build what the tap needs, fill it, move it to ``device`` and freeze it; a second call only moves it.

        Raises:
            MissingDependency: the package is not installed.
            InputError: weights that do not fit the model key for key; a device that is not there; ``compile`` where
                torch.compile does not work.
        """
        self._device = require_device(device)
        if self._parts is None:
            parts = self._weights()
            backbone: Any = parts["backbone"]
            fix_rope(backbone, self._patches)
            if self.config.block is not None:
                self._digest = _digest(parts)  # of all blocks, before those that nobody asked for go
                backbone.pretrained.blocks = backbone.pretrained.blocks[: self.config.block + 1]
            self._parts = parts
        self._parts.to(self._device).eval().requires_grad_(False)
        transformer: Any = self._parts["backbone"].pretrained
        self._intermediate_layers = transformer.get_intermediate_layers
        if self.config.compile:
            self._compile()

    def encode(self, frames: FrameBatch) -> torch.Tensor:
        """[B, V, G, D] float32 on the encoder's device, B = ``spec.encoder_batch_size``; no gradients."""
        assert self._parts is not None, "call load(device) first"
        check_batch(frames, self.spec, self._frame_hw)
        images_BVCHW = prepare(frames.images_BVHWC, self.spec.image_size, IMAGENET_MEAN, IMAGENET_STD)
        layers = self._layers(images_BVCHW.to(self._device))
        if self.config.maps:
            rows = range(self.config.batch_size)
            return torch.cat([self._maps([tokens[row : row + 1] for tokens in layers]) for row in rows])
        tokens_BVGD = layers[-1]
        C = self._size.width
        if self.config.tap == "features.local":
            tokens_BVGD = tokens_BVGD[..., :C]
        elif self.config.tap == "features.global":
            tokens_BVGD = tokens_BVGD[..., C:]
        return resample(tokens_BVGD.unflatten(2, self._patches), self.spec.grid)

    def _layers(self, images_BVCHW: torch.Tensor) -> list[torch.Tensor]:
        """Both halves of the blocks that are needed, float32 [B, V, patches, 2C] each."""
        block = self._size.last_block if self.config.block is None else self.config.block
        wanted = list(self._size.out_layers) if self.config.maps else [block]
        with precision(self._device, self.config.compute_dtype):
            # Pairs of (tokens, camera token); the tokens no longer hold the camera's slot.
            layers, _ = self._intermediate_layers(images_BVCHW, wanted, ref_view_strategy="first")
        return [tokens.float() for tokens, _ in layers]

    def _maps(self, layers: list[torch.Tensor]) -> torch.Tensor:
        """The head's maps of one time step: [1, V, G, D]."""
        assert self._parts is not None, "encode asks for it"
        with precision(self._device, "float32"):
            # The head wants pairs and reads their first half.
            out = self._parts["head"]([(tokens,) for tokens in layers], *self.spec.image_size, patch_start_idx=0)
            maps = {
                "depth": torch.stack([out.depth, out.depth_conf], dim=-1),
                "ray": torch.cat([out.ray, out.ray_conf[..., None]], dim=-1),
            }
            return torch.cat([resample(maps[name], self.spec.grid) for name in self.config.maps], dim=-1)

    def _compile(self) -> None:
        """Compile for the one shape and thread count that will be used, now: what fails, fails before work begins."""
        zeros = torch.zeros((self.config.batch_size, self.spec.views, 3, *self.spec.image_size), device=self._device)
        self._layers(zeros)  # fills the package's tables, which a compiled call would find changed the second time
        self._intermediate_layers = torch.compile(self._intermediate_layers, dynamic=False, fullgraph=True)
        with compiling("depth_anything3", self._device):
            self._layers(zeros)

    def _weights(self) -> nn.ModuleDict:
        """The parts that the tap needs on the CPU, filled from the checkpoint or from the seed."""
        model, seed = self.config.model, self.config.seed
        parts = nn.ModuleDict({"backbone": build_backbone(model, seed)})
        if self.config.maps:
            parts["head"] = build_head(model, seed)
        if self.config.weights is not None and not self.config.is_random:
            folder = checkpoint_folder(self.config.weights)
            require_model_name(folder, self._size.model_name)
            stored = ("model.backbone.", "model.head.", *self._size.other_parts)
            for name, part in parts.items():
                prefix = f"model.{name}."
                others = [other for other in stored if other != prefix]
                load_strictly(part, folder / WEIGHTS_FILE, prefix, others)
        return parts


def _digest(parts: nn.ModuleDict) -> str:
    """Caches of features made before there was a head tap carry the digest of the backbone alone."""
    return module_digest(parts if "head" in parts else parts["backbone"])
