"""Pictures for people: filmstrips of rollouts, training curves. Written as PNG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geomcache.pipeline.files import write_atomic

_FILMSTRIP_FRAMES = 10
_GAP = 3  # pixels between frames


def filmstrip(frames: Sequence[NDArray[np.uint8]], path: Path) -> None:
    """Evenly chosen frames [V, H, W, 3] side by side, one line per view; the last frame is always there."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _FILMSTRIP_FRAMES)).astype(int))
    views, height, width, _ = frames[0].shape
    strip = np.full((views * (height + _GAP) - _GAP, len(chosen) * (width + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for column, number in enumerate(chosen):
        for view in range(views):
            top, left = view * (height + _GAP), column * (width + _GAP)
            strip[top : top + height, left : left + width] = frames[number][view]
    write_atomic(path, png(strip))


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


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
        axis.plot(steps, _smoothed([loss for _, loss in training]), color=color, linewidth=1.4, label=name)
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


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over the last twentieth of the values."""
    window = max(1, len(values) // 20)
    return [float(np.mean(values[max(0, i + 1 - window) : i + 1])) for i in range(len(values))]
