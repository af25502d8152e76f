"""How an episode went, beside success: smoothness of the motion, and grasps.

Definitions, sources and reference values: docs/metrics.md.
"""

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import ACTION_DIM
from geomcache.pipeline.sim.grasp_sensor import GraspSensor
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.stages.evaluate.grasp import (
    NEAR,
    SETTLE_AT_GOAL_STEPS,
    GraspMetrics,
    GraspRates,
    GraspRecord,
    grasp_metrics,
    grasp_rates,
    is_closed,
)
from geomcache.stages.evaluate.motion import MotionMeans, MotionMetrics, Track, motion_means, motion_metrics

__all__ = [
    "GraspMetrics",
    "GraspRates",
    "MotionMeans",
    "MotionMetrics",
    "Track",
    "TrackRecorder",
    "grasp_rates",
    "motion_means",
    "motion_metrics",
]


class TrackRecorder:
    """Records one episode after the other of a simulator, and measures them; about 0.2 ms a control step.

    Call ``begin`` right after ``env.reset``, ``chunk`` whenever a new chunk begins, ``step`` after every ``env.step``,
    and ``metrics`` at the end.
    """

    def __init__(self, env: LiberoEnv) -> None:
        self._env = env
        self._positions: list[NDArray[np.float64]] = []
        self._actions: list[NDArray[np.float32]] = []
        self._chunk_starts: list[int] = []
        self._grasps: _GraspRecorder | None = None

    def begin(self) -> None:
        """Start an episode: the scene is settled, nothing executed."""
        sensor = GraspSensor(self._env)
        self._positions = [self._env.proprioception().ee_pos_3]
        self._actions, self._chunk_starts = [], []
        self._grasps = _GraspRecorder(sensor) if sensor.targets else None

    def chunk(self) -> None:
        """The next action is the first of a new chunk."""
        self._chunk_starts.append(len(self._actions))

    def step(self, action_A: NDArray[np.floating]) -> None:
        """Note what the control step that executed ``action_A`` [7] led to."""
        self._positions.append(self._env.proprioception().ee_pos_3)
        self._actions.append(np.array(action_A, dtype=np.float32))
        if self._grasps is not None:
            self._grasps.step(float(action_A[-1]))

    def metrics(self, success: bool) -> tuple[MotionMetrics | None, GraspMetrics | None]:
        """Of the episode so far; motion is None with too few steps, grasp where the task has nothing to grasp."""
        assert self._positions, "call begin() first"
        track = Track(
            np.stack(self._positions),
            np.array(self._actions, dtype=np.float32).reshape(-1, ACTION_DIM),
            tuple(self._chunk_starts),
            self._env.contract.control_rate_hz,
        )
        grasp = None if self._grasps is None else grasp_metrics(self._grasps.record(), success)
        return motion_metrics(track), grasp


class _GraspRecorder:
    """The record of one episode; asks the sensor's dearer questions only where ``grasp_metrics`` looks."""

    def __init__(self, sensor: GraspSensor) -> None:
        self._sensor = sensor
        self._held, self._heights = [sensor.held()], [sensor.heights()]
        self._at_goal = [[False] * len(sensor.targets)]
        self._last_held = dict.fromkeys(sensor.targets, -SETTLE_AT_GOAL_STEPS - 1)  # row
        self._closed: list[bool] = []
        self._near: list[bool] = []

    def step(self, gripper: float) -> None:
        sensor, row = self._sensor, len(self._held)
        was_closed = bool(self._closed) and self._closed[-1]
        self._closed.append(is_closed(gripper, was_closed))
        self._near.append(self._closed[-1] and not was_closed and sensor.distance() <= NEAR)
        self._held.append(sensor.held())
        self._heights.append(sensor.heights())
        at_goal = []
        for target, n in zip(sensor.targets, sensor.target_numbers, strict=True):
            if self._held[-1][n]:
                self._last_held[target] = row
            at_goal.append(0 < row - self._last_held[target] <= SETTLE_AT_GOAL_STEPS and sensor.at_goal(target))
        self._at_goal.append(at_goal)

    def record(self) -> GraspRecord:
        return GraspRecord(
            objects=self._sensor.objects,
            targets=self._sensor.targets,
            held_TN=np.stack(self._held),
            height_TN=np.stack(self._heights),
            at_goal_TK=np.array(self._at_goal, dtype=bool),
            closed_T=np.array(self._closed, dtype=bool),
            near_T=np.array(self._near, dtype=bool),
        )
