import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import ConfigError, InputError, MissingDependency
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.encoders import _da3_package
from geomcache.pipeline.encoders._da3_package import MODELS, build_backbone, package_classes
from geomcache.pipeline.encoders.depth_anything3 import Config, Encoder
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.image_path import prepare

Contracts = Callable[..., Contract]
Frames = Callable[..., FrameBatch]

GOLDEN = Path(__file__).parents[2] / "golden" / "depth_anything3_tiny.npy"
SMALL_PICTURE = (56, 70)  # 4 x 5 tokens


def loaded(config: Config, contract: Contract) -> Encoder:
    encoder = Encoder(config, contract)
    encoder.load("cpu")
    return encoder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_golden_output(contract: Contracts, frames: Frames) -> None:
    """Tokens of the tiny model with seed 0: float32 [2, 2, 20, 128], both halves.

    When this fails: somebody changed the image path (then raise IMAGE_PATH_VERSION), the random build, the
    tap, or the package; every existing cache of this encoder is stale then. If that is meant, write the file
    again with ``np.save(GOLDEN, tokens)`` in this test and say why in the commit. The tolerance is for other
    CPUs' kernels.
    """
    encoder = loaded(Config(process_size=SMALL_PICTURE, tap="features.both", batch_size=2), contract())
    tokens = encoder.encode(frames(2)).numpy()
    np.testing.assert_allclose(tokens, np.load(GOLDEN), atol=1e-4)


def test_adapter_equals_the_packages_own_backbone_call(contract: Contracts, frames: Frames) -> None:
    """The same state in a DinoV2 that the package builds, called as its net does: four out layers."""
    from depth_anything_3.model.dinov2.dinov2 import DinoV2

    encoder = loaded(
        Config(model="da3-small", weights="random", tap="features.both", batch_size=2, process_size=(84, 84)),
        contract(),
    )
    own = DinoV2(
        name="vits", out_layers=[5, 7, 9, 11], alt_start=4, qknorm_start=4, rope_start=4, cat_token=True
    ).eval()
    own.load_state_dict(build_backbone("da3-small", 0).state_dict(), strict=True)
    with torch.no_grad():
        feats, _ = own(prepare(frames(2).images_BVHWC, (84, 84)), cam_token=None, export_feat_layers=[])
    assert torch.equal(encoder.encode(frames(2)), feats[-1][0])


def test_packages_heads_read_these_tokens(contract: Contracts, frames: Frames) -> None:
    """Pairing the adapter's tokens with the package's DualDPT gives depth: they are what the heads expect."""
    from depth_anything_3.model.dualdpt import DualDPT

    encoder = loaded(Config(tap="features.both", batch_size=1), contract())
    head = DualDPT(128, output_dim=2, features=32, out_channels=(16, 16, 32, 32)).eval()
    tokens = encoder.encode(frames(1))
    with torch.no_grad():
        out = head([(tokens, tokens[:, :, 0])] * 4, 224, 224, patch_start_idx=0)
    assert out.depth.shape == (1, 2, 224, 224)
    assert out.ray.shape == (1, 2, 128, 128, 6)


def test_halves(contract: Contracts, frames: Frames) -> None:
    """The global half is after LayerNorm (random build: weight 1, bias 0), the local half is not."""
    taps = {
        tap: loaded(Config(process_size=SMALL_PICTURE, tap=tap, batch_size=1), contract()).encode(frames(1))
        for tap in ("features.local", "features.global", "features.both")
    }
    assert torch.equal(torch.cat([taps["features.local"], taps["features.global"]], dim=-1), taps["features.both"])
    torch.testing.assert_close(taps["features.global"].var(-1, correction=0), torch.ones(1, 2, 20), atol=1e-3, rtol=0)
    assert (taps["features.local"].var(-1, correction=0) - 1).abs().max() > 0.05


def test_the_second_view_changes_the_first_views_tokens(contract: Contracts, frames: Frames) -> None:
    encoder = loaded(Config(process_size=SMALL_PICTURE, batch_size=1), contract())
    images = frames(1).images_BVHWC
    other = images.copy()
    other[:, 1] = 255 - other[:, 1]
    before, after = encoder.encode(FrameBatch(images)), encoder.encode(FrameBatch(other))
    assert relative(after[:, 0], before[:, 0]) > 1e-3


