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
    """Training loss against steps, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    for name, lines in runs.items():
        axis.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=name, linewidth=1.2)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("flow-matching loss")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    pyplot.close(figure)
    return buffer.getvalue()
