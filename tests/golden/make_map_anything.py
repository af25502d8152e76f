"""Makes map_anything_tiny.npz: tokens of the REAL MapAnything class, small and seeded, and of model "tiny".

    python -m tests.golden.make_map_anything        # needs mapanything (see the encoder's INSTALL) for the real class

The input is a formula (``make_frames`` of the encoders' conftest). ``small_folder`` is used by the tests too, where the
package is installed.
"""

import copy
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomcache.pipeline.encoders import _map_anything_build as parts
from geomcache.pipeline.encoders.map_anything import Config, Encoder
from tests.pipeline.encoders.conftest import make_contract, make_frames

GOLDEN = Path(__file__).parent / "map_anything_tiny.npz"
SEED = 5
# What each array was made with, beside model, weights and batch_size.
CASES: dict[str, dict[str, Any]] = {
    "images": {},
    "intermediate_0": {"tap": "features.intermediate_0"},
    "cameras": {"use_intrinsics": True, "use_poses": True},
    "not_square": {"process_size": (42, 70)},
}
_INF = float("inf")  # stands in published configs too, as JSON's Infinity
_ADAPTOR = "raydirs+depth+pose+confidence+mask"
_DPT_HEADS = {
    "type": "dpt+pose",
    "feature_head": {"feature_dim": 32, "hooks": [0, 1, 2, 3]},
    "regressor_head": {"output_dim": 6},
    "pose_head": {"num_resconv_block": 1, "rot_representation_dim": 4},
    "scale_head": {"output_dim": 1},
    "adaptor_type": _ADAPTOR,
    "dpt_adaptor": {
        "name": _ADAPTOR,
        "ray_directions_mode": "linear",
        "ray_directions_normalize_to_unit_sphere": True,
        "ray_directions_normalize_to_unit_image_plane": False,
        "ray_directions_clamp_min_of_z_dir": False,
        "ray_directions_vmin": -_INF,
        "ray_directions_vmax": _INF,
        "ray_directions_z_dir_min": -_INF,
        "depth_mode": "exp",
        "depth_vmin": 0,
        "depth_vmax": _INF,
        "confidence_type": "exp",
        "confidence_vmin": 1,
        "confidence_vmax": _INF,
    },
    "pose_adaptor": {
        "name": _ADAPTOR,
        "cam_trans_mode": "linear",
        "cam_trans_vmin": -_INF,
        "cam_trans_vmax": _INF,
        "quaternions_mode": "linear",
        "quaternions_normalize": True,
        "quaternions_vmin": -_INF,
        "quaternions_vmax": _INF,
    },
    "scale_adaptor": {"name": "scale", "mode": "exp", "vmin": 1e-8, "vmax": _INF},
}


def small_config() -> dict[str, Any]:
    """The constructor's arguments: v1.1 in small, with every kind of part it has, as a config.json holds them."""
    config = copy.deepcopy(parts.MODELS["v1.1"])
    config["encoder_config"] |= {"size": "small", "keep_first_n_layers": 2}
    sharing = config["info_sharing_config"]["module_args"]
    sharing |= {"dim": 48, "num_heads": 4, "depth": 4, "indices": [1, 2]}
    del sharing["init_values"]  # 1e-5 would make random blocks next to no-ops
    for name, part in config["geometric_input_config"].items():
        if name.endswith("_encoder_config"):
            part["intermediate_dims"] = [32, 32]
    return {**config, "pred_head_config": _DPT_HEADS}


def small_model(seed: int = SEED) -> Any:
    """The package's class with all its heads, weights from the seed."""
    with torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()), parts.vendored_dinov2() as model_class:
        torch.default_generator.manual_seed(seed)
        return model_class(**copy.deepcopy(small_config())).eval()


def small_folder(folder: Path, seed: int = SEED) -> Path:
    """A weights folder as the package publishes them: config.json and model.safetensors with all heads."""
    from safetensors.torch import save_model

    folder.mkdir(parents=True)
    save_model(small_model(seed), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(small_config()))
    return folder


def written(folder: Path, config: Any) -> Path:
    """A folder with this config.json and no weights."""
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def tokens(settings: dict[str, Any]) -> torch.Tensor:
    """Two rows of two views of 64 x 64 pixels."""
    config = Config.model_validate({"process_size": (56, 56), "batch_size": 2, **settings})
    encoder = Encoder(config, make_contract())
    encoder.load("cpu")
    return encoder.encode(make_frames(2))


def main() -> None:
    """Write the file."""
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(small_folder(Path(scratch) / "small"))
        arrays = {name: tokens({"model": "custom", "weights": folder, **case}) for name, case in CASES.items()}
    arrays["tiny"] = tokens({})
    np.savez_compressed(GOLDEN, **{name: array.numpy() for name, array in arrays.items()})


if __name__ == "__main__":
    main()
