"""Tokens of a row or of an episode as pictures for people, beside the frames they were made from.

``token_paint.py`` says what is drawn of which tap; colours are those of everything in the picture, so that one colour
means one thing in all of it. Tokens that are not finite are grey crosses.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.channel_stats import describe_tokens
from geomcache.pipeline.store.reader import CachedTokens, require_pack_of
from geomcache.pipeline.store.statistics import even_rows
from geomcache.pipeline.store.token_paint import PanelPaint, holds_points, paints_of

_STRIP_FRAMES = 8
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
        title = f"{_episode_title(pack, episode.episode)}, step {pack.step_of_row[row]} of {episode.steps}, {title}"
    images = None if pack is None else pack.images([row])[0]
    return tokens_picture(cache.spec, tokens_VGD, images, f"{title}\n{describe_tokens(cache)}")


def episode_picture(cache: CachedTokens, pack: PackReader, episode: int) -> bytes:
    """PNG of one episode of the pack: evenly chosen frames, the first and the last among them, above their tokens.

    Raises:
        InputError: there is no such episode; otherwise as ``row_picture``.
    """
    first, length = episode_rows(cache, pack, episode)
    rows = (first + even_rows(length, _STRIP_FRAMES)).tolist()
    return strip_picture(
        cache.spec,
        cache.tokens(rows).numpy(),
        pack.images(rows),
        [f"step {pack.step_of_row[row]}\nrow {row}" for row in rows],
        f"{_episode_title(pack, episode)}, {pack.episodes[episode].steps} steps\n{describe_tokens(cache)}",
    )


def episode_rows(cache: CachedTokens, pack: PackReader, episode: int) -> tuple[int, int]:
    """(first row, rows) of an episode of the cache's pack; ``InputError``, ``CacheStale`` as ``row_picture``."""
    require_pack_of(cache, pack)
    if not 0 <= episode < len(pack.episodes):
        raise InputError(
            f"episode {episode} is not in {pack.path}",
            expected=f"0 to {len(pack.episodes) - 1}",
            found=str(episode),
            fix=f"geomcache pack info {pack.path} says how many episodes there are",
        )
    return pack.episodes[episode].first_row, pack.episodes[episode].rows


