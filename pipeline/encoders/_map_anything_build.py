"""Building MapAnything offline: from a weights folder's config.json, from its published sizes, or tiny.

Only what the tokens depend on is kept (image encoder, geometry encoders, info sharing), the prediction heads are not.
Non-obvious:

- The package's image encoder always asks ``torch.hub`` for DINOv2's code, and for its weights, even when a whole
  checkpoint follows. While the model is built, ``torch.hub.load`` is the package's own copy of that code, without
  weights. That is a change of a global: not for two threads at once.
- ``pretrained_checkpoint_path`` anywhere in a config would be unpickled by the package, and other encoders' settings
  are evaluated as code: the first are taken out (the checkpoint holds every tensor), the second refused.
- The constructor writes classes into the dicts it is given, and prints to stdout, where --json results go.
- Importing mapanything, or uniception alone, allows TF32 in every matrix product of the process, and adds filters for
  warnings: both undone.
- Heads are built as small as they can be and thrown away. Stored checkpoints hold some of their tensors under either
  of two names, and are free to: of the heads only the names are checked.
"""

import copy
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geomcache.cache_schemas.errors import GeomcacheError, InputError, MissingDependency
from geomcache.pipeline.encoders._checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_strictly
from geomcache.pipeline.encoders._common import PATCH

INSTALL = "pip install git+https://github.com/facebookresearch/map-anything"
INSTALL_TINY = "pip install --no-deps uniception==0.1.7 && pip install 'geomcache[encoders]'"

# Attributes of the model that come after the tokens, and prefixes of their tensors' names.
HEADS = (
    *("dense_head", "dpt_feature_head", "dpt_regressor_head", "pose_head", "scale_head"),
    *("dense_adaptor", "pose_adaptor", "scale_adaptor"),
)
_ENCODERS = ("dinov2", "dense_rep_encoder", "global_rep_encoder")  # of images, of rays and depth, of poses and scales
_REQUIRED = ("name", "encoder_config", "info_sharing_config", "geometric_input_config")
_OPTIONAL = ("use_register_tokens_from_encoder", "info_sharing_mlp_layer_str")
_DEFAULT_DIM = 768  # uniception's, where a config names none
_SMALLEST_HEADS = {
    "type": "linear",
    "feature_head": {"output_dim": 3},
    "scale_head": {"output_dim": 1},
    "adaptor_type": "pointmap",
    "adaptor": {"name": "pointmap", "mode": "linear"},
    "scale_adaptor": {"name": "scale", "mode": "exp"},
}


def _published(encoder: dict[str, Any], info_sharing: dict[str, Any], **more: Any) -> dict[str, Any]:
    def encoder_of(name: str, channels: int, kind: str, **settings: Any) -> dict[str, Any]:
        return {"name": name, "in_chans": channels, "encoder_str": kind, **settings}

    probabilities = ("overall", "ray_dirs", "depth", "cam", "sparse_depth", "depth_scale_norm_all")
    return {
        "name": "mapanything",
        "encoder_config": {
            "encoder_str": "dinov2",
            "name": "dinov2",
            "data_norm_type": "dinov2",
            "uses_torch_hub": True,
            **encoder,
        },
        "info_sharing_config": {
            "model_type": "alternating_attention",
            "model_return_type": "intermediate_features",
            "custom_positional_encoding": None,
            "module_args": {"name": "info_sharing", "norm_intermediate": True, **info_sharing},
        },
        # infer() sets every probability; they only have to be there.
        "geometric_input_config": {
            **{f"{name}_prob": 0.0 for name in probabilities},
            "dropout_prob": 1.0,
            "pose_scale_norm_all_prob": 0.0,
            "sparsification_removal_percent": 0.0,
            "ray_dirs_encoder_config": encoder_of("ray_dirs", 3, "dense_rep_encoder", apply_pe=False),
            "depth_encoder_config": encoder_of("depth", 1, "dense_rep_encoder", apply_pe=False),
            "cam_rot_encoder_config": encoder_of("cam_rot", 4, "global_rep_encoder"),
            "cam_trans_encoder_config": encoder_of("cam_trans", 3, "global_rep_encoder"),
            "scale_encoder_config": encoder_of("scale", 1, "global_rep_encoder"),
        },
        **more,
    }


