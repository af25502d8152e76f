"""One row of a pack as a picture for people: every view, its depth, what is to be done and the action taken."""

import io

import numpy as np

from geomcache.pipeline.pack.reader import PackReader

_ACTION_NAMES = ("x", "y", "z", "turn x", "turn y", "turn z", "gripper")
_STATE_NAMES = ("x", "y", "z", "turn x", "turn y", "turn z", "finger 1", "finger 2")
_SIDE = 3.2  # inches of one image


def row_picture(pack: PackReader, row: int) -> bytes:
    """PNG: a line of images (and one of depth in metres), then action and state as labelled bars.

    Raises:
        InputError: there is no such row.
        PackDamaged: its bytes are not those that were packed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    frames = pack.frames([row])
    cameras = pack.info.contract.cameras
    episode = pack.episodes[int(pack.episode_of_row[row])]
    lines = 3 if frames.depth_BVHW is not None else 2
    figure = Figure(figsize=(_SIDE * max(2, len(cameras)), 2.75 * (lines - 0.35)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{episode.instruction}\n{episode.suite}, episode {episode.number} of its task, "
        f"step {pack.step_of_row[row]} of {episode.steps}, row {row}",
        fontsize=9,
    )
    grid = figure.add_gridspec(lines, 2 * len(cameras), height_ratios=[1.0] * (lines - 1) + [0.65])
    for view, camera in enumerate(cameras):
        axis = figure.add_subplot(grid[0, 2 * view : 2 * view + 2])
        axis.imshow(frames.images_BVHWC[0, view])
        axis.set_title(f"{camera.name}, {camera.height} x {camera.width}", fontsize=8)
        axis.set_axis_off()
        if frames.depth_BVHW is not None:
            axis = figure.add_subplot(grid[1, 2 * view : 2 * view + 2])
            shown = axis.imshow(frames.depth_BVHW[0, view], cmap="viridis")
            figure.colorbar(shown, ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
            axis.set_title("depth (m)", fontsize=8)
            axis.set_axis_off()
    for part, (title, names, values, limit) in enumerate(
        (
            ("action (1 = 5 cm, 0.5 rad; gripper +1 closes)", _ACTION_NAMES, pack.actions_NA[row], 1.0),
            ("state (m, rad)", _STATE_NAMES, pack.states_NS[row], None),
        )
    ):
        axis = figure.add_subplot(grid[lines - 1, part * len(cameras) : (part + 1) * len(cameras)])
        bars = axis.barh(np.arange(len(names)), values, color="#4477aa")
        axis.bar_label(bars, fmt="%.3f", fontsize=6, padding=2)
        axis.set_yticks(np.arange(len(names)), names, fontsize=7)
        axis.invert_yaxis()
        axis.tick_params(axis="x", labelsize=7)
        if limit is not None:
            axis.set_xlim(-1.35 * limit, 1.35 * limit)
        else:
            axis.margins(x=0.25)
        axis.axvline(0.0, color="black", linewidth=0.6)
        axis.set_title(title, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
