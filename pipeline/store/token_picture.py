"""Tokens of a row or of an episode as pictures for people, beside the frames they were made from.

Point tokens (tap "xyz") are drawn as height in metres, all others as RGB: their first three principal components over
everything in the picture, so that one colour means one thing in all of it. Tokens that are not finite are grey crosses.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.channel_stats import describe_tokens
from geomcache.pipeline.store.reader import CachedTokens, require_pack_of
from geomcache.pipeline.store.statistics import even_rows

_STRIP_FRAMES = 8
_BASIS_TOKENS = 1024  # as many, evenly chosen, tell the main directions; more would only take longer
_GREY = 0.6
_SIDE = 2.6  # inches of one picture in a row, and 1.5 in a strip
_STRIP_SIDE = 1.5


def row_picture(cache: CachedTokens, pack: PackReader | None, row: int) -> bytes:
    """PNG of one row: each view's frame beside its tokens; without a pack only the tokens.

    Raises:
        InputError: there is no such row. CacheStale: the cache was made from another pack.
        CacheIncomplete, CacheDamaged, PackDamaged: the row cannot be read.
    """
    title = f"row {row}"
    if pack is not None:
        require_pack_of(cache, pack)
    tokens_VGD = cache.tokens([row])[0].numpy()
    if pack is not None:
        episode = pack.episodes[int(pack.episode_of_row[row])]
        title = f"{_episode_title(pack, episode.episode)}, step {row - episode.first_row} of {episode.rows}, {title}"
    images = None if pack is None else pack.images([row])[0]
    return tokens_picture(cache.spec, tokens_VGD, images, f"{title}\n{describe_tokens(cache)}")


def episode_picture(cache: CachedTokens, pack: PackReader, episode: int) -> bytes:
    """PNG of one episode of the pack: evenly chosen frames, the first and the last among them, above their tokens.

    Raises:
        InputError: there is no such episode; otherwise as ``row_picture``.
    """
    require_pack_of(cache, pack)
    if not 0 <= episode < len(pack.episodes):
        raise InputError(
            f"episode {episode} is not in {pack.path}",
            expected=f"0 to {len(pack.episodes) - 1}",
            found=str(episode),
            fix=f"geomcache pack info {pack.path} says how many episodes there are",
        )
    first, length = pack.episodes[episode].first_row, pack.episodes[episode].rows
    steps = even_rows(length, _STRIP_FRAMES)
    rows = (first + steps).tolist()
    return strip_picture(
        cache.spec,
        cache.tokens(rows).numpy(),
        pack.images(rows),
        [f"step {step}\nrow {row}" for step, row in zip(steps, rows, strict=True)],
        f"{_episode_title(pack, episode)}, {length} steps\n{describe_tokens(cache)}",
    )


def tokens_picture(
    spec: TokenSpec,
    tokens_VGD: NDArray[np.float32],
    images_VHWC: NDArray[np.uint8] | None = None,
    title: str = "",
) -> bytes:
    """Each view's frame beside its tokens on their grid; points also from above. Pooled tokens: all in one line."""
    painter = _Painter(spec, tokens_VGD)
    views, shown = spec.views, images_VHWC is not None
    if spec.pooled_to is not None:
        columns = views if shown else 1
        figure = _figure(_SIDE * max(columns, 2), (_SIDE if shown else 0) + 1.5)
        grid = figure.add_gridspec(1 + shown, columns, height_ratios=[_SIDE, 0.7] if shown else [1])
        _draw_frames([figure.add_subplot(grid[0, view]) for view in range(views)] if shown else [], spec, images_VHWC)
        axis = figure.add_subplot(grid[-1, :])
        painter.draw(axis, tokens_VGD[0], painter.label)
        axis.set_xticks(range(0, spec.pooled_to, max(1, spec.pooled_to // 16)))
        axis.tick_params(labelsize=7)
        painter.draw_scale(figure, [axis])
    else:
        columns = shown + 1 + painter.points
        figure = _figure(_SIDE * columns + 0.6, _SIDE * views + 0.5)
        axes = figure.subplots(views, columns, squeeze=False)
        _draw_frames(axes[:, 0] if shown else [], spec, images_VHWC)
        for view, line in enumerate(axes):
            name = "" if shown else f"{spec.cameras[view]}: "
            painter.draw(line[int(shown)], tokens_VGD[view], name + painter.label)
            if painter.points:
                painter.draw_from_above(line[-1], tokens_VGD[view], None if images_VHWC is None else images_VHWC[view])
        painter.draw_scale(figure, axes[:, int(shown)].tolist())
    return _png(figure, title)


def strip_picture(
    spec: TokenSpec,
    tokens_NVGD: NDArray[np.float32],
    images_NVHWC: NDArray[np.uint8],
    names: Sequence[str],
    title: str,
) -> bytes:
    """N moments side by side: each view's frames, and under them its tokens (pooled tokens: once, at the bottom)."""
    painter = _Painter(spec, tokens_NVGD)
    pooled = spec.pooled_to is not None
    heights = [1.0] * spec.views + [0.5] if pooled else [1.0] * (2 * spec.views)
    figure = _figure(_STRIP_SIDE * len(names) + 0.6, _STRIP_SIDE * sum(heights) + 0.8)
    axes = figure.subplots(len(heights), len(names), squeeze=False, height_ratios=heights)
    frames = axes[: spec.views] if pooled else axes[::2]
    tokens = axes[spec.views :] if pooled else axes[1::2]
    for number in range(len(names)):
        _draw_frames(frames[:, number], spec, images_NVHWC[number], named=False)
        for view, axis in enumerate(tokens[:, number]):
            painter.draw(axis, tokens_NVGD[number, view], "")
        axes[0, number].set_title(names[number], fontsize=8)
    for line, name in zip(frames, spec.cameras, strict=True):
        line[0].set_ylabel(name, fontsize=8)
    for line in tokens:
        line[0].set_ylabel(painter.label.replace(" ", "\n"), fontsize=8)
    painter.draw_scale(figure, tokens.ravel().tolist())
    return _png(figure, title)


@dataclass(frozen=True)
class PrincipalColours:
    """Tokens -> RGB: the first three principal components, each spread over its 2 % to 98 % quantiles."""

    mean_D: NDArray[np.float64]
    directions_D3: NDArray[np.float64]
    low_3: NDArray[np.float64]
    high_3: NDArray[np.float64]

    @classmethod
    def of(cls, tokens: NDArray[np.float32]) -> "PrincipalColours":
        """Made from all finite tokens [..., D] that will be drawn with it; fewer than three directions leave black."""
        flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
        flat = flat[np.isfinite(flat).all(axis=-1)]
        if len(flat) == 0:
            flat = np.zeros((1, tokens.shape[-1]))
        mean = flat.mean(axis=0)
        chosen = flat[even_rows(len(flat), _BASIS_TOKENS)] - mean
        _, _, directions = np.linalg.svd(chosen, full_matrices=False)
        basis = np.zeros((tokens.shape[-1], 3))
        basis[:, : min(3, len(directions))] = directions[:3].T
        low, high = np.quantile((flat - mean) @ basis, (0.02, 0.98), axis=0)
        return cls(mean, basis, low, high)

    def __call__(self, tokens: NDArray[np.float32]) -> NDArray[np.float64]:
        """[..., D] -> [..., 3] in 0 to 1; grey where a token is not finite."""
        finite = np.isfinite(tokens).all(axis=-1, keepdims=True)
        scores = (np.where(finite, tokens, 0.0) - self.mean_D) @ self.directions_D3
        colours = np.clip((scores - self.low_3) / np.maximum(self.high_3 - self.low_3, 1e-12), 0.0, 1.0)
        return np.where(finite, colours, _GREY)


class _Painter:
    """Draws tokens of one picture, all in the same colours."""

    def __init__(self, spec: TokenSpec, tokens: NDArray[np.float32]) -> None:
        self._shape = spec.grid if spec.pooled_to is None else (1, spec.pooled_to)
        self.points = spec.tap == "xyz"
        kind = "height" if self.points else "PCA"
        self.label = f"tokens ({kind})" if spec.pooled_to is None else f"pooled ({kind})"
        self._aspect = "equal" if spec.pooled_to is None else "auto"  # pooled tokens have no shape to keep
        self._colours = None if self.points else PrincipalColours.of(tokens)
        heights = tokens[..., 2][np.isfinite(tokens).all(axis=-1)] if self.points else np.zeros(0)
        self._range = (float(heights.min()), float(heights.max())) if len(heights) else (0.0, 1.0)
        self._scale: Any = None

    def draw(self, axis: Any, tokens_GD: NDArray[np.float32], title: str) -> None:
        """One view's tokens, or all pooled ones."""
        bad = ~np.isfinite(tokens_GD).all(axis=-1).reshape(self._shape)
        if self._colours is not None:
            axis.imshow(self._colours(tokens_GD).reshape(*self._shape, 3), aspect=self._aspect)
        else:
            heights = np.where(bad, np.nan, tokens_GD[:, 2].reshape(self._shape))
            low, high = self._range
            self._scale = axis.imshow(heights, cmap=_colour_map(), vmin=low, vmax=high, aspect=self._aspect)
        if bad.any():
            lines, columns = np.nonzero(bad)
            axis.scatter(columns, lines, marker="x", color="black", s=12, linewidths=0.7)
            title = f"{title}\n{bad.sum()} of {bad.size} not finite".lstrip()
        axis.set_title(title, fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])

    def draw_scale(self, figure: Any, axes: list[Any]) -> None:
        """The bar that says which colour is which height."""
        if self._scale is not None:
            bar = figure.colorbar(self._scale, ax=axes, shrink=0.7 if self._aspect == "equal" else 1.0, pad=0.02)
            bar.ax.tick_params(labelsize=7)
            bar.set_label("height (m)", fontsize=7)

    def draw_from_above(self, axis: Any, points_G3: NDArray[np.float32], image: NDArray[np.uint8] | None) -> None:
        """The points from above, in their pixels' colours; the robot's base is the origin, x points away from it."""
        finite = np.isfinite(points_G3).all(axis=-1)
        low, high = self._range
        style: dict[str, Any] = {"c": points_G3[finite, 2], "cmap": _colour_map(), "vmin": low, "vmax": high}
        if image is not None:
            rows = ((np.arange(self._shape[0]) + 0.5) * image.shape[0] / self._shape[0]).astype(int)
            columns = ((np.arange(self._shape[1]) + 0.5) * image.shape[1] / self._shape[1]).astype(int)
            style = {"c": image[np.ix_(rows, columns)].reshape(-1, 3)[finite] / 255.0}
        axis.scatter(points_G3[finite, 1], points_G3[finite, 0], s=14, **style)
        axis.set_title("points from above", fontsize=8)
        axis.set_xlabel("y (m)", fontsize=7)
        axis.set_ylabel("x, away from the robot (m)", fontsize=7)
        axis.set_aspect("equal", adjustable="datalim")
        axis.invert_xaxis()
        axis.tick_params(labelsize=7)


def _episode_title(pack: PackReader, episode: int) -> str:
    record = pack.episodes[episode]
    return f"{record.instruction}\n{record.suite}, episode {record.number} of its task ({episode} of the pack)"


def _draw_frames(axes: Any, spec: TokenSpec, images_VHWC: NDArray[np.uint8] | None, *, named: bool = True) -> None:
    for view, axis in enumerate(axes):
        assert images_VHWC is not None
        axis.imshow(images_VHWC[view])
        axis.set_xticks([])
        axis.set_yticks([])
        if named:
            axis.set_title(spec.cameras[view], fontsize=8)


def _colour_map() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad=(_GREY, _GREY, _GREY))


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any, title: str) -> bytes:
    if title:
        figure.suptitle(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
