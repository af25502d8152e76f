"""The numbers of ``channel_stats`` as one picture: channels, norms, where norms lie in each view, drift over shards."""

import io
from typing import Any

import numpy as np

from geomcache.pipeline.store.channel_stats import DRIFT_Z, MASSIVE_TIMES_MEDIAN, QUANTILES, TokenStatistics

_BLUE, _ORANGE, _RED, _GREY = "#4477aa", "#ee7733", "#cc3311", "#888888"
_VIEW_COLOURS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#66ccee", "#bbbb44")
_NAMED_CHANNELS = 6
_SMALL = 8  # points, of titles and labels
_LEAST_RANGE = 0.01  # of the norm: a heat map of less would show nothing but rounding


def stats_picture(stats: TokenStatistics) -> bytes:
    """PNG: channels by size, norms of tokens, heat maps of the norm in each view, shards against the whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11.0, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{stats.what}\ncache {stats.cache_id}, {stats.sampled_rows} of {stats.rows} rows, {stats.shards} shards",
        fontsize=10,
    )
    upper, lower = figure.subfigures(2, 1)
    left, right = upper.subplots(1, 2)
    _draw_channels(left, stats)
    _draw_norms(right, stats)
    if any(view.grid for view in stats.norms):
        maps, drift = lower.subfigures(1, 2)
        _draw_heat_maps(maps, stats)
        _draw_drift(drift.subplots(), stats)
    else:  # pooled tokens have no place in a picture
        _draw_drift(lower.subplots(), stats)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw_channels(axis: Any, stats: TokenStatistics) -> None:
    mean, std = np.abs(stats.channels.mean), np.array(stats.channels.std)
    size = np.hypot(mean, std)
    order = np.argsort(-size, kind="stable")
    ranks = np.arange(1, len(order) + 1)
    marker = {"marker": "o", "markersize": 5 if len(order) < 20 else 1.8, "linestyle": "none"}
    axis.plot(ranks, mean[order], color=_ORANGE, label="|mean|", **marker)
    axis.plot(ranks, std[order], color=_BLUE, label="std", **marker)
    median = float(np.median(size))
    axis.axhline(median, color=_GREY, linewidth=0.8)
    axis.annotate("median size", (ranks[-1], median), fontsize=7, color=_GREY, ha="right", va="bottom")
    if stats.massive_channels:
        limit = MASSIVE_TIMES_MEDIAN * median
        axis.axhline(limit, color=_RED, linewidth=0.8, linestyle="--")
        axis.annotate(
            f"massive: > {MASSIVE_TIMES_MEDIAN:.0f} x median", (ranks[-1], limit), fontsize=7, color=_RED, ha="right"
        )
        for rank, channel in zip(ranks[:_NAMED_CHANNELS], order, strict=False):
            if size[channel] > limit:
                place = (rank, max(mean[channel], std[channel]))
                axis.annotate(str(channel), place, xytext=(4, 0), textcoords="offset points", fontsize=7, color=_RED)
    axis.set_yscale("log" if size[order[-1]] > 0 else "symlog")
    if len(order) < 20:
        axis.set_xticks(ranks, [str(channel) for channel in order])
    _label(axis, "channels, largest root mean square first", "channel" if len(order) < 20 else "rank", "size")
    axis.legend(frameon=False, fontsize=_SMALL)


def _draw_norms(axis: Any, stats: TokenStatistics) -> None:
    edges = np.array(stats.norm_edges)
    for view, colour in zip(stats.norms, _colours(stats), strict=True):
        share = np.array(view.histogram) / max(1, sum(view.histogram))
        axis.stairs(share, edges, color=colour, fill=True, alpha=0.25)
        axis.stairs(share, edges, color=colour, label=view.view)
        if view.quantiles:
            low, middle, high = (view.quantiles[QUANTILES.index(q)] for q in (0.01, 0.5, 0.99))
            axis.axvline(middle, color=colour, linewidth=1.0)
            for end in (low, high):
                axis.axvline(end, color=colour, linewidth=0.8, linestyle=":")
    axis.set_yscale("log")  # a few tokens far from the rest are what one looks for here
    axis.ticklabel_format(axis="x", useOffset=False)
    _label(axis, "norms of tokens (lines: median; dotted: 1 %, 99 %)", "norm", "share of the view's tokens")
    axis.legend(frameon=False, fontsize=_SMALL)


def _draw_heat_maps(figure: Any, stats: TokenStatistics) -> None:
    grids = [np.array(view.grid, dtype=np.float64) for view in stats.norms]  # None becomes NaN: drawn grey
    every = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    middle, half = (every.max() + every.min()) / 2, (every.max() - every.min()) / 2
    half = max(half, _LEAST_RANGE * middle / 2)
    lines = 1 if len(grids) <= 3 else 2
    axes = figure.subplots(lines, -(-len(grids) // lines), squeeze=False).ravel()
    for axis, view, grid in zip(axes, stats.norms, grids, strict=False):
        shown = axis.imshow(grid, cmap=_colour_map(), vmin=middle - half, vmax=middle + half)
        axis.set_title(view.view, fontsize=_SMALL)
        axis.set_anchor("N")
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[len(grids) :]:
        axis.set_axis_off()
    bar = figure.colorbar(shown, ax=axes.tolist(), shrink=0.8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.ticklabel_format(useOffset=False)
    figure.suptitle("mean norm at each place of the picture (grey: never finite)", fontsize=9)


def _colour_map() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad="0.6")


def _draw_drift(axis: Any, stats: TokenStatistics) -> None:
    shards = [shard.shard for shard in stats.drift]
    marker = {"marker": "o", "markersize": 4 if len(shards) < 100 else 2, "linewidth": 0.7}
    axis.plot(shards, [s.mean_shift for s in stats.drift], color=_ORANGE, label="shift of means (in std)", **marker)
    axis.plot(shards, [s.std_ratio for s in stats.drift], color=_BLUE, label="std / whole", **marker)
    axis.plot(shards, [s.norm_ratio for s in stats.drift], color="#228833", label="mean norm / whole", **marker)
    for number, shard in enumerate(stats.drifting):
        axis.axvline(
            shard.shard, color=_RED, linewidth=5, alpha=0.2, label=None if number else f"deviates (z > {DRIFT_Z})"
        )
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    _label(axis, "each shard against the whole sample", "shard", "")
    axis.legend(frameon=False, fontsize=_SMALL)


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=_SMALL)
    axis.set_ylabel(y, fontsize=_SMALL)
    axis.tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.25, linewidth=0.5)


def _colours(stats: TokenStatistics) -> list[str]:
    return [_VIEW_COLOURS[number % len(_VIEW_COLOURS)] for number in range(len(stats.norms))]
