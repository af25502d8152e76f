"""Loading Depth-Anything-3 checkpoints: round trips, and every way in which a file can be wrong, by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.pipeline.encoders._checkpoints import checkpoint_folder, module_digest
from geomcache.pipeline.encoders._da3_package import build_backbone, build_head
from geomcache.pipeline.encoders.depth_anything3 import Config, Encoder
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.tokens import token_recipe

Contracts = Callable[..., Contract]
Frames = Callable[..., FrameBatch]
State = dict[str, torch.Tensor]


def write_checkpoint(folder: Path, model_name: str, state: State) -> Path:
    """A folder in the format of ``DepthAnything3.save_pretrained``."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_name": model_name}))
    save_file(state, folder / "model.safetensors")
    return folder


def tiny_state(seed: int = 5) -> State:
    backbone = {f"model.backbone.{name}": value for name, value in build_backbone("tiny", seed).state_dict().items()}
    return {**backbone, "model.head.norm.weight": torch.ones(3), "model.cam_dec.fc_t.bias": torch.ones(3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny", "tiny", tiny_state())


def load(contract: Contract, folder: Path, **settings: object) -> Encoder:
    encoder = Encoder(Config.model_validate({"weights": str(folder), **settings}), contract)
    encoder.load("cpu")
    return encoder


def test_tiny_folder_gives_the_saved_weights(folder: Path, contract: Contracts, frames: Frames) -> None:
    config = Config(seed=5, batch_size=1, process_size=(56, 56))
    original = Encoder(config, contract())
    original.load("cpu")
    again = load(contract(), folder, batch_size=1, process_size=(56, 56))
    assert again.weights_digest() == original.weights_digest()
    assert torch.equal(again.encode(frames(1)), original.encode(frames(1)))
    assert str(folder) in again.description
    assert "RANDOM" not in again.description


def test_the_place_of_the_weights_is_not_in_the_fingerprint(tmp_path: Path, contract: Contracts) -> None:
    ids = set()
    for name, seed in (("here", 5), ("there", 5), ("other", 6)):
        where = write_checkpoint(tmp_path / name, "tiny", tiny_state(seed))
        ids.add(token_recipe(load(contract(), where), contract(), "pack").fingerprint.cache_id)
    assert len(ids) == 2


def test_real_small_net_saved_whole_loads(tmp_path: Path, contract: Contracts) -> None:
    """A random da3-small of the package with all its parts, its shared LayerNorm stored once, as its own save
    does.

    ``DepthAnything3.save_pretrained`` is the hub mixin: safetensors' ``save_model`` of the api object, whose
    net is its attribute ``model``. The api module itself wants packages that the net does not need.
    """
    build_backbone("tiny", 0)  # imports the package without its side effects
    from depth_anything_3.model.cam_dec import CameraDec
    from depth_anything_3.model.cam_enc import CameraEnc
    from depth_anything_3.model.da3 import DepthAnything3Net

    backbone, head = build_backbone("da3-small", 3), build_head("da3-small", 4)
    api = torch.nn.Module()
    api.model = DepthAnything3Net(
        backbone,
        head,
        cam_dec=CameraDec(dim_in=768),
        cam_enc=CameraEnc(dim_out=384),
    )
    where = tmp_path / "small"
    where.mkdir()
    (where / "config.json").write_text('{"model_name": "da3-small"}')
    save_model(api, str(where / "model.safetensors"))
    stored = set(load_file(where / "model.safetensors"))
    missing = set(api.state_dict()) - stored
    assert (len(stored), len(missing)) == (437, 6)
    assert all(name.startswith("model.head.scratch.output_conv2_aux.") for name in missing)

    encoder = load(contract(), where, model="da3-small")
    assert encoder.weights_digest() == module_digest(backbone)
    assert encoder.license == "Apache-2.0"
    rays = load(contract(), where, model="da3-small", tap="ray")
    assert rays.weights_digest() == module_digest(torch.nn.ModuleDict({"backbone": backbone, "head": head}))


class TestHead:
    """Checkpoints of the tiny model with its whole head, as ``save_model`` writes them: tied names once."""

    @pytest.fixture
    def whole(self, tmp_path: Path) -> Path:
        net = torch.nn.Module()
        net.backbone, net.head = build_backbone("tiny", 5), build_head("tiny", 5)
        folder = write_checkpoint(tmp_path / "whole", "tiny", {})
        save_model(torch.nn.ModuleDict({"model": net}), str(folder / "model.safetensors"))
        return folder

    @staticmethod
    def rewrite(folder: Path, change: Callable[[State], None]) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        write_checkpoint(folder, "tiny", state)

    def test_gives_the_saved_weights(self, whole: Path, contract: Contracts, frames: Frames) -> None:
        stored = [name for name in load_file(whole / "model.safetensors") if name.endswith("output_conv2_aux.0.2.bias")]
        assert len(stored) == 1
        saved = Encoder(Config(seed=5, tap="depth.ray", batch_size=1, process_size=(56, 56)), contract())
        saved.load("cpu")
        again = load(contract(), whole, tap="depth.ray", batch_size=1, process_size=(56, 56))
        assert again.weights_digest() == saved.weights_digest()
        assert torch.equal(again.encode(frames(1)), saved.encode(frames(1)))

    @pytest.mark.parametrize("name", ["scratch.output_conv2_aux.3.0.bias", "norm.weight", "projects.0.bias"])
    def test_no_other_key_may_be_missing(self, whole: Path, contract: Contracts, name: str) -> None:
        self.rewrite(whole, lambda state: state.__delitem__(f"model.head.{name}"))
        with pytest.raises(InputError, match="lacks 1 key") as caught:
            load(contract(), whole, tap="ray")
        assert caught.value.found == f"model.head.{name}"
        load(contract(), whole)  # features need no head

    def test_a_shared_norm_must_be_there_once(self, whole: Path, contract: Contracts) -> None:
        self.rewrite(whole, lambda state: state.__delitem__("model.head.scratch.output_conv2_aux.0.2.bias"))
        with pytest.raises(InputError, match="lacks 4 keys") as caught:
            load(contract(), whole, tap="ray")
        assert "output_conv2_aux.3.2.bias" in caught.value.found

    def test_a_shared_norm_may_be_there_twice_if_it_is_the_same(self, whole: Path, contract: Contracts) -> None:
        first, third = (f"model.head.scratch.output_conv2_aux.{level}.2.weight" for level in (0, 2))
        before = load(contract(), whole, tap="ray").weights_digest()
        self.rewrite(whole, lambda state: state.update({third: state[first].clone()}))
        assert load(contract(), whole, tap="ray").weights_digest() == before
        self.rewrite(whole, lambda state: state.update({third: state[first] + 1}))
        with pytest.raises(InputError, match="has another value of a shared tensor under 1 key") as caught:
            load(contract(), whole, tap="ray")
        assert caught.value.found == third

    def test_an_unexpected_key_of_the_head_is_named(self, whole: Path, contract: Contracts) -> None:
        self.rewrite(whole, lambda state: state.update({"model.head.extra": torch.ones(1)}))
        with pytest.raises(InputError, match="has unexpected 1 key"):
            load(contract(), whole, tap="ray")


def test_half_precision_files_load_into_float32(tmp_path: Path, contract: Contracts) -> None:
    half = {name: value.to(torch.bfloat16) for name, value in tiny_state().items()}
    encoder = load(contract(), write_checkpoint(tmp_path / "half", "tiny", half))
    again = load(contract(), write_checkpoint(tmp_path / "full", "tiny", {k: v.float() for k, v in half.items()}))
    assert encoder.weights_digest() == again.weights_digest()


def test_a_missing_key_is_named(folder: Path, contract: Contracts) -> None:
    state = tiny_state()
    del state["model.backbone.pretrained.norm.bias"]
    write_checkpoint(folder, "tiny", state)
    with pytest.raises(InputError, match="lacks 1 key") as caught:
        load(contract(), folder)
    assert caught.value.found == "model.backbone.pretrained.norm.bias"


@pytest.mark.parametrize(
    "key", ["model.backbone.pretrained.extra", "pretrained.norm.bias", "model.gs_head.w", "model.header.w"]
)
def test_an_unexpected_key_is_named(folder: Path, contract: Contracts, key: str) -> None:
    write_checkpoint(folder, "tiny", {**tiny_state(), key: torch.ones(1)})
    with pytest.raises(InputError, match="has unexpected 1 key") as caught:
        load(contract(), folder)
    assert caught.value.found == key


def test_a_misshapen_tensor_is_named(folder: Path, contract: Contracts) -> None:
    write_checkpoint(folder, "tiny", {**tiny_state(), "model.backbone.pretrained.norm.bias": torch.ones(65)})
    with pytest.raises(InputError, match=r"norm\.bias \[65\] \(expected \[64\]\)"):
        load(contract(), folder)


def test_many_wrong_keys_are_counted(folder: Path, contract: Contracts) -> None:
    write_checkpoint(folder, "tiny", {"model.head.w": torch.ones(1)})
    with pytest.raises(InputError, match=r"and \d+ more"):
        load(contract(), folder)


def test_another_model_is_refused_before_its_tensors_are_read(folder: Path, contract: Contracts) -> None:
    with pytest.raises(InputError, match="is of another model") as caught:
        load(contract(), folder, model="da3-small")
    assert '"da3-small"' in caught.value.expected
    assert '"tiny"' in caught.value.found


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff"])
def test_config_json_that_says_nothing(folder: Path, contract: Contracts, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        load(contract(), folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_a_truncated_file_is_named(folder: Path, contract: Contracts, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="cannot be read") as caught:
        load(contract(), folder)
    assert str(path) in caught.value.what


def test_a_file_a_missing_folder_and_an_incomplete_one(folder: Path, contract: Contracts) -> None:
    with pytest.raises(InputError, match="is a file"):
        load(contract(), folder / "model.safetensors")
    with pytest.raises(InputError, match="there is no weights folder"):
        load(contract(), folder / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load(contract(), folder)


def test_nothing_is_read_before_load(contract: Contracts) -> None:
    assert Encoder(Config(weights="/nowhere/at/all"), contract()).spec.dim == 64


class TestHub:
    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty hub cache and no network."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return tmp_path / "hub"

    def test_files_already_downloaded_are_used_without_network(self, cache: Path, contract: Contracts) -> None:
        model = cache / "models--owner--tiny"
        (model / "snapshots").mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("a" * 40)
        snapshot = write_checkpoint(model / "snapshots" / ("a" * 40), "tiny", tiny_state())
        assert checkpoint_folder("owner/tiny") == snapshot
        encoder = Encoder(Config(weights="owner/tiny"), contract())
        encoder.load("cpu")
        assert encoder.weights_digest() == module_digest(build_backbone("tiny", 5))

    @pytest.mark.usefixtures("cache")
    def test_what_cannot_be_had_is_named_with_a_way_out(self) -> None:
        with pytest.raises(InputError, match="weights owner/name cannot be had") as caught:
            checkpoint_folder("owner/name")
        assert "hf download owner/name" in caught.value.fix

    @pytest.mark.usefixtures("cache")
    @pytest.mark.parametrize("weights", ["owner/na--me", "no-slash", "a/b/c", "../up", ""])
    def test_names_that_are_no_hub_ids(self, weights: str) -> None:
        with pytest.raises(GeomcacheError):
            checkpoint_folder(weights)
