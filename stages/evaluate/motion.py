"""Smoothness of an executed motion, from measured end-effector positions and executed actions; see docs/metrics.md.

LDLJ, the log dimensionless jerk, is from Balasubramanian, Melendez-Calderon, Roby-Brami and Burdet, "On the analysis of
movement smoothness" (J. NeuroEngineering Rehabil. 12:112, 2015); the duration counts velocity samples, as in the
first author's package ``monalysa``.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.stages.evaluate.grasp import is_closed

FEWEST_STEPS = 5  # a third difference of fewer positions says nothing
MOVED = 0.01  # metres of path; less is a robot that stands, whose trembling has no smoothness
_ARM = slice(0, 6)  # of an action: translation and rotation, without the gripper


class MotionMetrics(Schema):
    """Of the measured end-effector positions after settling; see docs/metrics.md."""

    ldlj: float | None  # log dimensionless jerk; nearer to 0 is smoother; None: it did not move, or without any jerk
    jerk_rms: float  # m/s^3
    seam_ratio: float | None  # mean action change where chunks meet, over that inside them; 1: no seam
    action_change: float  # mean |change of the action's first six numbers| between steps, action units
    path_length: float  # metres
    path_efficiency: float | None  # straight line over path; None: it did not move
    gripper_toggles: int  # changes of the gripper's command


class MotionMeans(Schema):
    """Means over episodes; each leaves out the episodes that have no such number, and is None without any."""

    episodes: int  # that have metrics
    ldlj: float | None
    jerk_rms: float | None
    seam_ratio: float | None
    action_change: float | None
    path_length: float | None
    path_efficiency: float | None
    gripper_toggles: float | None


@dataclass(frozen=True)
class Track:
    """What is measured at every control step after settling; row 0 is before the first action."""

    ee_pos_T3: NDArray[np.float64]  # [T + 1, 3] metres, world
    actions_TA: NDArray[np.float32]  # [T, 7] as executed
    chunk_starts: tuple[int, ...]  # rows of actions_TA that begin a chunk
    control_hz: float


def motion_metrics(track: Track) -> MotionMetrics | None:
    """The metrics of one episode; None with fewer than FEWEST_STEPS actions."""
    if len(track.actions_TA) < FEWEST_STEPS:
        return None
    velocity_T3 = np.diff(track.ee_pos_T3, axis=0) * track.control_hz
    jerk_T3 = np.diff(velocity_T3, n=2, axis=0) * track.control_hz**2
    path_length = float(np.linalg.norm(velocity_T3, axis=1).sum() / track.control_hz)
    moved = path_length >= MOVED
    change_T = np.linalg.norm(np.diff(track.actions_TA[:, _ARM].astype(np.float64), axis=0), axis=1)
    return MotionMetrics(
        ldlj=_ldlj(velocity_T3, jerk_T3, track.control_hz) if moved else None,
        jerk_rms=float(np.sqrt((jerk_T3**2).sum(axis=1).mean())),
        seam_ratio=_seam_ratio(change_T, track.chunk_starts),
        action_change=float(change_T.mean()),
        path_length=path_length,
        path_efficiency=float(np.linalg.norm(track.ee_pos_T3[-1] - track.ee_pos_T3[0])) / path_length
        if moved
        else None,
        gripper_toggles=_gripper_toggles(track.actions_TA[:, -1].tolist()),
    )


def motion_means(motions: Iterable[MotionMetrics | None]) -> MotionMeans:
    """Means over episodes; those without metrics are left out."""
    counted = [motion for motion in motions if motion is not None]
    means: dict[str, float | None] = {}
    for name in MotionMetrics.model_fields:
        values = [value for motion in counted if (value := motion.model_dump()[name]) is not None]
        means[name] = float(np.mean(values)) if values else None
    return MotionMeans.model_validate({"episodes": len(counted), **means})


def _ldlj(velocity_T3: NDArray[np.float64], jerk_T3: NDArray[np.float64], control_hz: float) -> float | None:
    """-ln(duration^3 / peak speed^2 * integral of |jerk|^2)."""
    duration, peak = len(velocity_T3) / control_hz, np.linalg.norm(velocity_T3, axis=1).max()
    dimensionless = duration**3 / peak**2 * (jerk_T3**2).sum() / control_hz
    return -float(np.log(dimensionless)) if dimensionless > 0 else None


def _seam_ratio(change_T: NDArray[np.float64], chunk_starts: tuple[int, ...]) -> float | None:
    """None without a seam or without an inside, or when nothing changes inside; ``change_T[t]`` leads to row t + 1."""
    is_seam_T = np.isin(np.arange(1, len(change_T) + 1), chunk_starts)
    if not is_seam_T.any() or is_seam_T.all() or not change_T[~is_seam_T].any():
        return None
    return float(change_T[is_seam_T].mean() / change_T[~is_seam_T].mean())


def _gripper_toggles(commands: list[float]) -> int:
    """Changes between open and close; it is open before the first action."""
    closed, toggles = False, 0
    for command in commands:
        before, closed = closed, is_closed(command, closed)
        toggles += closed != before
    return toggles
