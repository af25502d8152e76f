"""What is painted of which tap, in which colours, and films: frames in their places, upright, in the colours of all."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from geomcache.cache_schemas.contract import CameraContract, Contract
from geomcache.cache_schemas.errors import CacheStale, InputError, MissingDependency
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store import token_video
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.token_paint import PanelPaint, holds_points, paints_of, panels_of
from geomcache.pipeline.store.token_picture import strip_picture, tokens_picture
from geomcache.pipeline.store.token_video import episode_video, write_video
from geomcache.pipeline.tokens import build_encoder
from tests.conftest import build_pack_at, extract_without_ray, nothing, write_demo_file

CONTRACT = Contract(
    image_orientation="upright",
    cameras=tuple(CameraContract(name=name, height=28, width=28) for name in ("front", "wrist")),
    has_depth=True,
)
ALL = "xyz.normals.visibility.confidence"


def spec_of(tap: str, dim: int, **changes: Any) -> TokenSpec:
    fixed = {"encoder": "x", "cameras": ("front", "wrist"), "grid": (2, 3), "image_size": (28, 28)}
    return TokenSpec.model_validate({**fixed, "encoder_batch_size": 1, "tap": tap, "dim": dim, **changes})


def named(tap: str, dim: int) -> list[tuple[str, int, int]]:
    return [(panel.name, panel.channels.start, panel.channels.stop) for panel in panels_of(tap, dim)]


def test_known_taps_are_drawn_channel_by_channel_and_others_as_pca() -> None:
    points = [("height", 2, 3), ("normals", 3, 6), ("visibility", 6, 7), ("confidence", 7, 8)]
    assert named(ALL, 8) == points
    assert named("xyz", 3) == points[:1]
    assert named("xyz.confidence", 4) == [points[0], ("confidence", 3, 4)]
    ray = [("ray direction", 0, 3), ("ray origin", 3, 6), ("ray confidence", 6, 7)]
    assert named("ray", 7) == ray
    assert named("depth", 2) == [("depth", 0, 1), ("depth confidence", 1, 2)]
    assert named("depth.ray", 9) == [*named("depth", 2), *[(name, a + 2, b + 2) for name, a, b in ray]]
    for tap, dim in (("features.global", 64), ("xyz", 4), ("ray", 6), ("depth.other", 3), ("", 2)):
        assert named(tap, dim) == [("PCA", 0, dim)]
        assert not holds_points(tap, dim)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("oracle_pointmap", {"channels": ALL.split(".")}),
        ("depth_anything3", {"tap": "ray"}),
        ("depth_anything3", {"tap": "depth"}),
        ("depth_anything3", {"tap": "depth.ray"}),
    ],
)
def test_taps_are_named_as_the_encoders_name_them(name: str, settings: dict[str, Any]) -> None:
    spec = build_encoder(name, settings, CONTRACT, None).spec
    panels = panels_of(spec.tap, spec.dim)
    assert len(panels) > 1
    assert panels[-1].channels.stop == spec.dim


def test_colours_mean_what_the_scale_says() -> None:
    def paint(tap: str, dim: int, panel: int, tokens: list[list[float]]) -> NDArray[np.float64]:
        values = np.array(tokens, np.float32)
        return np.round(PanelPaint(panels_of(tap, dim)[panel], values)(values), 2)

    nan = float("nan")
    up, away, none = [0.0, 0, 0, 0, 0, 1], [0.0, 0, 0, 1, 0, 0], [0.0] * 6
    assert paint("xyz.normals", 6, 1, [up, away, none, [nan] * 6]).tolist() == [
        [0.5, 0.5, 1.0],
        [1.0, 0.5, 0.5],
        [0.5, 0.5, 0.5],
        [0.6, 0.6, 0.6],
    ]
    long = [[0.0, 0, 5, 0, 0, 0, 1], [0.0, 0, 0.1, 0, 0, 0, 1]]
    assert paint("ray", 7, 0, long).tolist() == [[0.5, 0.5, 1.0]] * 2  # of any length
    # A share has the same colour whatever stands beside it, a scalar is spread over what there is.
    share = [[0.0, 0, 0, value] for value in (0.0, 0.25, 1.0)]
    assert paint("xyz.visibility", 4, 1, share[:2]).tolist() == paint("xyz.visibility", 4, 1, share)[:2].tolist()
    depth = [[1.0 + step, 1.0] for step in range(99)]
    colours = paint("depth", 2, 0, [*depth, [1000.0, 1.0]])
    assert len(np.unique(colours, axis=0)) > 80  # one far value does not make the rest one colour
    assert (np.diff(colours.sum(axis=-1)) >= -0.05).all()  # brighter is farther
    (height,) = paints_of(spec_of("xyz", 3), np.array([[0, 0, -0.00001], [0, 0, 0.3]], np.float32))
    assert height.label == "height 0.006 to 0.294 m"


@pytest.mark.parametrize(("tap", "dim", "pooled"), [(ALL, 8, False), ("depth.ray", 9, True)])
def test_every_panel_is_in_the_picture(tap: str, dim: int, pooled: bool) -> None:
    spec = spec_of(tap, dim, **({"pooled_to": 4} if pooled else {}))
    tokens = np.random.default_rng(0).uniform(size=(2, *spec.row_shape, dim)[:-1]).astype(np.float32)
    tokens[:, 0, 1] = np.nan
    images = np.full((2, 2, 28, 28, 3), 90, np.uint8)
    if pooled:
        shown, png = tokens[0], tokens_picture(spec, tokens[0], images[0], "title")
    else:
        shown, png = tokens, strip_picture(spec, tokens, images, ["a", "b"], "title")
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3).astype(int)
    found, counts = np.unique(picture, axis=0, return_counts=True)
    found = found[counts > 200]
    assert len(paints_of(spec, shown)) == len(panels_of(tap, dim)) > 3
    for paint in paints_of(spec, shown):
        for colour in 255 * paint(shown).reshape(-1, 3):
            assert np.abs(found - colour).max(axis=-1).min() < 2, paint.panel


def decoded(path: Path) -> tuple[NDArray[np.uint8], Fraction, str]:
    """Pictures [N, H, W, 3], rate, codec."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        pictures = np.stack(frames).astype(np.uint8)
        assert stream.codec_context.pix_fmt == "yuv420p"
        return pictures, Fraction(str(stream.average_rate)), stream.codec_context.name


