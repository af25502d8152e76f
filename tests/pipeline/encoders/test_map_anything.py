"""Model "tiny" everywhere; the real class (fixture ``real``) where the package, on no registry, can be imported."""

import inspect
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import ConfigError, InputError, MissingDependency
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.encoders import _map_anything_build as parts
from geomcache.pipeline.encoders.map_anything import (
    CHECKPOINTS,
    Config,
    Encoder,
    info_sharing_output,
    make_views,
    processed_intrinsics,
)
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.image_path import prepare
from tests.golden.make_map_anything import CASES, GOLDEN, small_config, small_folder, tokens, written

Contracts = Callable[..., Contract]
Frames = Callable[..., FrameBatch]
CPU = torch.device("cpu")
SMALL_PICTURE = (56, 70)  # 4 x 5 tokens
CAMERAS = {"use_intrinsics": True, "use_poses": True}
RANDOM_V1 = {"model": "v1", "weights": "random"}


def loaded(contract: Contract, **settings: Any) -> Encoder:
    encoder = Encoder(Config.model_validate({"process_size": SMALL_PICTURE, **settings}), contract)
    encoder.load("cpu")
    return encoder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a small model of the real class, in a folder as the published ones."""
    pytest.importorskip("mapanything", reason=f"the real class: {parts.INSTALL}")
    folder = small_folder(tmp_path_factory.mktemp("map_anything") / "small")
    return {"model": "custom", "weights": str(folder)}


@pytest.mark.parametrize("case", ["tiny", *CASES])
def test_golden_output(case: str, request: pytest.FixtureRequest) -> None:
    """Tokens of model "tiny", and of the real class built small with a seed.

    When this fails: somebody changed the image path (then raise IMAGE_PATH_VERSION), the random build, the capture, or
    a package; every existing cache of this encoder is stale then. If that is meant, run ``python -m
    tests.golden.make_map_anything`` and say why in the commit. The tolerance is for other CPUs' kernels.
    """
    settings = {} if case == "tiny" else {**request.getfixturevalue("real"), **CASES[case]}
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(tokens(settings).numpy(), golden[case], atol=1e-4)


def test_tokens_are_info_sharings_output_view_by_view(contract: Contracts, frames: Frames) -> None:
    """The same transformer called by hand on hand-cut patches, tokens row by row."""
    from uniception.models.info_sharing.base import MultiViewTransformerInput

    tiny: Any = parts.build_tiny(0)
    images = prepare(frames(2).images_BVHWC, SMALL_PICTURE)
    patches = images.unfold(3, 14, 14).unfold(4, 14, 14)  # [B, V, 3, h, w, 14, 14]
    weight = tiny.encoder.weight
    features = torch.einsum("bvchwij,dcij->bvdhw", patches, weight) + tiny.encoder.bias[:, None, None]
    scale = tiny.scale_token.expand(2, -1)[..., None]
    with torch.no_grad():
        final, between = tiny.info_sharing(
            MultiViewTransformerInput(features=list(features.unbind(1)), additional_input_tokens=scale)
        )
    for tap, output in [("final", final), ("intermediate_0", between[0]), ("intermediate_1", between[1])]:
        found = loaded(contract(), batch_size=2, tap=f"features.{tap}").encode(frames(2))
        assert found.shape == (2, 2, 20, 48)
        for view, token in [(0, 0), (0, 1), (0, 5), (1, 6), (1, 19)]:
            by_hand = output.features[view][:, :, token // 5, token % 5]
            torch.testing.assert_close(found[:, view, token], by_hand, atol=1e-5, rtol=1e-5)


def test_views_know_each_other_in_the_contracts_order(contract: Contracts, frames: Frames) -> None:
    encoder = loaded(contract(("a", "b", "c")), batch_size=1)
    images = frames(1, views=3).images_BVHWC
    changed = images.copy()
    changed[:, 2] = 255 - changed[:, 2]
    before, after = encoder.encode(FrameBatch(images)), encoder.encode(FrameBatch(changed))
    moved = [relative(after[:, view], before[:, view]) for view in range(3)]
    assert moved[2] > max(moved[:2]) > 1e-3
    turned = encoder.encode(FrameBatch(images[:, ::-1])).flip(1)  # view 0 is the reference
    assert relative(turned, before) > 0.1


def test_the_capture_runs_nothing_after_the_tokens_and_leaves_nothing_behind() -> None:
    class WithHeads(type(parts.build_tiny(0))):  # type: ignore[misc]
        """Draws random numbers as the real forward does; its heads must not be reached."""

        def forward(self, views: Any) -> Any:
            torch.rand(7)
            super().forward(views)
            pytest.fail("the heads were run")

    model: Any = WithHeads().eval()
    state = torch.get_rng_state()
    views = make_views(torch.ones(1, 2, 3, 28, 28), None, None)
    output = info_sharing_output(model, views, CPU, "float32")
    assert output[0].features[0].shape == (1, 48, 2, 2)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="expected input"):  # a mistake inside comes out as it is
        info_sharing_output(model, make_views(torch.zeros(1, 1, 4, 28, 28), None, None), CPU, "float32")
    assert "forward" not in vars(model)
    assert not model.info_sharing._forward_hooks
    assert not torch.is_inference_mode_enabled()
    model.infer = lambda _views, use_amp: use_amp
    with pytest.raises(InputError, match="does not run info_sharing"):
        info_sharing_output(model, views, CPU, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_ours_stays_near_float32_and_is_recorded(
    dtype: str, contract: Contracts, frames: Frames
) -> None:
    half, full = loaded(contract(), batch_size=1, compute_dtype=dtype), loaded(contract(), batch_size=1)
    assert half.spec.compute_dtype == dtype
    inputs: list[torch.dtype] = []
    model: Any = half._model
    block = model.info_sharing.self_attention_blocks[1].attn.proj
    block.register_forward_hook(lambda _m, _i, output: inputs.append(output.dtype))
    found = half.encode(frames(1))
    assert inputs == [{"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]]
    assert found.dtype == torch.float32
    assert not found.is_inference()  # usable where gradients are
    assert 1e-5 < relative(found, full.encode(frames(1))) < 0.03
    assert half.weights_digest() == full.weights_digest()


def test_compile_is_asked_of_every_block_once(contract: Contracts, monkeypatch: pytest.MonkeyPatch) -> None:
    """That torch compiles them right was tried by hand (20 s); that they are the right ones is told here."""
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled.append(block))
    encoder = loaded(contract(), compile=True)
    encoder.load("cpu")
    model: Any = encoder._model
    assert compiled == list(model.info_sharing.self_attention_blocks)


def test_processed_intrinsics_by_hand() -> None:
    """128 x 128 -> H 56, W 112: the centre of pixel (u, v) = (0, 0) was at 0.5; shrunk it lies at 0.4375, 0.21875."""
    K = np.array([[160.0, 0, 64], [0, 150, 60], [0, 0, 1]])
    found = processed_intrinsics(K[None, None], (128, 128), (56, 112))[0, 0]
    np.testing.assert_allclose(found, [[140, 0, 55.5], [0, 65.625, 25.75], [0, 0, 1]])
    ray = np.linalg.inv(K) @ [0.5, 0.5, 1]  # ours: the centre of the first pixel
    np.testing.assert_allclose(found @ ray, [0.4375 - 0.5, 0.21875 - 0.5, 1])


def test_configured_cameras_reach_the_model_as_the_package_wants_them(contract: Contracts, frames: Frames) -> None:
    model: Any = parts.build_tiny(0)
    infer, seen = model.infer, []
    model.infer = lambda views, use_amp: (seen.extend(views), infer(views, use_amp))
    batch = frames(3)
    assert batch.extrinsics_BV44 is not None
    for cameras in ({}, CAMERAS):
        encoder = Encoder(Config.model_validate({**RANDOM_V1, "batch_size": 3, **cameras}), contract())
        encoder._model = model
        encoder.encode(batch)
    assert [sorted(view) for view in seen[:2]] == [["data_norm_type", "img"]] * 2
    K = np.array([[1.2 * 224, 0, 111.5], [0, 1.1 * 224, 111.5], [0, 0, 1]])  # 64 -> 224 pixels
    for v, view in enumerate(seen[2:]):
        assert sorted(view) == ["camera_poses", "data_norm_type", "img", "intrinsics", "is_metric_scale"]
        assert view["data_norm_type"] == ["dinov2"]
        assert view["camera_poses"].dtype == view["intrinsics"].dtype == torch.float32
        np.testing.assert_allclose(view["intrinsics"], [K, K, K], rtol=1e-6)
        np.testing.assert_allclose(view["camera_poses"], batch.extrinsics_BV44[:, v], atol=1e-6)
        assert view["is_metric_scale"].tolist() == [True, True, True]


def test_cameras_are_asked_for_and_named(contract: Contracts) -> None:
    plain, posed = Config.model_validate(RANDOM_V1), Config.model_validate({**RANDOM_V1, "use_poses": True})
    assert Encoder(plain, contract(depth=False)).needs == {"images"}
    assert Encoder(posed, contract()).needs == {"images", "cameras"}
    assert Encoder(plain, contract()).spec.tap == "features.final"
    assert Encoder(posed, contract()).spec.tap == "features.final+poses"
    both = posed.model_copy(update={"use_intrinsics": True})
    assert Encoder(both, contract()).spec.tap == "features.final+intrinsics+poses"
    with pytest.raises(InputError, match="need camera matrices"):
        Encoder(posed, contract(depth=False))


def test_specs_of_the_published_models(contract: Contracts) -> None:
    for model, dim in [("v1.1", 1536), ("v1", 768)]:
        encoder = Encoder(parse_config(Config, {"model": model, "weights": "random"}, "x"), contract())
        assert encoder.spec.row_shape == (2, 256, dim)
    with pytest.raises(InputError, match=r"expected: .*features\.intermediate_1\n  found:    features\.intermediate_2"):
        Encoder(Config.model_validate({**RANDOM_V1, "tap": "features.intermediate_2"}), contract())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "v1.1"}, "model v1.1 needs weights"),
        ({"model": "custom", "weights": "random"}, "model custom needs a weights folder"),
        ({"weights": "facebook/map-anything"}, "model tiny has no weights but random ones"),
        ({"use_poses": True}, "model tiny takes images only"),
        ({"process_size": [224, 220]}, "a multiple of 14 pixels, such as 210 or 224"),
        ({"use_pose": True}, "did you mean 'use_poses'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(Config, settings, "encoder map_anything")


def test_sizes_come_from_the_folder_and_no_pickle_is_ever_named(tmp_path: Path, contract: Contracts) -> None:
    config = small_config()
    config["info_sharing_config"]["module_args"]["pretrained_checkpoint_path"] = "x.pth"
    config["encoder_config"]["pretrained_checkpoint_path"] = config["pretrained_checkpoint_path"] = "y.pth"
    encoder = Encoder(Config(model="custom", weights=str(written(tmp_path, config))), contract())
    assert encoder.spec.dim == 48
    assert ".pth" not in json.dumps(encoder._architecture)
    assert "pred_head_config" not in encoder._architecture
    del config["info_sharing_config"]["module_args"]["dim"]  # as v1's configuration has none
    written(tmp_path, config)
    from uniception.models.info_sharing.alternating_attention_transformer import (
        MultiViewAlternatingAttentionTransformerIFR as InfoSharing,
    )

    dim = Encoder(Config(model="custom", weights=str(tmp_path)), contract()).spec.dim
    assert dim == inspect.signature(InfoSharing).parameters["dim"].default == 768


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda _c: "{", "expected: JSON"),
        (lambda _c: [1], "found:    list"),
        (lambda c: c.pop("info_sharing_config") and c, "expected: keys name, encoder_config"),
        (lambda c: c["info_sharing_config"].pop("module_args") and c, "KeyError"),
        (lambda c: c["encoder_config"].update(encoder_str="radio") or c, "found:    radio, dinov2, 14"),
        (lambda c: c["encoder_config"].update(patch_size=16) or c, "dinov2, dinov2, 16"),
        (
            lambda c: c["geometric_input_config"]["scale_encoder_config"].update(encoder_str="pixio") or c,
            "found:    pixio",
        ),
        (lambda c: c, r"expected: model v1: DINOv2 large \(all blocks\), info sharing of 24 blocks, width 768"),
    ],
)
def test_folders_that_are_refused(edit: Callable[[Any], Any], said: str, tmp_path: Path, contract: Contracts) -> None:
    written(tmp_path, edit(small_config()))
    with pytest.raises(InputError, match=said):
        Encoder(Config(model="v1", weights=str(tmp_path)), contract())


def test_only_the_heads_tensors_may_be_there_beside_the_models(
    tmp_path: Path, contract: Contracts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(parts, "build", lambda _architecture, seed: parts.build_tiny(seed + 1))
    written(tmp_path, small_config())
    state = {**parts.build_tiny(7).state_dict(), "dense_head.0.weight": torch.zeros(1), "scale_head.x": torch.zeros(1)}
    save_file(state, tmp_path / "model.safetensors")
    config = Config(model="custom", weights=str(tmp_path), process_size=SMALL_PICTURE, batch_size=1)
    encoder = Encoder(config, contract())
    encoder.load("cpu")
    assert encoder.weights_digest() == Encoder(config, contract()).weights_digest()
    filled: Any = encoder._model
    assert torch.equal(filled.encoder.weight, state["encoder.weight"])
    for changed, said in [
        ({**state, "headless": torch.zeros(1)}, "unexpected 1 key"),
        ({name: value for name, value in state.items() if name != "scale_token"}, "lacks 1 key"),
        ({**state, "scale_token": torch.zeros(65)}, "misshapen 1 key"),
    ]:
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=said):
            Encoder(config, contract()).load("cpu")


def test_weights_are_called_what_they_are(tmp_path: Path, contract: Contracts) -> None:
    tiny = Encoder(Config(seed=7), contract())
    assert tiny.license == "none (random weights, seed 7)"
    assert not tiny.non_commercial
    assert tiny.description.startswith("uniception info sharing, not MapAnything tiny, RANDOM weights (seed 7)")
    folder = Encoder(Config(model="custom", weights=str(written(tmp_path, small_config()))), contract())
    assert folder.license.startswith("unknown")
    assert folder.non_commercial
    assert {c.name for c in CHECKPOINTS if c.non_commercial} == {"facebook/map-anything", "facebook/map-anything-v1"}
    assert all(("NC" in c.license) == c.non_commercial for c in CHECKPOINTS)
    digests = [Encoder(Config(seed=seed), contract()).weights_digest() for seed in (0, 1, 0)]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("package", "config", "line"),
    [
        (
            "mapanything",
            {"model": "v1", "weights": "random"},
            "pip install git+https://github.com/facebookresearch/map-anything",
        ),
        ("uniception", {}, "pip install --no-deps uniception==0.1.7"),
    ],
)
def test_missing_package_names_the_line_that_installs_it(
    package: str, config: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch, contract: Contracts
) -> None:
    encoder = Encoder(Config.model_validate(config), contract())  # the spec needs no package
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    hub_load = torch.hub.load
    with pytest.raises(MissingDependency) as caught:
        encoder.load("cpu")
    assert caught.value.fix.startswith(line)
    assert torch.hub.load is hub_load


@pytest.mark.parametrize("cameras", [{}, CAMERAS], ids=["images", "cameras"])
def test_adapter_equals_the_packages_own_loading_and_whole_inference(
    cameras: dict[str, Any], real: dict[str, Any], contract: Contracts, frames: Frames
) -> None:
    with parts.vendored_dinov2() as model_class:
        own = model_class.from_pretrained(real["weights"], strict=True).eval()
    caught: list[Any] = []
    own.info_sharing.register_forward_hook(lambda _m, _i, output: caught.append(output))
    batch = frames(3)
    assert batch.intrinsics_BV33 is not None
    K = processed_intrinsics(batch.intrinsics_BV33, (64, 64), SMALL_PICTURE) if cameras else None
    views = make_views(prepare(batch.images_BVHWC, SMALL_PICTURE), K, batch.extrinsics_BV44 if cameras else None)
    assert own.infer(views, use_amp=False)[1]["pts3d"].shape == (3, *SMALL_PICTURE, 3)
    final, between = caught[0]
    for tap, output in [("final", final), ("intermediate_1", between[1])]:
        encoder = loaded(contract(), **{**real, **cameras, "batch_size": 3, "tap": f"features.{tap}"})
        found = encoder.encode(batch)
        assert torch.equal(found, torch.stack([f.flatten(2).mT for f in output.features], dim=1))
        torch.manual_seed(99)
        assert torch.equal(encode_padded(encoder, frames(1, start=2)), found[2:])  # another slot, other neighbours


def test_the_world_of_the_poses_does_not_matter_their_metres_do(
    real: dict[str, Any], contract: Contracts, frames: Frames
) -> None:
    encoder, batch = loaded(contract(), **real, batch_size=1, use_poses=True), frames(1)
    assert batch.extrinsics_BV44 is not None
    poses = batch.extrinsics_BV44.copy()
    poses[:, 1, 0, 3] += 0.25

    def tokens_of(poses_BV44: np.ndarray) -> torch.Tensor:
        return encoder.encode(FrameBatch(batch.images_BVHWC, extrinsics_BV44=poses_BV44))

    world = np.array([[0, -1, 0, 0.3], [1, 0, 0, 2], [0, 0, 1, -1], [0, 0, 0, 1]])
    assert relative(tokens_of(world @ poses), tokens_of(poses)) < 1e-5
    wider = poses.copy()
    wider[:, 1, 0, 3] += 0.25
    assert relative(tokens_of(wider), tokens_of(poses)) > 0.05


@pytest.mark.usefixtures("real")
def test_preprocessing_is_the_packages_less_its_resize() -> None:
    """Its camera matrices have pixel centres at whole numbers; its resize is Pillow's Lanczos, ours is not."""
    from mapanything.utils.image import preprocess_inputs

    picture = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    [view] = preprocess_inputs([{"img": picture}], resize_mode="square", size=56)
    assert torch.equal(view["img"][0], prepare(picture[None, None], (56, 56))[0, 0])
    K = np.array([[160.0, 0, 64], [0, 150, 60], [0, 0, 1]])
    big = {"img": np.zeros((128, 128, 3), np.uint8), "intrinsics": K - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]}
    [view] = preprocess_inputs([big], resize_mode="square", size=56)
    np.testing.assert_allclose(view["intrinsics"][0], processed_intrinsics(K, (128, 128), (56, 56)), atol=1e-4)


@pytest.mark.parametrize("model", ["tiny", "real"])
def test_importing_and_building_leave_no_traces(
    model: str,
    request: pytest.FixtureRequest,
    contract: Contracts,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both packages' imports allow TF32, which would change every float32 product of the process on a GPU."""
    settings = {} if model == "tiny" else request.getfixturevalue("real")
    for name in [name for name in sys.modules if name.split(".")[0] in ("uniception", "mapanything")]:
        monkeypatch.delitem(sys.modules, name)
    torch.set_float32_matmul_precision("highest")
    before = (torch.hub.load, list(warnings.filters))
    encoder = loaded(contract(), **settings)
    assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.hub.load, warnings.filters) == before
    assert capsys.readouterr().out == ""
    assert not {name.split(".")[0] for name in encoder._weights().state_dict()} & set(parts.HEADS)
