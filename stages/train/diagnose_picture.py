"""A diagnosis as one picture: attention beside its uniform share, causal tests, ranks, gradients or gates."""

import io
from typing import Any

import numpy as np

from geomcache.stages.train.diagnosis import STANDARD_ERRORS, Diagnosis

_BLUE, _ORANGE, _GREEN, _GREY = "#4477aa", "#ee7733", "#228833", "#888888"
_SMALL = 8  # points, of titles and labels
_FACTOR = 4.0  # colours reach from a quarter of the uniform share to four times it
_ANNOTATED_BLOCKS = 20  # with more, the numbers would not fit their cells


def diagnosis_picture(found: Diagnosis, title: str) -> bytes:
    """PNG. ``title`` names what was measured; the verdict stands below it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11.0, 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{found.verdict()}", fontsize=10)
    upper, lower = figure.subfigures(2, 1)
    attention, loss, actions = upper.subplots(1, 3, width_ratios=(2, 1, 1))
    _draw_attention(attention, found)
    _draw_loss(loss, found)
    _draw_actions(actions, found)
    widths = (2, 1) if found.gates is None else (2, 1, 1)
    ranks, gradients, *gates = lower.subplots(1, len(widths), width_ratios=widths)
    _draw_ranks(ranks, found)
    _draw_gradients(gradients, found)
    if found.gates is not None:
        _draw_gates(gates[0], found.gates.histogram)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw_attention(axis: Any, found: Diagnosis) -> None:
    mass = np.array([block.mass for block in found.blocks])
    uniform = max(found.uniform_share, 1e-9)  # 0 where no sample has any token
    ratio = np.log2(np.clip(mass / uniform, 1 / _FACTOR, _FACTOR))
    limit = np.log2(_FACTOR)
    shown = axis.imshow(ratio.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    if len(found.blocks) <= _ANNOTATED_BLOCKS:
        for block, step in np.ndindex(mass.shape):
            colour = "white" if abs(ratio[block, step]) > 0.7 * limit else "black"
            text = f"{100 * mass[block, step]:.3g}"
            axis.text(block, step, text, ha="center", va="center", fontsize=6, color=colour)
    _label_blocks(axis, found)
    axis.set_yticks(range(mass.shape[1]), [str(step + 1) for step in range(mass.shape[1])])
    _label(axis, f"attention on geometry in %; white: the uniform share, {100 * uniform:.3g} %", "Euler step")
    axis.grid(visible=False)
    bar = axis.figure.colorbar(shown, ax=axis, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels([f"1/{_FACTOR:.0f}", "1", f"{_FACTOR:.0f} x"], fontsize=7)


def _draw_loss(axis: Any, found: Diagnosis) -> None:
    percent = 100 / found.loss.mean if found.loss.mean else 0.0
    names = list(found.effects)
    means = [percent * effect.loss.mean for effect in found.effects.values()]
    errors = [percent * STANDARD_ERRORS * (effect.loss.error or 0.0) for effect in found.effects.values()]
    axis.bar(names, means, yerr=errors, capsize=3, color=[_ORANGE, _BLUE, _BLUE][-len(names) :])
    axis.axhline(0, color="black", linewidth=0.8)
    _label(axis, f"change of the loss ({found.loss.mean:.3g})", "%, bar: two standard errors")


def _draw_actions(axis: Any, found: Diagnosis) -> None:
    names = list(found.effects)
    means = [effect.actions.mean for effect in found.effects.values()]
    errors = [STANDARD_ERRORS * (effect.actions.error or 0.0) for effect in found.effects.values()]
    axis.bar(names, means, yerr=errors, capsize=3, color=[_ORANGE, _BLUE, _BLUE][-len(names) :])
    axis.axhline(found.noise_actions.mean, color=_GREY, linestyle="--", linewidth=1.0, label="other noise alone")
    axis.set_ylim(0, 1.2 * max(axis.get_ylim()[1], found.noise_actions.mean))  # room for the legend
    axis.legend(frameon=False, fontsize=7, loc="upper right")
    _label(axis, "change of sampled actions", "mean |change|, normalised units")


def _draw_ranks(axis: Any, found: Diagnosis) -> None:
    places = range(len(found.blocks))
    line = {"marker": "o", "markersize": 4, "linewidth": 1.0}
    most = found.geometry_tokens - 1
    axis.plot(
        places, [block.rank for block in found.blocks], color=_BLUE, label=f"a sample's tokens (<= {most})", **line
    )
    over = [block.rank_over_samples for block in found.blocks]
    if all(rank is not None for rank in over):
        axis.plot(places, over, color=_GREEN, label=f"over samples (<= {found.samples - 1})", **line)
    axis.set_ylim(bottom=0)
    _label_blocks(axis, found)
    _label(axis, "effective rank of the K tokens", "effective rank")
    varying = [block.varying_share for block in found.blocks]
    if all(share is not None for share in varying):
        right = axis.twinx()
        right.plot(places, varying, color=_ORANGE, label="share of variance between samples", linestyle=":", **line)
        right.set_ylim(0, 1)
        right.set_ylabel("share of variance", fontsize=_SMALL)
        right.tick_params(labelsize=7)
        handles = [*axis.get_lines(), *right.get_lines()]
        axis.legend(handles, [one.get_label() for one in handles], frameon=False, fontsize=7)
    else:
        axis.legend(frameon=False, fontsize=7)


def _draw_gradients(axis: Any, found: Diagnosis) -> None:
    gradients = found.gradients
    modules = {"compressor": gradients.compressor, "DiT": gradients.dit, "VLM": gradients.vlm}
    there = {name: gradient.over_weights for name, gradient in modules.items() if gradient is not None}
    bars = axis.bar(list(there), list(there.values()), color=[_ORANGE, _BLUE, _BLUE][: len(there)])
    axis.bar_label(bars, [f"{value:.2g}" for value in there.values()], fontsize=7)
    frozen = [name for name, gradient in modules.items() if gradient is None]
    _label(axis, "gradient" + (f" (not trained: {', '.join(frozen)})" if frozen else ""), "norm / norm of the weights")


def _draw_gates(axis: Any, histogram: tuple[float, ...]) -> None:
    axis.stairs(histogram, np.linspace(0, 1, len(histogram) + 1), fill=True, color=_BLUE)
    axis.set_xlabel("gate", fontsize=_SMALL)
    _label(axis, "gates of real tokens", "share")


def _label_blocks(axis: Any, found: Diagnosis) -> None:
    every = max(1, len(found.blocks) // 16)
    places = range(0, len(found.blocks), every)
    axis.set_xticks(places, [f"{place + 1}\n({found.blocks[place].vlm_layer})" for place in places])
    axis.set_xlabel("cross-attending block (its VLM layer)", fontsize=_SMALL)


def _label(axis: Any, title: str, y: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_ylabel(y, fontsize=_SMALL)
    axis.tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.25, linewidth=0.5)