def tokens_picture(
    spec: TokenSpec,
    tokens_VGD: NDArray[np.float32],
    images_VHWC: NDArray[np.uint8] | None = None,
    title: str = "",
) -> bytes:
    """Each view's frame beside its tokens on their grid; points also from above. Pooled tokens: in lines of K."""
    paints = paints_of(spec, tokens_VGD)
    views, shown = spec.views, images_VHWC is not None
    if spec.pooled_to is not None:
        columns = views if shown else 1
        figure = _figure(_SIDE * max(columns, 2), (_SIDE if shown else 0) + 1.5 * len(paints))
        heights = ([_SIDE] if shown else []) + [0.7] * len(paints)
        grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
        _draw_frames([figure.add_subplot(grid[0, view]) for view in range(views)] if shown else [], spec, images_VHWC)
        for line, paint in enumerate(paints, start=int(shown)):
            axis = figure.add_subplot(grid[line, :])
            _draw_tokens(axis, spec, paint, tokens_VGD[0], _named(spec, paint))
            axis.set_xticks(range(0, spec.pooled_to, max(1, spec.pooled_to // 16)))
            axis.tick_params(labelsize=7)
            _draw_scale(figure, spec, paint, [axis])
    else:
        points = holds_points(spec.tap, spec.dim)
        columns = shown + len(paints) + points
        figure = _figure(_SIDE * columns + 0.6, _SIDE * views + 0.5)
        axes = figure.subplots(views, columns, squeeze=False)
        _draw_frames(axes[:, 0] if shown else [], spec, images_VHWC)
        for view, line in enumerate(axes):
            for number, paint in enumerate(paints):
                name = "" if shown or number else f"{spec.cameras[view]}: "
                _draw_tokens(line[shown + number], spec, paint, tokens_VGD[view], name + _named(spec, paint))
            if points:
                image = None if images_VHWC is None else images_VHWC[view]
                _draw_from_above(line[-1], spec, paints[0], tokens_VGD[view], image)
        for number, paint in enumerate(paints):
            _draw_scale(figure, spec, paint, axes[:, shown + number].tolist())
    return _png(figure, title)


def strip_picture(
    spec: TokenSpec,
    tokens_NVGD: NDArray[np.float32],
    images_NVHWC: NDArray[np.uint8],
    names: Sequence[str],
    title: str,
) -> bytes:
    """N moments side by side: each view's frames, and under them its tokens (pooled tokens: once, at the bottom)."""
    paints = paints_of(spec, tokens_NVGD)
    pooled = spec.pooled_to is not None
    panels = [(view, paint) for view in range(tokens_NVGD.shape[1]) for paint in paints]
    heights = [1.0] * spec.views + [0.5] * len(panels) if pooled else [1.0] * (spec.views + len(panels))
    figure = _figure(_STRIP_SIDE * len(names) + 0.6, _STRIP_SIDE * sum(heights) + 0.8)
    axes = figure.subplots(len(heights), len(names), squeeze=False, height_ratios=heights)
    frames = axes[: spec.views] if pooled else axes[:: 1 + len(paints)]
    tokens = axes[spec.views :] if pooled else [line for n, line in enumerate(axes) if n % (1 + len(paints))]
    for number in range(len(names)):
        _draw_frames(frames[:, number], spec, images_NVHWC[number], named=False)
        for line, (view, paint) in zip(tokens, panels, strict=True):
            _draw_tokens(line[number], spec, paint, tokens_NVGD[number, view], "")
        axes[0, number].set_title(names[number], fontsize=8)
    for line, name in zip(frames, spec.cameras, strict=True):
        line[0].set_ylabel(name, fontsize=8)
    for line, (_, paint) in zip(tokens, panels, strict=True):
        line[0].set_ylabel(_named(spec, paint).replace(" ", "\n"), fontsize=8)
        _draw_scale(figure, spec, paint, list(line))
    return _png(figure, title)


def _shape(spec: TokenSpec) -> tuple[int, int]:
    return spec.grid if spec.pooled_to is None else (1, spec.pooled_to)


def _named(spec: TokenSpec, paint: PanelPaint) -> str:
    return f"tokens ({paint.panel.name})" if spec.pooled_to is None else f"pooled ({paint.panel.name})"


def _draw_tokens(axis: Any, spec: TokenSpec, paint: PanelPaint, tokens_GD: NDArray[np.float32], title: str) -> None:
    """One view's tokens, or all pooled ones; these have no shape to keep."""
    bad = ~np.isfinite(tokens_GD).all(axis=-1).reshape(_shape(spec))
    axis.imshow(paint(tokens_GD).reshape(*bad.shape, 3), aspect=_aspect(spec))
    if bad.any():
        lines, columns = np.nonzero(bad)
        axis.scatter(columns, lines, marker="x", color="black", s=12, linewidths=0.7)
        title = f"{title}\n{bad.sum()} of {bad.size} not finite".lstrip()
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_scale(figure: Any, spec: TokenSpec, paint: PanelPaint, axes: list[Any]) -> None:
    """The bar that says which colour is which value, where colours are a scale."""
    if paint.scale is not None:
        ends = "both" if paint.panel.way == "scalar" else "neither"  # values beyond have the colours of the ends
        shrink = 0.7 if spec.pooled_to is None else 1.0
        bar = figure.colorbar(paint.scale, ax=axes, shrink=shrink, pad=0.02, extend=ends)
        bar.ax.tick_params(labelsize=7)
        unit = f" ({paint.panel.unit})" if paint.panel.unit else ""
        bar.set_label(paint.panel.name + unit, fontsize=7)


def _draw_from_above(
    axis: Any,
    spec: TokenSpec,
    heights: PanelPaint,
    points_GD: NDArray[np.float32],
    image: NDArray[np.uint8] | None,
) -> None:
    """The points from above, in their pixels' colours; the robot's base is the origin, x points away from it."""
    finite = np.isfinite(points_GD).all(axis=-1)
    colours = heights(points_GD)
    if image is not None:
        rows, columns = (
            ((np.arange(n) + 0.5) * size / n).astype(int) for n, size in zip(spec.grid, image.shape, strict=False)
        )
        colours = image[np.ix_(rows, columns)].reshape(-1, 3) / 255.0
    axis.scatter(points_GD[finite, 1], points_GD[finite, 0], s=14, c=colours[finite])
    axis.set_title("points from above", fontsize=8)
    axis.set_xlabel("y (m)", fontsize=7)
    axis.set_ylabel("x, away from the robot (m)", fontsize=7)
    axis.set_aspect("equal", adjustable="datalim")
    axis.invert_xaxis()
    axis.tick_params(labelsize=7)


def _episode_title(pack: PackReader, episode: int) -> str:
    record = pack.episodes[episode]
    return f"{record.instruction}\n{record.suite}, episode {record.number} of its task ({episode} of the pack)"


def _aspect(spec: TokenSpec) -> float | str:
    """So that a view's tokens cover what its frame covers, also on a grid of another shape."""
    if spec.pooled_to is not None:
        return "auto"
    height, width = spec.image_size
    return (height / spec.grid[0]) / (width / spec.grid[1])


def _draw_frames(axes: Any, spec: TokenSpec, images_VHWC: NDArray[np.uint8] | None, *, named: bool = True) -> None:
    for view, axis in enumerate(axes):
        assert images_VHWC is not None
        axis.imshow(images_VHWC[view])
        axis.set_xticks([])
        axis.set_yticks([])
        if named:
            axis.set_title(spec.cameras[view], fontsize=8)


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
