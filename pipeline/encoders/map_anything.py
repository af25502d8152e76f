"""MapAnything's multi-view transformer: the views of one time step, with cameras if wanted -> tokens that know each
other.

The package (mapanything 1.1, code Apache-2.0) is on no registry. Tokens are what ``model.info_sharing`` returns inside
``model.infer(views)``; the heads after it are not run. Model "tiny" is not MapAnything: the same transformer class from
uniception, small and random, behind the same capture, for tests and first steps without the package. Non-obvious:

- View 0 is the reference: order matters, and one view's tokens depend on all views.
- ``infer`` only: ``forward`` with cameras drops them at random. A stopped ``infer`` leaves the model set to keep them,
  which is what each later call sets anyway. It draws random numbers either way, and decides nothing by them.
- ``infer``'s own mixed precision takes float16 where a device has no fast bfloat16, and on every CPU, without a word.
  It is switched off, and ours is put around ``forward``; the package itself keeps the fusion of cameras in float32.
- Pixel centres are at u + 0.5 here and at u in the package: half a pixel is taken off the principal point. It ignores
  skew.
- Poses are camera to any world, OpenCV axes; the package makes them relative to view 0, scales them to a mean distance
  of 1 and gives that distance as metres (``is_metric_scale``).
- What the cameras told the model is part of the tap's name, so that tokens with and without them never pass for equal.
"""

import threading
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.fingerprint import NOT_IN_FINGERPRINT, digest_json
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.devices import require_device
from geomcache.pipeline.encoders import _map_anything_build as parts
from geomcache.pipeline.encoders._checkpoints import checkpoint_folder, module_digest
from geomcache.pipeline.encoders._common import (
    PATCH,
    Checkpoint,
    PatchedPixels,
    check_batch,
    compiling,
    frame_size,
    precision,
    require_upright,
)
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.image_path import IMAGENET_MEAN, IMAGENET_STD, prepare
from geomcache.pipeline.interfaces import Need

DEFAULT_CODEC = "bf16"

_V11 = "v1.1: DINOv2 ViT-g (24 blocks) + 16 blocks, tokens of 1536, 1.2 B parameters"
_V1 = "v1: DINOv2 ViT-L + 24 blocks, tokens of 768, 0.6 B parameters"
CHECKPOINTS = (
    Checkpoint("facebook/map-anything", "CC BY-NC 4.0 (non-commercial)", True, _V11),
    Checkpoint("facebook/map-anything-apache", "Apache-2.0", False, f"{_V11}; trained on other data"),
    Checkpoint("facebook/map-anything-v1", "CC BY-NC 4.0 (non-commercial)", True, _V1),
    Checkpoint("facebook/map-anything-apache-v1", "Apache-2.0", False, f"{_V1}; trained on other data"),
)
PACKAGES = ("mapanything", "uniception")
INSTALL = f"{parts.INSTALL} (model tiny: {parts.INSTALL_TINY})"

Tap = Literal["features.final", "features.intermediate_0", "features.intermediate_1", "features.intermediate_2"]


class Config(Schema):
    """Settings of MapAnything."""

    # custom: MapAnything's classes in whatever sizes the config.json of `weights` names.
    model: Literal["tiny", "v1.1", "v1", "custom"] = "tiny"
    # A folder with config.json and model.safetensors, or a hub id; "random": from `seed`; None: "random" for tiny.
    weights: str | None = Field(None, json_schema_extra=NOT_IN_FINGERPRINT)
    seed: int = Field(0, ge=0, json_schema_extra=NOT_IN_FINGERPRINT)
    process_size: tuple[PatchedPixels, PatchedPixels] = (224, 224)  # H, W the model sees
    tap: Tap = "features.final"  # of info sharing; intermediate ones are after its last LayerNorm too
    use_intrinsics: bool = False  # give the model the pack's camera matrices
    use_poses: bool = False  # give the model the pack's camera poses, in metres
    batch_size: int = Field(4, ge=1)  # time steps per forward pass
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # autocast; weights stay float32
    compile: bool = False  # torch.compile of every transformer block; other bits, so another cache id

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model != "tiny" and self.weights is None:
            raise ValueError(
                f"model {self.model} needs weights: a folder or a hub id such as {CHECKPOINTS[0].name} "
                "(or weights=random for features that mean nothing)"
            )
        if self.model == "tiny" and not self.is_random:
            raise ValueError("model tiny has no weights but random ones; set model to v1.1, v1 or custom")
        if self.model == "tiny" and (self.use_intrinsics or self.use_poses):
            raise ValueError("model tiny takes images only; use_intrinsics and use_poses need v1.1, v1 or custom")
        if self.model == "custom" and self.is_random:
            raise ValueError("model custom needs a weights folder, whose config.json names its sizes")
        return self

    @property
    def is_random(self) -> bool:
        """Whether the weights come from the seed."""
        return self.weights in (None, "random")


