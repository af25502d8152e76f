"""Pictures for people: filmstrips and videos of rollouts, success charts, training curves; how a page holds them."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geomcache.pipeline.files import write_atomic
from geomcache.pipeline.store.token_video import write_video

_FILMSTRIP_FRAMES = 10
_GAP = 3  # pixels between frames
_WEBP_QUALITY = 85
_MARK, _HEADING, _AXIS = 34, 32, 22  # pixels of height in a success chart
COLOURS = 8  # --c0 to --c7 of the page's style


def filmstrip(frames: Sequence[NDArray[np.uint8]], path: Path) -> None:
    """Evenly chosen frames [V, H, W, 3] side by side, one line per view; the last frame is always there."""
    chosen = evenly(frames)
    views, height, width, _ = frames[0].shape
    strip = np.full((views * (height + _GAP) - _GAP, len(chosen) * (width + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for column, frame in enumerate(chosen):
        for view in range(views):
            top, left = view * (height + _GAP), column * (width + _GAP)
            strip[top : top + height, left : left + width] = frame[view]
    write_atomic(path, png(strip))


def evenly(frames: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Those that a filmstrip shows; a choice of them is the same again."""
    last = len(frames) - 1
    return [frames[n] for n in np.unique(np.linspace(0, last, min(len(frames), _FILMSTRIP_FRAMES)).astype(int))]


def video(frames: Sequence[NDArray[np.uint8]], path: Path, fps: int) -> None:
    """An MP4 (H.264 where PyAV's FFmpeg has it) of frames [V, H, W, 3], the views side by side; appears whole.

    Raises:
        MissingDependency: FFmpeg writes neither H.264 nor MPEG-4.
    """

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for frame in frames:
            page = np.concatenate(list(frame), axis=1)
            odd = [(0, size % 2) for size in page.shape[:2]]  # H.264 needs even sizes
            yield np.pad(page, [*odd, (0, 0)], mode="edge")

    write_video(path, pictures(), Fraction(fps))


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """A file inside a page."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def webp_uri(path: Path) -> str:
    """A picture for a page, at about a tenth of a PNG's bytes.

    Raises:
        OSError: it cannot be read.
    """
    buffer = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.convert("RGB").save(buffer, "WEBP", quality=_WEBP_QUALITY)
    except (SyntaxError, ValueError, Image.DecompressionBombError) as problem:  # Pillow's, of damaged files
        raise OSError(f"{path} is no picture") from problem
    return data_uri(buffer.getvalue(), "image/webp")


class Mark(NamedTuple):
    """A line of a success chart."""

    label: str
    successes: int
    episodes: int
    rate: float
    low: float
    high: float
    colour: int = 0  # of the page's style


def success_chart(groups: Sequence[tuple[str, Sequence[Mark]]]) -> str:
    """Success rates as dots on their intervals, from 0 to 100 %, under headings: inline SVG.

    Places across are percentages, so the chart fits a phone with its letters at full size; colours are those of the
    page's style, so it follows light and dark.
    """
    parts, y = [], 0
    for heading, marks in groups:
        y += _HEADING
        parts.append(f'<text class="heading" x="0" y="{y - 8}">{html.escape(heading)}</text>')
        for mark in marks:
            line, colour = y + 24, f"var(--c{mark.colour % COLOURS})"
            label = html.escape(mark.label)
            numbers = f"{mark.successes}/{mark.episodes} [{mark.low:.2f}, {mark.high:.2f}]"
            parts.append(
                f"<g><title>{label}: {numbers}</title>"
                f'<svg y="{y}" width="100%" height="18"><text x="0" y="14">{label}</text></svg>'
                f'<text class="halo" x="100%" y="{y + 14}" text-anchor="end">{numbers}</text>'
                f'<line x1="{mark.low:.2%}" x2="{mark.high:.2%}" y1="{line}" y2="{line}" stroke="{colour}" '
                f'stroke-width="3" stroke-linecap="round" opacity=".55"/>'
                f'<circle cx="{mark.rate:.2%}" cy="{line}" r="5" fill="{colour}"/></g>'
            )
            y += _MARK
    for share, anchor in ((0, "start"), (25, "middle"), (50, "middle"), (75, "middle"), (100, "end")):
        parts.insert(0, f'<line class="grid" x1="{share}%" x2="{share}%" y1="0" y2="{y + 4}"/>')
        parts.append(f'<text class="axis" x="{share}%" y="{y + 18}" text-anchor="{anchor}">{share} %</text>')
    return (
        f'<svg class="chart" role="img" aria-label="success with 95 % intervals" width="100%" height="{y + _AXIS}">'
        f'<svg x="1.5%" width="97%" overflow="visible">{"".join(parts)}</svg></svg>'
    )


def curves_picture(runs: Mapping[str, Sequence[dict[str, Any]]]) -> bytes:
    """The losses of metrics.jsonl against steps, a colour for each run: training and its running mean, validation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    for number, (name, lines) in enumerate(runs.items()):
        training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        validation = [(line["step"], line["validation"]["loss"]) for line in lines if "validation" in line]
        steps = [step for step, _ in training]
        color = f"C{number % 10}"
        axis.plot(steps, [loss for _, loss in training], color=color, linewidth=0.6, alpha=0.3)
        axis.plot(steps, _smoothed([loss for _, loss in training]), color=color, linewidth=1.4, label=_plain(name))
        if validation:
            axis.plot(
                *zip(*validation, strict=True), color=color, linewidth=1.2, linestyle=":", marker="o", markersize=3
            )
    axis.set_xlabel("optimiser step (dotted: held-out episodes, averaged weights)")
    axis.set_ylabel("flow-matching loss")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _plain(name: str) -> str:
    """A name as matplotlib shows it: no formulas between dollars, and no leading underscore, which hides it."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over the last twentieth of the values."""
    window = max(1, len(values) // 20)
    return [float(np.mean(values[max(0, i + 1 - window) : i + 1])) for i in range(len(values))]
