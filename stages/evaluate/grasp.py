"""Grasps of one episode, from what the simulator's contact check said at every step; see docs/metrics.md.

Row 0 of a record is before the first action, row t + 1 after action t.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema

HELD_STEPS = 3  # control steps: shorter contacts are none, shorter gaps neither, shorter closings no attempt
LIFTED = 0.02  # metres over the object's height at the episode's start
NEAR = 0.04  # metres between a finger pad and an object: half the open gripper, so what is between the pads is near
SETTLE_AT_GOAL_STEPS = 20  # control steps (1 s) that a released target has to come to rest at its goal


class GraspMetrics(Schema):
    """Of the simulator's own contact check; see docs/metrics.md."""

    targets: tuple[str, ...]  # the objects that the task wants moved
    attempts: int  # times that the gripper was told to close near an object
    first_attempt_success: bool | None  # the first attempt lifted a target; None: there was none
    grasped: bool  # a target was held and lifted
    wrong_object: bool  # another object was held and lifted
    drops: int  # times that a lifted target was lost anywhere but at its goal
    lifted: tuple[str, ...] = ()  # every object that was held and lifted, in the order of its first lift


@dataclass(frozen=True)
class GraspRecord:
    """T control steps, N movable objects, K targets among them."""

    objects: tuple[str, ...]
    targets: tuple[str, ...]
    held_TN: NDArray[np.bool_]  # [T + 1, N] both fingers touch it
    height_TN: NDArray[np.float64]  # [T + 1, N] metres
    at_goal_TK: NDArray[np.bool_]  # [T + 1, K] its goal predicates hold; looked at after a loss only, else False
    closed_T: NDArray[np.bool_]  # [T] the gripper's command
    near_T: NDArray[np.bool_]  # [T] an object is NEAR after this action; looked at where a closing begins, else False


class GraspRates(Schema):
    """Counts over episodes; the rates are properties, None where nothing was counted."""

    episodes: int  # that have grasp metrics
    attempts: int
    tried: int  # episodes with an attempt
    first_attempt_successes: int
    grasped: int  # episodes
    wrong_object: int  # episodes
    drops: int
    placed: int  # episodes that grasped and succeeded

    @property
    def attempts_per_episode(self) -> float | None:
        """Mean attempts."""
        return _ratio(self.attempts, self.episodes)

    @property
    def first_attempt_rate(self) -> float | None:
        """Of the episodes with an attempt: whose first one lifted a target."""
        return _ratio(self.first_attempt_successes, self.tried)

    @property
    def grasp_rate(self) -> float | None:
        """Of all episodes: in which a target was lifted."""
        return _ratio(self.grasped, self.episodes)

    @property
    def wrong_object_rate(self) -> float | None:
        """Of all episodes: in which another object was lifted."""
        return _ratio(self.wrong_object, self.episodes)

    @property
    def drops_per_episode(self) -> float | None:
        """Mean drops."""
        return _ratio(self.drops, self.episodes)

    @property
    def placed_given_grasped(self) -> float | None:
        """Of the episodes in which a target was lifted: successes."""
        return _ratio(self.placed, self.grasped)


def is_closed(command: float, before: bool) -> bool:
    """Whether the gripper is told to be closed: above zero; exactly zero keeps what was commanded ``before``."""
    return command > 0 or (command == 0 and before)


def grasp_metrics(record: GraspRecord, success: bool) -> GraspMetrics | None:
    """The metrics of one episode; None when the task has no target.

    Args:
        record: every control step.
        success: of the episode, which ends where it succeeds; every target is at its goal then.
    """
    if not record.targets:
        return None
    held_TN = np.stack([_steady(column_T) for column_T in record.held_TN.T], axis=1)
    lifted_TN = held_TN & (record.height_TN - record.height_TN[0] >= LIFTED)
    is_target_N = np.array([name in record.targets for name in record.objects])
    first_N = np.where(lifted_TN.any(axis=0), lifted_TN.argmax(axis=0), len(lifted_TN))
    order = [n for n in np.argsort(first_N, kind="stable") if lifted_TN[:, n].any()]
    attempts = list(_attempts(record, held_TN))
    until = attempts[1] if len(attempts) > 1 else len(lifted_TN)
    return GraspMetrics(
        targets=record.targets,
        attempts=len(attempts),
        first_attempt_success=bool(lifted_TN[attempts[0] : until, is_target_N].any()) if attempts else None,
        grasped=bool(lifted_TN[:, is_target_N].any()),
        wrong_object=bool(lifted_TN[:, ~is_target_N].any()),
        drops=sum(
            _drops(held_TN[:, n], lifted_TN[:, n], record.at_goal_TK[:, k], success)
            for k, n in enumerate(record.objects.index(name) for name in record.targets)
        ),
        lifted=tuple(record.objects[n] for n in order),
    )


def grasp_rates(grasps: Iterable[tuple[GraspMetrics | None, bool]]) -> GraspRates:
    """Sum up (metrics, success) of episodes; those without metrics are left out."""
    counted = [(grasp, success) for grasp, success in grasps if grasp is not None]
    return GraspRates(
        episodes=len(counted),
        attempts=sum(grasp.attempts for grasp, _ in counted),
        tried=sum(grasp.attempts > 0 for grasp, _ in counted),
        first_attempt_successes=sum(grasp.first_attempt_success is True for grasp, _ in counted),
        grasped=sum(grasp.grasped for grasp, _ in counted),
        wrong_object=sum(grasp.wrong_object for grasp, _ in counted),
        drops=sum(grasp.drops for grasp, _ in counted),
        placed=sum(grasp.grasped and success for grasp, success in counted),
    )


def _ratio(count: int, total: int) -> float | None:
    return count / total if total else None


def _runs(is_on_T: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, stop) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_on_T, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _steady(is_on_T: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without gaps, then without runs, of fewer than HELD_STEPS; a beginning or an end without contact is no gap."""
    steady_T = is_on_T.copy()
    runs = _runs(is_on_T)
    for (_, stop), (start, _) in pairwise(runs):
        steady_T[stop:start] |= start - stop < HELD_STEPS
    for start, stop in _runs(steady_T):
        steady_T[start:stop] &= stop - start >= HELD_STEPS
    return steady_T


def _attempts(record: GraspRecord, held_TN: NDArray[np.bool_]) -> Iterator[int]:
    """Rows before the first action of every closing that is an attempt.

    It begins with empty fingers, and either begins near an object and lasts, or ends up holding one.
    """
    for start, stop in _runs(record.closed_T):
        is_try = record.near_T[start] and stop - start >= HELD_STEPS
        if not held_TN[start].any() and (is_try or held_TN[start : stop + 1].any()):
            yield start


def _drops(held_T: NDArray[np.bool_], lifted_T: NDArray[np.bool_], at_goal_T: NDArray[np.bool_], success: bool) -> int:
    """Holds with a lift that end before the episode does, without the goal reached in time or before the next hold."""
    runs, rows, drops = _runs(held_T), len(held_T), 0
    for (start, stop), (following, _) in zip(runs, [*runs[1:], (rows, rows)], strict=False):
        until = min(stop + SETTLE_AT_GOAL_STEPS, following)
        is_at_goal = at_goal_T[stop:until].any() or (success and until == rows)
        drops += bool(lifted_T[start:stop].any() and stop < rows and not is_at_goal)
    return drops