def test_one_view_differs_from_the_first_of_two(contract: Contracts, frames: Frames) -> None:
    config = Config(process_size=SMALL_PICTURE, batch_size=1)
    two = loaded(config, contract()).encode(frames(1))
    one = loaded(config, contract(("agentview",))).encode(FrameBatch(frames(1).images_BVHWC[:, :1]))
    assert relative(one[:, 0], two[:, 0]) > 1e-3


def test_view_order_matters(contract: Contracts, frames: Frames) -> None:
    """View 0 is the reference: swapped pictures do not just swap the tokens."""
    encoder = loaded(Config(process_size=SMALL_PICTURE, batch_size=1), contract())
    images = frames(1).images_BVHWC
    straight = encoder.encode(FrameBatch(images))
    swapped = encoder.encode(FrameBatch(images[:, ::-1]))
    assert relative(swapped[:, :: -1 if False else 1], straight[:, 0:1]) > 1e-3


def test_four_views_stay_in_order(contract: Contracts, frames: Frames) -> None:
    """From three views on the package may reorder views by a reference; "first" keeps the order."""
    config = Config(process_size=SMALL_PICTURE, batch_size=1, tap="features.local")
    encoder = loaded(config, contract(("a", "b", "c", "d")))
    images = frames(1, views=4).images_BVHWC
    changed = images.copy()
    changed[:, 3] = 255 - changed[:, 3]
    before, after = encoder.encode(FrameBatch(images)), encoder.encode(FrameBatch(changed))
    moved = [relative(after[:, view], before[:, view]) for view in range(4)]
    assert moved.index(max(moved)) == 3


def test_batches_are_scenes_not_views(contract: Contracts, frames: Frames) -> None:
    config = Config(process_size=SMALL_PICTURE, batch_size=3)
    together = loaded(config, contract()).encode(frames(3))
    alone = loaded(config.model_copy(update={"batch_size": 1}), contract())
    torch.testing.assert_close(together, encode_padded(alone, frames(3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        Config(batch_size=3, process_size=(252, 252)),
        Config(batch_size=3, compute_dtype="bfloat16"),
        Config(batch_size=2, model="da3-small", weights="random", process_size=(126, 126)),
    ],
    ids=["252", "bfloat16", "da3-small"],
)
def test_slot_and_neighbours_do_not_matter(config: Config, contract: Contracts, frames: Frames) -> None:
    encoder = loaded(config, contract())
    whole = encode_padded(encoder, frames(5))
    assert torch.equal(encode_padded(encoder, frames(1, start=4)), whole[4:])
    assert torch.equal(encode_padded(encoder, frames(2, start=2)), whole[2:4])


def test_bfloat16_stays_near_float32_and_is_recorded(contract: Contracts, frames: Frames) -> None:
    half = loaded(Config(batch_size=1, compute_dtype="bfloat16"), contract())
    full = loaded(Config(batch_size=1), contract())
    assert half.spec.compute_dtype == "bfloat16"
    tokens = half.encode(frames(1))
    assert tokens.dtype == torch.float32
    assert 1e-4 < relative(tokens, full.encode(frames(1))) < 0.03
    assert half.weights_digest() == full.weights_digest()  # weights stay float32


def test_seed_makes_the_weights(contract: Contracts) -> None:
    first, second = build_backbone("tiny", 0).state_dict(), build_backbone("tiny", 1).state_dict()
    assert not torch.equal(first["pretrained.pos_embed"], second["pretrained.pos_embed"])
    digests = [Encoder(Config(seed=seed), contract()).weights_digest() for seed in (0, 1, 0)]
    assert digests[0] == digests[2] != digests[1]


def test_random_weights_are_named_as_such(contract: Contracts) -> None:
    encoder = Encoder(Config(model="da3-large-1.1", weights="random", seed=7), contract())
    assert encoder.license == "none (random weights, seed 7)"
    assert "RANDOM weights (seed 7)" in encoder.description


def test_a_published_model_is_never_random_by_oversight() -> None:
    with pytest.raises(ConfigError, match="model da3-base needs weights"):
        parse_config(Config, {"model": "da3-base"}, "x")


@pytest.mark.parametrize("model", sorted(MODELS))
def test_specs_of_all_models(model: str, contract: Contracts) -> None:
    size = MODELS[model]
    config = parse_config(Config, {"model": model, "weights": "random", "process_size": [252, 224]}, "x")
    assert Encoder(config, contract()).spec.row_shape == (2, 18 * 16, size.width)
    both = config.model_copy(update={"tap": "features.both"})
    assert Encoder(both, contract()).spec.dim == 2 * size.width


def test_licences_of_published_weights(contract: Contracts) -> None:
    found = {model: Encoder(Config(model=model, weights="x/y"), contract()).license for model in MODELS}
    assert found["da3-small"] == found["da3-base"] == "Apache-2.0"
    assert "CC BY-NC 4.0" in found["da3-large-1.1"]
    assert "CC BY-NC 4.0" in found["da3-giant-1.1"]


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"tiny"}))
def test_table_equals_the_packages_registry(model: str) -> None:
    package_classes()
    from depth_anything_3.model.dinov2 import vision_transformer
    from depth_anything_3.registry import MODEL_REGISTRY

    size = MODELS[model]
    written = yaml.safe_load(Path(MODEL_REGISTRY[size.model_name]).read_text())
    net, head = written["net"], written["head"]
    assert head["dim_in"] == 2 * size.width
    assert head["output_dim"] == 2
    assert (head["features"], tuple(head["out_channels"])) == (size.head_features, size.head_channels)
    prefixes = {f"model.{part}." for part, settings in written.items() if isinstance(settings, dict)}
    assert prefixes - {"model.__object__."} == {"model.net.", "model.head.", *size.other_parts}
    assert net["name"] == size.vit
    assert tuple(net["out_layers"]) == size.out_layers
    assert size.last_block == size.blocks - 1
    assert net["alt_start"] == net["qknorm_start"] == net["rope_start"] == size.cross_view_from
    assert net["cat_token"] is True
    builder = {"vits": "vit_small", "vitb": "vit_base", "vitl": "vit_large", "vitg": "vit_giant2"}[size.vit]
    assert {size.width, size.blocks} <= set(getattr(vision_transformer, builder).__code__.co_consts) | set(
        getattr(vision_transformer, builder).__defaults__
    )