def likeness(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize("pool", [None, 4])
def test_a_film_shows_every_view_upright_above_its_tokens(pack_path: Path, tmp_path: Path, pool: int | None) -> None:
    cache_path = extract_without_ray(pack_path, "oracle_pointmap", tmp_path / "c", pool=pool, channels=ALL.split("."))
    seen: list[tuple[int, int]] = []
    with PackReader(pack_path) as pack, CachedTokens(cache_path) as cache:
        out = tmp_path / "film.mp4"
        written = episode_video(cache, pack, 1, out, every=3, progress=lambda *done: seen.append(done))
        pictures, rate, codec = decoded(out)
        first, rows = pack.episodes[1].first_row, pack.episodes[1].rows
        assert written == len(pictures) == 4 == -(-rows // 3)
        assert seen == [(n, 4) for n in range(1, 5)]
        assert (rate, codec) == (Fraction(20, 3), "h264")  # as fast as the robot moved
        assert pictures.shape[1] % 2 == pictures.shape[2] % 2 == 0
        top = token_video._Page(cache.spec, [], (28, 28))._tops[0] + token_video._LINE
        for number, picture in enumerate(pictures):
            images = pack.images([first + 3 * number])[0]
            for view in range(2):
                shown = picture[top : top + 256, 256 * view : 256 * (view + 1)]
                (small, turned, other) = (
                    np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR))
                    for image in (images[view], images[view, ::-1], images[1 - view])
                )
                assert likeness(shown, small) > 0.8
                assert abs(likeness(shown, turned)) < 0.4
                assert abs(likeness(shown, other)) < 0.4


def test_a_token_keeps_its_colour_through_the_film(pack_path: Path, tmp_path: Path) -> None:
    """The colours are those of the whole episode: equal tokens in the first and last frame look equal."""
    cache_path = extract_without_ray(pack_path, "oracle_pointmap", tmp_path / "c")
    out = tmp_path / "film.mp4"
    with PackReader(pack_path) as pack, CachedTokens(cache_path) as cache:
        first, rows = pack.episodes[0].first_row, pack.episodes[0].rows
        tokens = cache.tokens(list(range(first, first + rows))).numpy()
        episode_video(cache, pack, 0, out, progress=nothing)
        (paint,) = paints_of(cache.spec, tokens)
        page = token_video._Page(cache.spec, [paint], (28, 28))
        pictures, _, _ = decoded(out)
        top = page._tops[1] + token_video._LINE
        for picture, tokens_VGD in zip(pictures, tokens, strict=True):
            for view in range(2):
                shown = picture[top + 32 : top + 256 : 64, 256 * view + 32 : 256 * (view + 1) : 64]  # 4 x 4 cells
                expected = 255 * paint(tokens_VGD[view]).reshape(4, 4, 3)
                assert np.abs(shown - expected).max() < 30  # chroma is halved and the codec is lossy


def test_a_film_that_fails_leaves_nothing(caches: dict[str, Path], pack_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "films" / "film.mp4"
    other = build_pack_at(write_demo_file(tmp_path / "x_demo.hdf5", seed=1), tmp_path / "pack")
    with CachedTokens(caches["oracle_pointmap"]) as cache, PackReader(pack_path) as pack, PackReader(other) as stranger:
        with pytest.raises(InputError, match="episode 3 is not in"):
            episode_video(cache, pack, 3, out, progress=nothing)
        with pytest.raises(CacheStale, match="another pack"):
            episode_video(cache, stranger, 0, out, progress=nothing)

        def stop(done: int, _: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            episode_video(cache, pack, 0, out, progress=stop)
    assert list(out.parent.iterdir()) == []


def test_an_ffmpeg_without_h264_writes_mpeg4_and_one_without_both_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [np.full((48, 64, 3), value, np.uint8) for value in (0, 120, 240)]
    (_, mpeg4) = token_video._CODECS
    monkeypatch.setattr(token_video, "_CODECS", (("no_such_codec", {}), mpeg4))
    write_video(tmp_path / "a.mp4", iter(pictures), Fraction(20, 3))
    found, rate, codec = decoded(tmp_path / "a.mp4")
    assert (rate, codec) == (Fraction(20, 3), "mpeg4")
    assert np.abs(found.astype(int) - np.stack(pictures)).max() < 12
    monkeypatch.setattr(token_video, "_CODECS", (("no_such_codec", {}),))
    with pytest.raises(MissingDependency, match="cannot write videos"):
        write_video(tmp_path / "b.mp4", iter(pictures), Fraction(20))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
