"""Looking at a cache: statistics against numpy, faults named with their place, distances, pictures that hold true."""

import io
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import geomcache
from geomcache.cache_schemas.contract import CameraContract, Contract
from geomcache.cache_schemas.errors import CacheIncomplete, CacheStale, InputError
from geomcache.cache_schemas.fingerprint import Fingerprint
from geomcache.cache_schemas.layout import commit_path, shard_rows
from geomcache.cache_schemas.manifest import EncoderRecord, Manifest, TokenRecipe
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.channel_stats import QUANTILES, TokenStatistics, channel_stats
from geomcache.pipeline.store.diff import CacheDifference, cache_difference
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.statistics import shard_statistics
from geomcache.pipeline.store.stats_picture import stats_picture
from geomcache.pipeline.store.token_paint import PrincipalColours
from geomcache.pipeline.store.token_picture import (
    episode_picture,
    row_picture,
    strip_picture,
    tokens_picture,
)
from geomcache.pipeline.store.writer import commit_shard, create_or_open
from geomcache.pipeline.tokens import build_codec
from tests.conftest import build_pack_at, nothing, write_demo_file

GRID, DIM, ROWS, SHARD = (2, 3), 12, 83, 8  # eleven shards, the last one short
CAMERAS = ("front", "wrist")


def spec_of(**changes: Any) -> TokenSpec:
    values = {"encoder": "x", "tap": "y", "cameras": CAMERAS, "grid": GRID, "dim": DIM, "image_size": (28, 28)}
    return TokenSpec.model_validate({**values, "encoder_batch_size": 1, "codec": "fp32", **changes})


def write_cache(path: Path, tokens: NDArray[np.float32], *, weights: str = "w", pack: str = "p", **spec: Any) -> Path:
    """A cache that holds these very tokens, written as extraction writes it."""
    import torch

    made = spec_of(**spec)
    codec = build_codec(made)
    contract = Contract(
        image_orientation="upright",
        cameras=tuple(CameraContract(name=name, height=28, width=28) for name in CAMERAS),
        has_depth=False,
    )
    manifest = Manifest(
        recipe=TokenRecipe(
            spec=made,
            contract=contract,
            fingerprint=Fingerprint(encoder_config="c", weights=weights, image_path="1", pack=pack),
            encoder=EncoderRecord(name="x", config={"model": weights}, license="none"),
        ),
        rows=len(tokens),
        rows_per_shard=SHARD,
        arrays=codec.arrays(),
        geomcache_version=geomcache.__version__,
    )
    create_or_open(path, manifest, "card")
    for shard in range(manifest.shards):
        given = torch.from_numpy(tokens[list(shard_rows(shard, len(tokens), SHARD))])
        arrays = codec.encode(given)
        commit_shard(path, manifest, shard, arrays, statistics=shard_statistics(codec, given, arrays), seconds={})
    return path