class Encoder:
    """RGB frames, with cameras if configured -> MapAnything's multi-view features [B, V, G, D]."""

    version = 1
    default_codec = DEFAULT_CODEC

    def __init__(self, config: Config, contract: Contract) -> None:
        """Read the sizes; weights come later.

        Raises:
            ContractMismatch: frames that are not upright.
            InputError: views of differing size; no cameras where they are to be used; a weights folder that is not
                there, not MapAnything's, not of the configured model, or without the tap.
        """
        require_upright(contract, "map_anything")
        self._frame_hw = frame_size(contract, "map_anything")
        self._capturing = threading.Lock()  # a hook catches whatever call comes by
        self._uses_cameras = config.use_intrinsics or config.use_poses
        if self._uses_cameras and not contract.has_depth:
            raise InputError(
                "use_intrinsics and use_poses of encoder map_anything need camera matrices",
                expected="frames with depth and cameras (has_depth: true)",
                found="a contract without them (has_depth: false)",
                fix="official HDF5: `geomcache demos --replay SOURCE --out DIR` adds them; or switch both off",
            )
        self.config = config
        self._folder = None if config.is_random else checkpoint_folder(str(config.weights))
        # A local folder of a published name may hold anything.
        hub_id = None if Path(str(config.weights)).expanduser().is_dir() else config.weights
        self._published = next((known for known in CHECKPOINTS if known.name == hub_id), None)
        dim, taps = parts.TINY_DIM, parts.TINY_TAPS
        self._architecture: dict[str, Any] = {}
        if config.model != "tiny":
            self._architecture = (
                parts.MODELS[config.model]
                if self._folder is None
                else parts.read_architecture(self._folder, config.model)
            )
            dim, taps = parts.token_dim(self._architecture), parts.intermediate_taps(self._architecture)
        known: list[str] = ["features.final", *(f"features.intermediate_{i}" for i in range(taps))]
        if config.tap not in known:
            raise InputError(
                f"this model has no tap {config.tap}", expected=", ".join(known), found=config.tap, fix="set `tap`"
            )
        height, width = config.process_size
        self.spec = TokenSpec(
            encoder="map_anything",
            tap=config.tap + "+intrinsics" * config.use_intrinsics + "+poses" * config.use_poses,
            cameras=contract.camera_names,
            grid=(height // PATCH, width // PATCH),
            dim=dim,
            image_size=config.process_size,
            encoder_batch_size=config.batch_size,
            compute_dtype=config.compute_dtype,
            codec=DEFAULT_CODEC,
        )
        self._model: nn.Module | None = None
        self._device = torch.device("cpu")
        self._digest: str | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """Cameras only when the model is given them."""
        return frozenset({"images", "cameras"} if self._uses_cameras else {"images"})

    @property
    def license(self) -> str:
        """Of the weights; a folder does not say."""
        if self.config.is_random:
            return f"none (random weights, seed {self.config.seed})"
        known = self._published
        return "unknown; non-commercial until you know better" if known is None else known.license

    @property
    def non_commercial(self) -> bool:
        """Whether the weights may not be used commercially, as far as can be known."""
        return not self.config.is_random and (self._published is None or self._published.non_commercial)

    @property
    def description(self) -> str:
        """One line for tables; random weights are called that."""
        name = "uniception info sharing, not MapAnything" if self.config.model == "tiny" else "MapAnything"
        origin = f"RANDOM weights (seed {self.config.seed})" if self.config.is_random else self.config.weights
        return f"{name} {self.config.model}, {origin}, {self.license}"

    def weights_digest(self) -> str:
        """Digest of the configuration and the tensors that tokens depend on; read on the CPU if not loaded yet."""
        if self._digest is None:
            tensors = module_digest(self._model if self._model is not None else self._weights())
            self._digest = digest_json({"architecture": self._architecture, "tensors": tensors})
        return self._digest

    def load(self, device: str) -> None:
        """Build the model, fill it, move it to ``device`` and freeze it; a second call only moves it.

        Raises:
            MissingDependency: mapanything (tiny: uniception) is not installed.
            InputError: weights that do not fit the model key for key; a device that is not there; ``compile`` where
                torch.compile does not work.
        """
        self._device = require_device(device)
        built = self._model is not None
        model = self._model if self._model is not None else self._weights()
        self._model = model.to(self._device).eval().requires_grad_(False)
        if self.config.compile and not built:
            for module in list(model.modules()):
                if isinstance(module, nn.ModuleList):  # of transformer blocks; the hook stays outside of them
                    for block in module:
                        block.compile()
            with compiling("map_anything", self._device):
                self.encode(self._blank_frames())

    def _blank_frames(self) -> FrameBatch:
        """A batch to try the network with: black pictures, cameras at the origin."""
        views = (self.config.batch_size, self.spec.views)
        height, width = self._frame_hw
        intrinsics = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]], dtype=np.float64)
        return FrameBatch(
            np.zeros((*views, height, width, 3), dtype=np.uint8),
            None,
            np.broadcast_to(intrinsics, (*views, 3, 3)),
            np.broadcast_to(np.eye(4), (*views, 4, 4)),
        )

    def encode(self, frames: FrameBatch) -> torch.Tensor:
        """[B, V, G, D] float32 on the encoder's device, B = ``spec.encoder_batch_size``; no gradients."""
        assert self._model is not None, "call load(device) first"
        check_batch(frames, self.spec, self._frame_hw)
        images_BVCHW = prepare(frames.images_BVHWC, self.spec.image_size, IMAGENET_MEAN, IMAGENET_STD)
        intrinsics_BV33 = poses_BV44 = None
        if self.config.use_intrinsics:
            assert frames.intrinsics_BV33 is not None, "the contract promises intrinsics"
            intrinsics_BV33 = processed_intrinsics(frames.intrinsics_BV33, self._frame_hw, self.spec.image_size)
        if self.config.use_poses:
            assert frames.extrinsics_BV44 is not None, "the contract promises extrinsics"
            poses_BV44 = frames.extrinsics_BV44
        views = make_views(images_BVCHW.to(self._device), intrinsics_BV33, poses_BV44)
        with self._capturing:
            output = info_sharing_output(self._model, views, self._device, self.config.compute_dtype)
        final, intermediates = output if isinstance(output, tuple) else (output, [])
        features = final if self.config.tap == "features.final" else intermediates[int(self.config.tap[-1])]
        tokens = [features_BDhw.flatten(2).transpose(1, 2) for features_BDhw in features.features]
        return torch.stack(tokens, dim=1).float().contiguous()

    def _weights(self) -> nn.Module:
        """The model on the CPU, filled from the checkpoint or from the seed."""
        if self.config.model == "tiny":
            return parts.build_tiny(self.config.seed)
        if self._folder is None:
            return parts.build(self._architecture, self.config.seed)
        return parts.load(self._architecture, self._folder)


