"""Depth-Anything-3 beyond its last features: blocks, the head's maps, resampling, precision of the head, compiling."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import ConfigError, InputError
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.encoders._checkpoints import module_digest
from geomcache.pipeline.encoders._common import resample
from geomcache.pipeline.encoders._da3_package import MODELS, build_backbone, build_head, package_classes
from geomcache.pipeline.encoders.depth_anything3 import CHECKPOINTS, Config, Encoder
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.image_path import prepare
from geomcache.pipeline.tokens import build_encoder, token_recipe

Contracts = Callable[..., Contract]
Frames = Callable[..., FrameBatch]

GOLDEN = Path(__file__).parents[2] / "golden"
PICTURE = (56, 70)  # 4 x 5 patches; the head's rays are 32 x 40, its depth 56 x 70


def loaded(config: Config, contract: Contract) -> Encoder:
    encoder = Encoder(config, contract)
    encoder.load("cpu")
    return encoder


def package_net(model: str, **parts: nn.Module) -> Any:
    """The package's own net around its own backbone and head, with the weights of seed 0 and nothing of ours."""
    _, dinov2_class, _ = package_classes()
    from depth_anything_3.model.da3 import DepthAnything3Net

    size = MODELS[model]

    class Tiny(nn.Module):  # what the package's DinoV2 is, which knows published sizes only
        def __init__(self) -> None:
            super().__init__()
            self.pretrained = build_backbone("tiny", 0).pretrained

        def forward(self, x: torch.Tensor, **settings: Any) -> Any:
            transformer: Any = self.pretrained
            return transformer.get_intermediate_layers(x, list(size.out_layers), **settings)

    if model == "tiny":
        backbone: nn.Module = Tiny()
    else:
        starts = dict.fromkeys(("alt_start", "qknorm_start", "rope_start"), size.cross_view_from)
        backbone = dinov2_class(name=size.vit, out_layers=list(size.out_layers), cat_token=True, **starts)
        backbone.load_state_dict(build_backbone(model, 0).state_dict())
    return DepthAnything3Net(backbone, build_head(model, 0), **parts).eval()


def package_output(net: Any, frames: FrameBatch, size: tuple[int, int], **settings: Any) -> Any:
    with torch.no_grad():
        return net(prepare(frames.images_BVHWC, size), ref_view_strategy="first", **settings)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("depth_anything3_tiny_maps", Config(tap="depth.ray", process_size=PICTURE, batch_size=2)),
        ("depth_anything3_tiny_block3", Config(tap="features.both", block=3, process_size=PICTURE, batch_size=2)),
    ],
)
def test_golden_output(name: str, config: Config, contract: Contracts, frames: Frames) -> None:
    """float32 [2, 2, 20, 9 or 128] of the tiny model with seed 0; its last block is in test_depth_anything3.

    When this fails: see there. To write a file again: ``np.save(path, tokens)`` in this test.
    """
    tokens = loaded(config, contract()).encode(frames(2)).numpy()
    np.testing.assert_allclose(tokens, np.load(GOLDEN / f"{name}.npy"), atol=1e-4)


@pytest.mark.parametrize("model", ["tiny", "da3-small"])
def test_maps_equal_the_packages_own_forward(model: str, contract: Contracts, frames: Frames) -> None:
    """Without a camera decoder its forward keeps the rays; at the maps' own sizes nothing is resampled."""
    out = package_output(package_net(model), frames(1), PICTURE)
    assert out.ray.shape == (1, 2, 32, 40, 6)
    assert out.depth.shape == (1, 2, *PICTURE)
    settings = {"model": model, "weights": "random", "process_size": PICTURE, "batch_size": 1}
    ray = build_encoder("depth_anything3", {**settings, "tap": "ray", "geom_target_hw": (32, 40)}, contract())
    depth = build_encoder("depth_anything3", {**settings, "tap": "depth", "geom_target_hw": PICTURE}, contract())
    rays, depths = ray.encode(frames(1)), depth.encode(frames(1))
    assert torch.equal(rays[..., :6], out.ray.flatten(2, 3))
    assert torch.equal(rays[..., 6], out.ray_conf.flatten(2))
    assert torch.equal(depths[..., 0], out.depth.flatten(2))
    assert torch.equal(depths[..., 1], out.depth_conf.flatten(2))
    assert (rays[..., 6] > 1).all()
    assert (depths[..., 0] > 0).all()
    assert (depths[..., 1] > 1).all()


