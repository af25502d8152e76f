"""Pictures for people: filmstrips of rollouts, frames beside their tokens, training curves. Written as PNG."""

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


def tokens_picture(
    images_VHWC: NDArray[np.uint8],
    tokens_VGD: NDArray[np.float32],
    grid: tuple[int, int],
    names: Sequence[str],
    *,
    points: bool,
) -> bytes:
    """Each view's frame beside its tokens on their grid.

    ``points``: tokens are metric XYZ in the robot base frame; their height and their top view are drawn. Otherwise
    the first three principal components over all views, as RGB.
    """
    columns = 3 if points else 2
    figure, axes = _figure(len(images_VHWC), columns, width=3.2 * columns, height=3.1 * len(images_VHWC))
    colours = None if points else _principal_colours(tokens_VGD)
    for view, image in enumerate(images_VHWC):
        axes[view][0].imshow(image)
        axes[view][0].set_title(names[view], fontsize=9)
        if colours is not None:
            axes[view][1].imshow(colours[view].reshape(*grid, 3))
            axes[view][1].set_title("tokens (PCA)", fontsize=9)
        else:
            height_map = axes[view][1].imshow(tokens_VGD[view, :, 2].reshape(grid), cmap="viridis")
            axes[view][1].set_title("height of each token (m)", fontsize=9)
            figure.colorbar(height_map, ax=axes[view][1], shrink=0.75)
            _top_view(axes[view][2], image, tokens_VGD[view], grid)
    for row in axes:
        for axis in row[:2]:
            axis.set_xticks([])
            axis.set_yticks([])
    return _finish(figure)


def curves_picture(runs: Mapping[str, Sequence[dict[str, Any]]]) -> bytes:
    """Training loss against steps, one line per run."""
    figure, axes = _figure(1, 1, width=6.4, height=3.4)
    axis = axes[0][0]
    for name, lines in runs.items():
        axis.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=name, linewidth=1.2)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("flow-matching loss")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return _finish(figure)


def _top_view(axis: Any, image: NDArray[np.uint8], points_G3: NDArray[np.float32], grid: tuple[int, int]) -> None:
    """The points from above, each in its pixel's colour; the robot's base is the origin, x points away from it."""
    rows = ((np.arange(grid[0]) + 0.5) * image.shape[0] / grid[0]).astype(int)
    columns = ((np.arange(grid[1]) + 0.5) * image.shape[1] / grid[1]).astype(int)
    colours = image[np.ix_(rows, columns)].reshape(-1, 3) / 255.0
    axis.scatter(points_G3[:, 1], points_G3[:, 0], c=colours, s=14)
    axis.set_title("from above", fontsize=9)
    axis.set_xlabel("y (m)", fontsize=8)
    axis.set_ylabel("x, away from the robot (m)", fontsize=8)
    axis.set_aspect("equal")
    axis.invert_xaxis()
    axis.tick_params(labelsize=7)


def _principal_colours(tokens_VGD: NDArray[np.float32]) -> NDArray[np.float64]:
    flat = tokens_VGD.reshape(-1, tokens_VGD.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    scores = centred @ directions[:3].T
    low, high = np.quantile(scores, 0.02, axis=0), np.quantile(scores, 0.98, axis=0)
    colours: NDArray[np.float64] = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours.reshape(*tokens_VGD.shape[:2], -1)


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def _finish(figure: Any) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    pyplot.close(figure)
    return buffer.getvalue()