@pytest.fixture
def tokens() -> NDArray[np.float32]:
    """[83, 2, 6, 12], every row and token another one."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, 2, 6, DIM)).astype(np.float32)


def look(path: Path, rows: int = 1000) -> TokenStatistics:
    with CachedTokens(path, partial=True) as cache:
        return channel_stats(cache, rows, nothing)


def compare(a: Path, b: Path, rows: int = 1000) -> CacheDifference:
    return cache_difference(a, b, rows, nothing)


def test_statistics_are_numpys(tokens: NDArray[np.float32], tmp_path: Path) -> None:
    tokens[..., 5] = 300.0 + 0.01 * tokens[..., 5]  # E[x^2] - E[x]^2 in float32 would give nonsense here
    found = look(write_cache(tmp_path / "c", tokens))
    exact = tokens.astype(np.float64).reshape(-1, DIM)
    for name, expected in {
        "mean": exact.mean(0),
        "std": exact.std(0),
        "min": exact.min(0),
        "max": exact.max(0),
    }.items():
        np.testing.assert_allclose(getattr(found.channels, name), expected, rtol=2e-5, atol=1e-9, err_msg=name)
    norms = np.sqrt((tokens.astype(np.float64) ** 2).sum(-1))
    for view, name in enumerate(CAMERAS):
        assert found.norms[view].view == name
        np.testing.assert_allclose(found.norms[view].quantiles, np.quantile(norms[:, view], QUANTILES), rtol=1e-5)
        np.testing.assert_allclose(found.norms[view].grid, norms[:, view].mean(0).reshape(GRID), rtol=1e-5)
        assert sum(found.norms[view].histogram) == ROWS * 6
    assert found.sampled_rows == ROWS
    assert TokenStatistics.parse(found.model_dump_json(), "x", InputError) == found


def test_a_small_sample_still_sees_every_shard(tokens: NDArray[np.float32], tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c", tokens)
    assert look(path, 21).sampled_rows == 2 * 10 + 1  # the last shard holds 3 rows
    assert [shard.shard for shard in look(path, 1).drift] == list(range(11))
    (path / commit_path(2)).unlink()
    assert [shard.shard for shard in look(path, 1).drift] == [0, 1, *range(3, 11)]
    shutil.rmtree(path / "commits")
    with pytest.raises(CacheIncomplete, match="holds no shard yet"):
        look(path)


def test_ordinary_tokens_give_no_findings(tokens: NDArray[np.float32], tmp_path: Path) -> None:
    assert look(write_cache(tmp_path / "c", tokens)).findings() == []


def test_each_fault_is_named_with_its_place(tokens: NDArray[np.float32], tmp_path: Path) -> None:
    tokens[..., 7] = 60.0 + tokens[..., 7]  # massive
    tokens[16:24] *= 1.5  # shard 2
    tokens[..., 3] = 0.25  # never changes
    tokens[30, 1, 4, 2] = np.nan
    tokens[31, 0, 0] = np.inf
    tokens[9] = tokens[9, 0, 0]  # one token everywhere
    tokens[40] = tokens[5]
    found = look(write_cache(tmp_path / "c", tokens))
    assert (found.non_finite, found.non_finite_rows) == (1 + DIM, (30, 31))
    assert found.non_finite_share == pytest.approx((1 + DIM) / tokens.size)
    assert (found.dead_rows, found.repeated_rows, found.constant_channels) == ((9,), ((40, 5),), (3,))
    assert [one.channel for one in found.massive_channels] == [7]
    finite = tokens[np.isfinite(tokens).all(-1)].astype(np.float64)
    size = np.sqrt((finite**2).mean(0))
    assert found.massive_channels[0].times_median == pytest.approx(size[7] / np.median(size), rel=0.02)
    assert [shard.shard for shard in found.drifting] == [2]
    text = "\n".join(found.findings())
    for said in ("30, 31", "9", "40 = 5", "such as 2:", "such as 3", "such as 7: 6"):
        assert said in text
    np.testing.assert_allclose(found.channels.max, finite.max(0), rtol=1e-5)  # what is not finite is left out


def test_a_view_without_finite_tokens_and_a_cache_without_any(tokens: NDArray[np.float32], tmp_path: Path) -> None:
    tokens[:, 1] = np.nan
    found = look(write_cache(tmp_path / "half", tokens))
    assert found.norms[1].quantiles == ()
    assert found.norms[1].grid == ((None,) * 3,) * 2
    opened(stats_picture(found))
    with pytest.raises(InputError, match="no token"):
        look(write_cache(tmp_path / "none", np.full_like(tokens, np.nan)))


@pytest.mark.parametrize("value", [0.0, 1.0, 3e38])
def test_a_dead_encoder_is_named_and_can_be_drawn(value: float, tmp_path: Path) -> None:
    dead = look(write_cache(tmp_path / "c", np.full((ROWS, 2, 6, DIM), value, dtype=np.float32)))
    assert dead.dead_row_count == ROWS
    assert dead.repeated_row_count == ROWS - 1
    assert len(dead.constant_channels) == DIM
    assert (dead.massive_channels, dead.drifting) == ((), [])
    opened(stats_picture(dead))


def test_pooled_tokens_have_no_heat_map(tokens: NDArray[np.float32], tmp_path: Path) -> None:
    found = look(write_cache(tmp_path / "c", tokens[:, :1, :4], pooled_to=4))
    assert [(view.view, view.grid) for view in found.norms] == [("pooled", None)]
    assert sum(found.norms[0].histogram) == ROWS * 4
    opened(stats_picture(found))


def test_equal_caches_are_equal_and_one_bit_is_a_difference(tokens: NDArray[np.float32], tmp_path: Path) -> None:
    a, again = write_cache(tmp_path / "a", tokens), write_cache(tmp_path / "again", tokens)
    assert compare(a, again).equal
    assert compare(a, again, rows=0).equal
    tokens[20, 0, 0, 0] = np.nextafter(tokens[20, 0, 0, 0], np.float32(9))
    b = write_cache(tmp_path / "b", tokens)
    found = compare(a, b)
    assert not found.equal
    assert found.parts == {}
    assert (found.equal_shards, found.shards) == (10, 11)
    assert found.tokens is not None
    assert (found.tokens.rows, found.tokens.equal_rows, found.tokens.worst_row) == (ROWS, ROWS - 1, 20)
    unseen = compare(a, b, rows=2)  # first and last row: the digests know all the same
    assert unseen.tokens is not None
    assert unseen.tokens.equal_rows == 2
    assert not unseen.equal


def test_distances_are_numpys(tokens: NDArray[np.float32], tmp_path: Path) -> None:
    tokens[..., 5] = 300.0 + tokens[..., 5]
    tokens[..., 6] = 1.0  # does not vary: no part of the normalised distance
    noise = np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)
    other = tokens + noise * np.linspace(0, 0.1, ROWS, dtype=np.float32)[:, None, None, None]
    other[7, 0, 0, 0] = np.nan
    found = compare(write_cache(tmp_path / "a", tokens), write_cache(tmp_path / "b", other, weights="v"))
    assert set(found.parts) == {"encoder", "fingerprint"}
    assert found.parts["encoder"] == ("config.model: 'w' != 'v'",)
    apart = other.astype(np.float64) - tokens
    varies = [channel for channel in range(DIM) if channel != 6]
    relative = np.nanmean(apart**2, axis=(0, 1, 2)) / tokens.astype(np.float64).var(axis=(0, 1, 2)).clip(1e-30)
    assert found.tokens is not None
    assert found.tokens.max_abs == pytest.approx(np.nanmax(np.abs(apart)))
    assert found.tokens.rms == pytest.approx(np.sqrt(np.nanmean(apart**2)))
    assert found.tokens.normalised_rms == pytest.approx(np.sqrt(relative[varies].mean()), rel=1e-4)
    assert found.tokens.worst_row == np.nanmean(apart**2, axis=(1, 2, 3)).argmax()
    assert found.tokens.finite_in_one == 1
    assert found.tokens.equal_rows == 1


def test_another_codec_pack_shape_or_statistics_are_told_part_by_part(
    tokens: NDArray[np.float32], tmp_path: Path
) -> None:
    a = write_cache(tmp_path / "a", tokens)
    rounded = compare(a, write_cache(tmp_path / "b", tokens, codec="bf16", pack="q"))
    assert set(rounded.parts) == {"spec", "pack", "storage"}
    assert rounded.parts["pack"] == ("pack: 'p' != 'q'",)
    assert rounded.equal_shards is None
    assert rounded.tokens is not None
    assert 0 < rounded.tokens.max_abs <= np.abs(tokens).max() * 2**-8
    fewer = compare(a, write_cache(tmp_path / "few", tokens[:20]))
    assert fewer.parts == {"rows": (f"rows: {ROWS} != 20",)}
    assert fewer.tokens is not None
    assert (fewer.tokens.rows, fewer.tokens.equal_rows) == (20, 20)
    pooled = compare(a, write_cache(tmp_path / "pooled", tokens[:, :1, :4], pooled_to=4))
    assert pooled.tokens is None
    assert "other shapes" in str(pooled.not_compared)
    ways = [{"mean": [mean] * 20, "std": [1.0] * 20, "rows": 4} for mean in (0.0, 0.5)]
    wide = np.concatenate([tokens, tokens[..., :8]], axis=-1)
    caches = [
        write_cache(tmp_path / str(n), wide, dim=20, codec="int8", channel_statistics=way) for n, way in enumerate(ways)
    ]
    (line,) = compare(*caches).parts["spec"]
    assert line == "channel_statistics.mean: 20 of 20 values differ"
    without = write_cache(tmp_path / "bf16", wide, dim=20, codec="bf16")
    assert [len(line) < 200 for line in compare(without, caches[0]).parts["spec"]] == [True, True]


def test_unfinished_caches_are_compared_where_both_have_rows(tokens: NDArray[np.float32], tmp_path: Path) -> None:
    a, b = write_cache(tmp_path / "a", tokens), write_cache(tmp_path / "b", tokens)
    (b / commit_path(1)).unlink()
    found = compare(a, b)
    assert found.tokens is not None
    assert (found.tokens.rows, found.equal_shards, found.equal) == (ROWS - SHARD, 10, False)


def test_colours_mean_the_same_everywhere_and_broken_tokens_are_grey(tokens: NDArray[np.float32]) -> None:
    groups = 9.0 * np.array([[1.0] * DIM, [-1.0] * DIM, [1.0, -1.0] * 6, [1.0, 1.0, -1.0] * 4], dtype=np.float32)
    many = np.repeat(groups, 50, axis=0) + 0.01 * tokens.reshape(-1, DIM)[:200]
    colours = PrincipalColours.of(many)(many).reshape(4, 50, 3)
    assert colours.std(axis=1).max() < 0.01
    assert min(np.linalg.norm(a - b) for a, b in combinations(colours.mean(axis=1), 2)) > 0.3
    broken = many.copy()
    broken[10, 3] = np.nan
    paint = PrincipalColours.of(broken)
    assert paint(broken)[10].tolist() == [0.6] * 3
    assert np.isfinite(paint(broken)).all()
    for few in (many[:1], many[:2, :1], np.full((4, DIM), np.nan, np.float32)):
        assert PrincipalColours.of(few)(few).shape == (len(few), 3)


def opened(png: bytes) -> NDArray[np.uint8]:
    """[H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def places(picture: NDArray[np.uint8], colour: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean row and column of the pixels of one colour; there must be many."""
    found = np.argwhere((picture == colour).all(axis=-1))
    assert len(found) > 500, f"{colour} is not in the picture"
    row, column = found.mean(axis=0)
    return float(row), float(column)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("tap", ["xyz", "features"])
def test_a_strip_shows_every_frame_in_its_place(tap: str, pooled: bool) -> None:
    rng = np.random.default_rng(0)
    storage: dict[str, Any] = {"pooled_to": 4} if pooled else {}
    tokens = rng.normal(size=(3, 1, 4, 3) if pooled else (3, 2, 6, 3)).astype(np.float32)
    tokens[1, 0, 2] = np.nan
    flat = np.array([[[200, 10, 90 + 40 * n + 20 * v] for v in range(2)] for n in range(3)], dtype=np.uint8)
    images = np.broadcast_to(flat[:, :, None, None], (3, 2, 28, 28, 3)).copy()
    spec = spec_of(tap=tap, dim=3, **storage)
    picture = opened(strip_picture(spec, tokens, images, ["a", "b", "c"], "title"))
    where = np.array([[places(picture, flat[n, v]) for v in range(2)] for n in range(3)])
    assert (np.diff(where[:, :, 1], axis=0) > 50).all()  # moments run to the right
    assert (np.diff(where[:, :, 0], axis=1) > 50).all()  # views run down
    row = opened(tokens_picture(spec, tokens[1], images[1], "title"))
    assert all(places(row, flat[1, v]) for v in range(2))
    assert (row == 153).all(axis=-1).sum() > 200  # the broken token, grey
    opened(tokens_picture(spec, tokens[1]))
    opened(tokens_picture(spec, np.full_like(tokens[0], np.nan), images[0]))


def test_real_rows_and_episodes_are_drawn_and_a_wrong_pack_is_refused(
    caches: dict[str, Path], pack_path: Path, tmp_path: Path
) -> None:
    other = build_pack_at(write_demo_file(tmp_path / "x_demo.hdf5", seed=1), tmp_path / "pack")
    with PackReader(pack_path) as pack, PackReader(other) as stranger:
        for path in caches.values():
            with CachedTokens(path) as cache:
                with_frames, alone = opened(row_picture(cache, pack, 9)), opened(row_picture(cache, None, 9))
                assert with_frames.shape[1] > alone.shape[1]
                assert opened(episode_picture(cache, pack, 1)).shape[1] > with_frames.shape[1]
                with pytest.raises(CacheStale, match="made from another pack"):
                    row_picture(cache, stranger, 0)
                with pytest.raises(InputError, match="0 to 24"):
                    row_picture(cache, pack, 25)
                with pytest.raises(InputError, match="episode 3 is not in"):
                    episode_picture(cache, pack, 3)