def test_the_packages_forward_deletes_the_rays_when_there_is_a_camera_decoder(frames: Frames) -> None:
    """Why the head is called directly. When this fails, the package has changed: look again at which way is right."""
    package_classes()
    from depth_anything_3.model.cam_dec import CameraDec
    from depth_anything_3.model.cam_enc import CameraEnc

    net = package_net("tiny", cam_dec=CameraDec(dim_in=128), cam_enc=CameraEnc(dim_out=64, num_heads=2))
    assert "ray" not in package_output(net, frames(1), PICTURE)


def test_four_views_maps_stay_in_order(contract: Contracts, frames: Frames) -> None:
    out = package_output(package_net("tiny"), frames(1, views=4), PICTURE)
    config = Config(tap="depth", process_size=PICTURE, geom_target_hw=PICTURE, batch_size=1)
    depths = loaded(config, contract(("a", "b", "c", "d"))).encode(frames(1, views=4))
    assert torch.equal(depths[..., 0], out.depth.flatten(2))


@pytest.mark.parametrize("block", [3, 5])
def test_cross_view_blocks_equal_the_packages_auxiliary_features(
    block: int, contract: Contracts, frames: Frames
) -> None:
    """Right for two views: the package puts auxiliary features of three or more in another order than the views."""
    out = package_output(package_net("tiny"), frames(2), PICTURE, export_feat_layers=[block])
    config = Config(tap="features.global", block=block, process_size=PICTURE, batch_size=2)
    tokens = loaded(config, contract()).encode(frames(2))
    assert torch.equal(tokens, out.aux[f"feat_layer_{block}"].flatten(2, 3))


def test_local_of_any_block_is_the_last_per_view_output(contract: Contracts, frames: Frames) -> None:
    """Against hooks on the package's own blocks: per view are 0, 1, 2 and 4; 3 and 5 attend across views."""
    net, outputs = package_net("tiny"), dict[int, torch.Tensor]()
    for number, block in enumerate(net.backbone.pretrained.blocks):
        block.register_forward_hook(lambda _m, _i, out, number=number: outputs.__setitem__(number, out))
    package_output(net, frames(1), PICTURE)
    for block, source in {0: 0, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4}.items():
        config = Config(tap="features.local", block=block, process_size=PICTURE, batch_size=1)
        tokens = loaded(config, contract()).encode(frames(1))
        assert torch.equal(tokens[0], outputs[source][:, 1:]), f"block {block}"