# The published models, in the words of the package's configs/model/mapanything{,_v1}.yaml.
MODELS: dict[str, dict[str, Any]] = {
    "v1.1": _published(
        {"size": "giant", "keep_first_n_layers": 24, "norm_returned_features": False},
        {
            "indices": [7, 11],
            "depth": 16,
            "dim": 1536,
            "num_heads": 24,
            "mlp_ratio": 4,
            "qkv_bias": True,
            "init_values": 1e-5,
        },
        use_register_tokens_from_encoder=True,
        info_sharing_mlp_layer_str="swiglufused",
    ),
    "v1": _published({"size": "large"}, {"indices": [11, 17], "depth": 24}),
}
TINY_DIM, TINY_TAPS = 48, 2


def token_dim(architecture: dict[str, Any]) -> int:
    """D, the width of info sharing."""
    return int(architecture["info_sharing_config"]["module_args"].get("dim", _DEFAULT_DIM))


def intermediate_taps(architecture: dict[str, Any]) -> int:
    """How many intermediate features info sharing returns beside the final ones."""
    sharing = architecture["info_sharing_config"]
    return len(sharing["module_args"]["indices"]) if sharing["model_return_type"] == "intermediate_features" else 0


def sizes(architecture: dict[str, Any]) -> str:
    """What tells v1 from v1.1, in words."""
    encoder, sharing = architecture["encoder_config"], architecture["info_sharing_config"]["module_args"]
    blocks = encoder.get("keep_first_n_layers") or "all"
    return (
        f"DINOv2 {encoder.get('size', 'large')} ({blocks} blocks), "
        f"info sharing of {sharing.get('depth', 12)} blocks, width {token_dim(architecture)}"
    )


