"""An episode as a film: every view's frames above its tokens, in the same colours from the first moment to the last.

Painted with numpy and PIL: drawing each moment as a figure takes a hundred times longer. H.264 needs even sizes.
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from geomcache.cache_schemas.errors import MissingDependency
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.files import atomic_writer
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.channel_stats import describe_tokens
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.statistics import even_rows, rows_in_blocks
from geomcache.pipeline.store.token_paint import PanelPaint, paints_of
from geomcache.pipeline.store.token_picture import episode_rows

_WIDTH = 256  # pixels of a view
_POOLED_HEIGHT = 40
_TEXT, _LINE = 12, 18  # pixels: letters, and a line of them
_COLOUR_ROWS = 64  # of an episode, evenly spread, that tell the colours
_CODECS = (("libx264", {"crf": "20"}), ("mpeg4", {"qscale": "3"}))  # the first that PyAV's FFmpeg was built with


def episode_video(
    cache: CachedTokens,
    pack: PackReader,
    episode: int,
    out: Path,
    *,
    every: int = 1,
    progress: Callable[[int, int], None],
) -> int:
    """Write one episode of the pack as an MP4 that plays at the robot's speed; returns its number of frames.

    Args:
        cache: made from ``pack``.
        pack: whose frames stand above the tokens.
        episode: of the pack.
        out: ends in .mp4; appears when it is whole.
        every: only each n-th row.
        progress: called with (frames written, frames in all).

    Raises:
        InputError: there is no such episode. CacheStale: the cache was made from another pack.
        CacheIncomplete, CacheDamaged, PackDamaged: a row cannot be read.
        MissingDependency: FFmpeg writes neither H.264 nor MPEG-4.
    """
    first, length = episode_rows(cache, pack, episode)
    rows = first + np.arange(0, length, every)
    colours = paints_of(cache.spec, cache.tokens((first + even_rows(length, _COLOUR_ROWS)).tolist()).numpy())
    rate, steps = pack.info.contract.control_rate_hz, pack.episodes[episode].steps
    page = _Page(cache.spec, colours, pack.images([first]).shape[2:4])
    head = f"{pack.episodes[episode].instruction}\n{describe_tokens(cache)}"

    def pictures() -> Iterator[NDArray[np.uint8]]:
        tokens = rows_in_blocks(cache.tokens, rows)
        for number, (row, tokens_VGD) in enumerate(zip(rows.tolist(), tokens, strict=True)):
            step = int(pack.step_of_row[row])
            text = f"{head}\nstep {step} of {steps}, {step / rate:.2f} s, row {row}"
            yield page.draw(pack.images([row])[0], tokens_VGD.numpy(), text)
            progress(number + 1, len(rows))

    write_video(out, pictures(), Fraction(rate, every * pack.info.steps_per_row))
    return len(rows)


def write_video(out: Path, pictures: Iterator[NDArray[np.uint8]], rate: Fraction) -> None:
    """MP4 of RGB pictures [H, W, 3] of one even size, ``rate`` a second, in H.264 where FFmpeg has it."""
    import av

    codec, options = _codec()
    with atomic_writer(out) as file, av.open(file, "w", format="mp4") as container:
        stream: Any = None
        for picture in pictures:
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _codec() -> tuple[str, dict[str, str]]:
    import av

    for name, options in _CODECS:
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name, options
    raise MissingDependency(
        "PyAV's FFmpeg cannot write videos",
        expected=" or ".join(name for name, _ in _CODECS),
        found="neither",
        fix="pip install --force-reinstall av, or --out strip.png",
    )


class _Page:
    """Where everything stands in a picture: three lines of text, then a column for each view."""

    def __init__(self, spec: TokenSpec, paints: Any, frame_hw: tuple[int, int]) -> None:
        self._spec, self._paints = spec, paints
        self._pooled = spec.pooled_to is not None
        self._frame_height = _even(_WIDTH * frame_hw[0] / frame_hw[1])
        token_height = _POOLED_HEIGHT if self._pooled else _even(_WIDTH * spec.grid[0] / spec.grid[1])
        self._tops = [3 * _LINE + 4]  # of the frames' names, then of each panel's
        for height in (self._frame_height, *[token_height] * len(paints)):
            self._tops.append(self._tops[-1] + _LINE + height)
        self._token_height = token_height
        self._font = ImageFont.load_default(_TEXT)
        self._width = _WIDTH * max(spec.views, 2)

    def draw(self, images_VHWC: NDArray[np.uint8], tokens_VGD: NDArray[np.float32], text: str) -> NDArray[np.uint8]:
        """[H, W, 3], of even height and width."""
        page = Image.new("RGB", (self._width, _even(self._tops[-1])), "white")
        pen = ImageDraw.Draw(page)
        for line, words in enumerate(text.split("\n")):
            room = (self._width - 8) / max(1.0, pen.textlength(words, self._font))
            font = self._font if room >= 1 else ImageFont.load_default(_TEXT * room)
            pen.text((4, 2 + line * _LINE), words, fill="black", font=font)
        for view, camera in enumerate(self._spec.cameras):
            self._put(page, pen, view, 0, camera, images_VHWC[view], (_WIDTH, self._frame_height))
        for number, paint in enumerate(self._paints, start=1):
            if self._pooled:
                size = (self._width, self._token_height)
                self._put(page, pen, 0, number, f"pooled: {paint.label}", _pixels(paint, tokens_VGD[:1]), size)
                continue
            for view in range(self._spec.views):
                tokens = tokens_VGD[view].reshape(*self._spec.grid, -1)
                self._put(page, pen, view, number, paint.label, _pixels(paint, tokens), (_WIDTH, self._token_height))
        return np.asarray(page)

    def _put(
        self, page: Any, pen: Any, view: int, line: int, name: str, picture: NDArray[np.uint8], size: tuple[int, int]
    ) -> None:
        left, top = view * _WIDTH, self._tops[line]
        pen.text((left + 4, top + 2), name, fill="black", font=self._font)
        way = Image.Resampling.BILINEAR if line == 0 else Image.Resampling.NEAREST
        page.paste(Image.fromarray(picture).resize(size, way), (left, top + _LINE))


def _pixels(paint: PanelPaint, tokens: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.asarray(np.rint(255.0 * paint(tokens)), dtype=np.uint8)


def _even(pixels: float) -> int:
    return max(2, 2 * round(pixels / 2))