def test_the_default_is_the_last_block_and_digests_are_of_the_whole_model(contract: Contracts, frames: Frames) -> None:
    default = loaded(Config(process_size=PICTURE, batch_size=1), contract())
    last = loaded(Config(process_size=PICTURE, batch_size=1, block=5), contract())
    third = loaded(Config(process_size=PICTURE, batch_size=1, block=3), contract())
    assert torch.equal(default.encode(frames(1)), last.encode(frames(1)))
    assert relative(third.encode(frames(1)), last.encode(frames(1))) > 0.01
    assert third.weights_digest() == default.weights_digest() == module_digest(build_backbone("tiny", 0))
    assert third.spec.tap == "features.global.block3"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tap": "features.global", "block": 4}, r"block 3, 5, not 4"),
        ({"tap": "features.both", "block": 1}, r"block 3, 5, not 1"),
        ({"tap": "features.local", "block": 6}, r"block 0, 1, 2, 3, 4, 5, not 6"),
        ({"tap": "features.global", "block": 12, "model": "da3-small", "weights": "random"}, "block 5, 7, 9, 11, not"),
        ({"tap": "ray", "block": 5}, r"reads blocks \(2, 3, 4, 5\)"),
        ({"geom_target_hw": [0, 3]}, "geom_target_hw"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(Config, settings, "encoder depth_anything3")


def test_the_giants_cross_view_blocks_start_at_13() -> None:
    assert MODELS["da3-giant-1.1"].cross_view_blocks == tuple(range(13, 40, 2))
    assert all(set(size.out_layers[-1:]) <= set(size.cross_view_blocks) for size in MODELS.values())


@pytest.mark.parametrize("grid", [(14, 14), (24, 32), (27, 36)])
@pytest.mark.parametrize("tap", ["features.local", "ray", "depth.ray"])
def test_target_grids(tap: str, grid: tuple[int, int], contract: Contracts, frames: Frames) -> None:
    settings = {"tap": tap, "geom_target_hw": grid, "process_size": PICTURE, "batch_size": 1}
    encoder = build_encoder("depth_anything3", settings, contract())
    tokens = encoder.encode(frames(1))
    assert encoder.spec.grid == grid
    assert tokens.shape == (1, *encoder.spec.row_shape)
    assert tokens.isfinite().all()


@pytest.mark.parametrize(("source", "target"), [((32, 40), (14, 14)), ((18, 18), (24, 32)), ((28, 36), (27, 36))])
def test_resampling_equals_pillows_float_filter(source: tuple[int, int], target: tuple[int, int]) -> None:
    """Pillow's BILINEAR on float32 planes: another program for the same triangle filter, its weights in float64."""
    maps = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 2, *source, 3)).astype(np.float32))
    tokens = resample(maps, target)
    assert tokens.shape == (2, 2, target[0] * target[1], 3)
    for b, v, d in np.ndindex(2, 2, 3):
        plane = Image.fromarray(maps[b, v, :, :, d].numpy()).resize(target[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_allclose(tokens[b, v, :, d].reshape(target), np.asarray(plane), atol=1e-5)


def test_tokens_are_row_by_row_from_the_top_left() -> None:
    ramp = torch.arange(4.0)[:, None] * 10 + torch.arange(6.0)  # 10 * row + column
    tokens = resample(ramp.expand(1, 1, 4, 6)[..., None], (4, 6))
    assert tokens.flatten().tolist() == ramp.flatten().tolist()
    halved = resample(ramp.expand(1, 1, 4, 6)[..., None], (2, 3)).flatten()
    assert (halved.diff()[[0, 1, 3, 4]] > 0).all()
    assert halved[3] - halved[0] > 10


def test_depth_and_ray_are_the_halves_of_depth_ray(contract: Contracts, frames: Frames) -> None:
    taps: tuple[Any, ...] = ("depth", "ray", "depth.ray")
    depth, ray, both = (
        loaded(Config(tap=tap, process_size=PICTURE, batch_size=1), contract()).encode(frames(1)) for tap in taps
    )
    assert torch.equal(torch.cat([depth, ray], dim=-1), both)


@pytest.mark.parametrize(
    "settings",
    [
        {"tap": "ray", "batch_size": 3, "process_size": (126, 126), "geom_target_hw": (14, 14)},
        {"tap": "depth", "batch_size": 3, "process_size": PICTURE, "geom_target_hw": (24, 32)},
        {"tap": "depth.ray", "batch_size": 3, "process_size": PICTURE, "compute_dtype": "bfloat16"},
        {"tap": "ray", "batch_size": 3, "model": "da3-small", "weights": "random", "process_size": PICTURE},
        {"tap": "features.both", "batch_size": 3, "geom_target_hw": (14, 14), "process_size": PICTURE},
        {"tap": "features.both", "batch_size": 3, "compute_dtype": "float16", "process_size": PICTURE},
    ],
    ids=["ray", "depth", "bfloat16", "da3-small", "features", "float16"],
)
def test_slot_and_neighbours_do_not_matter(settings: dict[str, Any], contract: Contracts, frames: Frames) -> None:
    encoder = build_encoder("depth_anything3", settings, contract())
    whole = encode_padded(encoder, frames(5))
    assert torch.equal(encode_padded(encoder, frames(1, start=4)), whole[4:])
    assert torch.equal(encode_padded(encoder, frames(2, start=2)), whole[2:4])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_backbone_runs_in_half_and_the_head_in_float32(dtype: Any, contract: Contracts, frames: Frames) -> None:
    """One program: the package's backbone under autocast, then its head without; and it is not the float32 one."""
    config = Config(tap="ray", process_size=PICTURE, geom_target_hw=(32, 40), batch_size=1, compute_dtype=dtype)
    tokens = loaded(config, contract()).encode(frames(1))
    net = package_net("tiny")
    with torch.no_grad(), torch.autocast("cpu", dtype=getattr(torch, dtype)):
        feats, _ = net.backbone(prepare(frames(1).images_BVHWC, PICTURE), ref_view_strategy="first")
    feats = [(feat.float(), camera) for feat, camera in feats]
    with torch.no_grad():
        out = net.head(feats, *PICTURE, patch_start_idx=0)
    assert torch.equal(tokens[..., :6], out.ray.flatten(2, 3))
    full = loaded(config.model_copy(update={"compute_dtype": "float32"}), contract()).encode(frames(1))
    assert 0 < relative(tokens, full) < 0.01
    assert tokens.dtype == torch.float32


def test_maps_digest_the_head_too_and_keep_float32(contract: Contracts) -> None:
    features, ray, depth = (Encoder(Config(tap=tap), contract()) for tap in ("features.both", "ray", "depth"))
    digests = [encoder.weights_digest() for encoder in (features, ray, depth)]
    assert digests[0] != digests[1] == digests[2]
    other = nn.ModuleDict({"backbone": build_backbone("tiny", 0), "head": build_head("tiny", 1)})
    assert module_digest(other) != digests[1]
    assert (ray.spec.codec, depth.spec.codec, features.spec.codec) == ("fp32", "fp32", "bf16")
    assert (ray.spec.dim, depth.spec.dim, Encoder(Config(tap="depth.ray"), contract()).spec.dim) == (7, 2, 9)


def test_new_settings_unused_leave_the_ids_of_older_caches(contract: Contracts) -> None:
    """Ids as release 1 gave them. When this fails, every cache of this encoder would be refused: keep the ids."""

    def cache_id(settings: dict[str, Any]) -> str:
        encoder = build_encoder("depth_anything3", settings, contract(), None)
        return token_recipe(encoder, contract(), "pack").fingerprint.encoder_config

    bf16 = {"tap": "features.local", "compute_dtype": "bfloat16", "process_size": [252, 252]}
    assert cache_id({}) == "757612ac2b777d1e028910395b4d81a29ded9404a0b98c44692d28ff595c6432"
    assert cache_id(bf16) == "503c0d422e7c562bd9a48646e7b2a2b9a605c2c4f8ead092a0799489314062f7"
    others: list[dict[str, Any]] = [{"block": 3}, {"geom_target_hw": [14, 14]}, {"compile": True}, {"tap": "ray"}]
    assert len({cache_id(settings) for settings in [{}, *others]}) == 5


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.slow  # the C++ compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_block_gives_the_same_tokens_in_every_slot(
    contract: Contracts, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    settings = {"batch_size": 3, "process_size": (28, 42), "tap": "features.local", "block": 0}
    encoder = build_encoder("depth_anything3", {**settings, "compile": True}, contract())
    whole = encode_padded(encoder, frames(4))
    eager = encode_padded(build_encoder("depth_anything3", settings, contract()), frames(4))
    assert relative(whole, eager) < 1e-5
    assert torch.equal(encode_padded(encoder, frames(1, start=3)), whole[3:])


def test_the_whole_backbone_is_one_graph_traced_once(
    contract: Contracts, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo without its C++ backend: the rotary embedding and three views' reordering break no graph."""
    graphs = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: real(function, backend=keep, **settings))
    settings = {"batch_size": 2, "process_size": PICTURE, "tap": "ray"}
    cameras = contract(("a", "b", "c"))
    encoder = build_encoder("depth_anything3", {**settings, "compile": True}, cameras)
    eager = build_encoder("depth_anything3", settings, cameras)
    assert torch.equal(encode_padded(encoder, frames(3, 3)), encode_padded(eager, frames(3, 3)))
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_what_cannot_be_compiled_is_named_before_work_begins(
    contract: Contracts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = Config(compile=True, process_size=(28, 28), batch_size=1, block=0, tap="features.local")
    no_compiler = inductor.patch({"cpp.cxx": (None, "/no/compiler")})
    with no_compiler, pytest.raises(InputError, match="cannot be compiled on cpu") as caught:
        Encoder(config, contract()).load("cpu")
    assert "/no/compiler" in caught.value.found
    assert "g++" in caught.value.fix


def test_published_checkpoints_and_their_licences(contract: Contracts) -> None:
    known = {checkpoint.name: checkpoint for checkpoint in CHECKPOINTS}
    assert sorted(known) == [f"depth-anything/DA3-{name}" for name in ("BASE", "GIANT-1.1", "LARGE-1.1", "SMALL")]
    assert [name for name in sorted(known) if not known[name].non_commercial] == [
        "depth-anything/DA3-BASE",
        "depth-anything/DA3-SMALL",
    ]
    for name, checkpoint in known.items():
        encoder = Encoder(parse_config(Config, {"model": name.split("/")[1].lower(), "weights": name}, "x"), contract())
        assert encoder.license == checkpoint.license
        assert encoder.non_commercial == checkpoint.non_commercial
    assert not Encoder(Config(model="da3-giant-1.1", weights="random"), contract()).non_commercial