def read_architecture(folder: Path, model: str) -> dict[str, Any]:
    """What ``config.json`` says about the parts that tokens depend on, as arguments of the package's constructor.

    Args:
        folder: a weights folder as ``checkpoint_folder`` returns it.
        model: a name in ``MODELS``, whose sizes the folder must have, or "custom".

    Raises:
        InputError: it is no MapAnything config, of another model, or of parts this adapter does not know.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except ValueError as problem:  # bad JSON or bad UTF-8
        raise _refused(path, "JSON", str(problem)) from problem
    if not isinstance(config, dict) or any(name not in config for name in _REQUIRED):
        found = ", ".join(sorted(config)) if isinstance(config, dict) else type(config).__name__
        raise _refused(path, f"keys {', '.join(_REQUIRED)}", found)
    architecture = _without_checkpoints({name: config[name] for name in (*_REQUIRED, *_OPTIONAL) if name in config})
    assert isinstance(architecture, dict)
    try:
        shape = (token_dim(architecture), intermediate_taps(architecture), sizes(architecture))
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise _refused(path, "MapAnything's configuration", f"{type(problem).__name__}: {problem}") from problem
    image = architecture["encoder_config"]
    named = (image.get("encoder_str"), image.get("data_norm_type"), image.get("patch_size", PATCH))
    if named != ("dinov2", "dinov2", PATCH):
        raise _refused(path, f"encoder dinov2, normalisation dinov2, patch {PATCH}", ", ".join(map(str, named)))
    others = [kind for kind in _values_of("encoder_str", architecture) if kind not in _ENCODERS]
    if others:
        raise _refused(path, f"encoders {', '.join(_ENCODERS)}", ", ".join(map(str, others)))
    if model != "custom" and shape[2] != sizes(MODELS[model]):
        raise _refused(path, f"model {model}: {sizes(MODELS[model])}", shape[2])
    return architecture


def _refused(path: Path, expected: str, found: str) -> InputError:
    return InputError(
        f"{path} is not a configuration this encoder can build",
        expected=expected,
        found=found,
        fix="set `model` to the checkpoint's model (custom: sizes as the folder says), or download the folder again",
    )


def _without_checkpoints(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_checkpoints(v) for k, v in value.items() if k != "pretrained_checkpoint_path"}
    return value


def _values_of(key: str, value: Any) -> list[Any]:
    if not isinstance(value, dict):
        return []
    return [v for k, v in value.items() if k == key] + [v for part in value.values() for v in _values_of(key, part)]


def build(architecture: dict[str, Any], seed: int) -> nn.Module:
    """The package's MapAnything without its heads; weights random: the same for the same seed, whatever the global
    generator's state.

    Raises:
        MissingDependency: the package is not installed.
    """
    arguments = copy.deepcopy(architecture)
    with torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()), vendored_dinov2() as model_class:
        torch.default_generator.manual_seed(seed)
        model: nn.Module = model_class(**arguments, pred_head_config=copy.deepcopy(_SMALLEST_HEADS))
    for head in HEADS:
        if hasattr(model, head):
            delattr(model, head)
    return model.eval()


def load(architecture: dict[str, Any], folder: Path) -> nn.Module:
    """``build``, filled from the folder; every tensor but the heads' must be there, and no other.

    Raises:
        MissingDependency: the package is not installed.
        InputError: a configuration the package refuses; missing, unexpected or misshapen tensors.
    """
    try:
        model = build(architecture, seed=0)
    except GeomcacheError:
        raise
    except (AssertionError, KeyError, TypeError, ValueError) as problem:
        found = f"{type(problem).__name__}: {problem}"
        raise _refused(folder / CONFIG_FILE, "arguments of the package's constructor", found) from problem
    load_strictly(model, folder / WEIGHTS_FILE, "", [f"{head}." for head in HEADS])
    return model


@contextmanager
def vendored_dinov2() -> Iterator[Any]:
    """The package's MapAnything class; inside, it builds DINOv2 from the package's copy of the code, weights random."""
    model_class, backbones = _package()
    hub_load = torch.hub.load
    torch.hub.load = lambda _repository, name, **_: getattr(backbones, name)(pretrained=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "xFormers is not available"
            yield model_class
    finally:
        torch.hub.load = hub_load


def _package() -> tuple[Any, Any]:
    """(MapAnything, the vendored builders of DINOv2), imported without side effects."""
    try:
        with _without_side_effects():
            from mapanything.models import MapAnything
            from mapanything.models.external.dinov2.hub import backbones
    except ModuleNotFoundError as problem:
        raise MissingDependency(
            "encoder map_anything needs a package that is not installed",
            expected="mapanything 1.1, which no registry has, with what it asks for",
            found=f"no module named {problem.name}",
            fix=INSTALL,
        ) from problem
    return MapAnything, backbones


@contextmanager
def _without_side_effects() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def build_tiny(seed: int) -> nn.Module:
    """Not MapAnything: uniception's multi-view transformer, small, behind one convolution; weights from the seed.

    It has the two things the adapter uses of the real class, ``infer(views, use_amp)`` calling ``forward(views)`` and
    ``info_sharing``, so that everything but the published weights can be tried where the package is not installed.

    Raises:
        MissingDependency: uniception is not installed.
    """
    try:
        with _without_side_effects():
            from uniception.models.info_sharing.alternating_attention_transformer import (
                MultiViewAlternatingAttentionTransformerIFR as InfoSharing,
            )
            from uniception.models.info_sharing.base import MultiViewTransformerInput
    except ModuleNotFoundError as problem:
        raise MissingDependency(
            "encoder map_anything needs a package that is not installed",
            expected="uniception 0.1.7 and jaxtyping",
            found=f"no module named {problem.name}",
            fix=INSTALL_TINY,
        ) from problem

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(3, 64, PATCH, PATCH)
            self.scale_token = nn.Parameter(torch.randn(64) * 0.02)
            self.info_sharing = InfoSharing(
                name="tiny", input_embed_dim=64, depth=4, dim=TINY_DIM, num_heads=4, indices=[1, 2]
            )

        def infer(self, views: list[dict[str, Any]], use_amp: bool) -> Any:
            assert not use_amp
            with torch.inference_mode():
                return self.forward(views)

        def forward(self, views: list[dict[str, Any]]) -> Any:
            features = self.encoder(torch.cat([view["img"] for view in views])).chunk(len(views))
            scale_B64_1 = self.scale_token[None, :, None].expand(len(features[0]), -1, -1)
            return self.info_sharing(MultiViewTransformerInput(features=features, additional_input_tokens=scale_B64_1))

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Tiny().eval()