def test_importing_the_package_leaves_no_resolver_and_prints_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from omegaconf import OmegaConf

    build_backbone("tiny", 0)
    assert not OmegaConf.has_resolver("eval")
    assert capsys.readouterr().out == ""
    loaded_parts = [name for name in sys.modules if re.match(r"depth_anything_3\.(api|cli|app|services|bench)", name)]
    assert loaded_parts == []


def test_missing_package_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, contract: Contracts) -> None:
    encoder = Encoder(Config(), contract())  # the spec needs no package
    for name in [name for name in sys.modules if name.split(".")[0] == "depth_anything_3"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "depth_anything_3", None)
    with pytest.raises(MissingDependency) as caught:
        encoder.load("cpu")
    assert "pip install --no-deps depth-anything-3==0.1.1" in caught.value.fix
    assert "geomcache[encoders]" in caught.value.fix


def test_another_package_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    monkeypatch.setitem(MODELS, "tiny", dataclasses.replace(MODELS["tiny"], blocks=7))
    real: Any = package_classes()[0]
    monkeypatch.setattr(_da3_package, "package_classes", lambda: (lambda **k: real(**{**k, "depth": 6}), None, None))
    with pytest.raises(InputError, match="builds another tiny"):
        build_backbone("tiny", 0)


@pytest.mark.parametrize("size", [(224, 220), (0, 224), (-14, 224)])
def test_process_size_is_whole_patches(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="a multiple of 14 pixels") as caught:
        parse_config(Config, {"process_size": list(size)}, "encoder depth_anything3")
    assert "process_size" in caught.value.what


def test_a_device_that_is_not_there(contract: Contracts) -> None:
    with pytest.raises(InputError, match="device cuda:99 cannot be used"):
        Encoder(Config(), contract()).load("cuda:99")
    with pytest.raises(InputError, match="device gpu cannot be used"):
        Encoder(Config(), contract()).load("gpu")


def test_must_be_loaded_first(contract: Contracts, frames: Frames) -> None:
    with pytest.raises(AssertionError, match="load"):
        Encoder(Config(batch_size=1), contract()).encode(frames(1))