def processed_intrinsics(
    intrinsics_BV33: NDArray[np.float64], frame_hw: tuple[int, int], process_hw: tuple[int, int]
) -> NDArray[np.float64]:
    """Camera matrices of frames -> of the resized images, pixel centres at whole numbers as the package has them.

    A point of the image plane keeps its place in the picture: u' + 0.5 = (u + 0.5) * W' / W for pixel indices u, so
    fx' = fx * W' / W and cx' = cx * W' / W - 0.5, where our cx counts from the picture's edge.
    """
    scaled = intrinsics_BV33.astype(np.float64)  # a copy
    scaled[..., 0, :] *= process_hw[1] / frame_hw[1]
    scaled[..., 1, :] *= process_hw[0] / frame_hw[0]
    scaled[..., :2, 2] -= 0.5
    return scaled


def make_views(
    images_BVCHW: torch.Tensor,
    intrinsics_BV33: NDArray[np.float64] | None,
    poses_BV44: NDArray[np.float64] | None,
) -> list[dict[str, Any]]:
    """The package's input: one dict a view, in the contract's order; cameras in float32 beside the images."""

    def beside(array: NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(images_BVCHW.device)

    views: list[dict[str, Any]] = []
    for v in range(images_BVCHW.shape[1]):
        view: dict[str, Any] = {"img": images_BVCHW[:, v], "data_norm_type": ["dinov2"]}
        if intrinsics_BV33 is not None:
            view["intrinsics"] = beside(intrinsics_BV33[:, v])
        if poses_BV44 is not None:
            view["camera_poses"] = beside(poses_BV44[:, v])
            view["is_metric_scale"] = torch.ones(len(images_BVCHW), dtype=torch.bool, device=images_BVCHW.device)
        views.append(view)
    return views


class _Caught(Exception):
    """Ends ``infer`` once the tokens are there."""


def info_sharing_output(model: Any, views: list[dict[str, Any]], device: torch.device, compute_dtype: str) -> Any:
    """What ``model.info_sharing`` returns under ``model.infer(views)``; nothing after it is run.

    Hook, precision and generators are as before when it returns.

    Raises:
        InputError: ``infer`` came to its end without the module.
    """
    caught: list[Any] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        caught.append(output)
        raise _Caught

    forward = model.forward

    def forward_in_precision(*args: Any, **kwargs: Any) -> Any:
        with precision(device, compute_dtype):
            return forward(*args, **kwargs)

    hook = model.info_sharing.register_forward_hook(catch)
    model.forward = forward_in_precision
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.infer(views, use_amp=False)
    except _Caught:
        pass
    finally:
        del model.forward  # the class's own again
        hook.remove()
    if not caught:
        raise InputError(
            "the installed mapanything does not run info_sharing under infer()",
            expected="mapanything 1.1",
            found="another structure",
            fix=parts.INSTALL,
        )
    return caught[0]
