"""States: a row's eight numbers against the robot's, and the faults that change them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from geomcache.stages.evaluate.check.finding import (
    ANTIPODAL,
    QUATERNION,
    STATE_OMITTED,
    STATE_ORDER,
    Finding,
    explanation,
    failed,
    passed,
)
from geomcache.stages.evaluate.check.scene import STATE_TOLERANCE, Replayed

States = NDArray[np.floating]
_NAMES = ("x", "y", "z", "axis-angle x", "axis-angle y", "axis-angle z", "left finger", "right finger")
_SMALLEST_ANGLE = 1e-6  # radians; below, there is no axis


def check_states(replayed: Replayed, stored_TS: States) -> Finding:
    """Each row's state against ``observe().state_S`` of the same moment of the replay."""
    live_TS, whole_TS = replayed.states_TS, stored_TS
    if not replayed.follows:
        live_TS, stored_TS = live_TS[:1], stored_TS[:1]
    compared = f"states of {len(stored_TS)} rows with the simulator's"
    error_S = np.abs(live_TS - stored_TS).max(axis=0)
    worst = int(error_S.argmax())
    found = f"largest difference {error_S[worst]:.2g} ({_NAMES[worst]})"
    if error_S[worst] <= STATE_TOLERANCE:
        return passed("states", compared, found, f"at most {STATE_TOLERANCE:g} m, rad")
    fault, how = _omitted(replayed.states_TS, whole_TS)
    if fault is None:
        fault, how = explain_states(live_TS, stored_TS)
    expected = f"row 0: {_numbers(live_TS[0])}"
    return failed("states", compared, expected, f"row 0: {_numbers(stored_TS[0])}; {found}{how}", fault)


def _omitted(live_TS: States, stored_TS: States) -> tuple[str | None, str]:
    """Whether what changes on one side never changes on the other; for that, rows need not be the same moments."""
    for moving, other, name in ((live_TS, stored_TS, "stored"), (stored_TS, live_TS, "live")):
        varying = np.ptp(moving, axis=0) > STATE_TOLERANCE
        if varying.sum() > 1 and not np.ptp(other, axis=0)[varying].any():
            return STATE_OMITTED, f"; the {name} state never changes"
    return None, ""


def explain_states(live_TS: States, stored_TS: States) -> tuple[str | None, str]:
    """The fault that makes one of the live and stored states [T, 8] from the other, and a note about it."""
    changes = [_with_quaternion(kind, sign) for kind in _KINDS for sign in (1, -1)]
    turned = [_apart(change, *pair) for change in changes for pair in _both(live_TS, stored_TS)]
    plain_TS = np.abs(live_TS - stored_TS)
    left = {
        QUATERNION: min(turned, key=np.mean),
        ANTIPODAL: _nearer(plain_TS, _nearer(*(_apart(_antipodal, *pair) for pair in _both(live_TS, stored_TS)))),
    }
    order = _order(live_TS, stored_TS)
    if order is not None:
        left[STATE_ORDER] = np.abs(live_TS[:, order] - stored_TS)
    fault = explanation({name: float(apart_TS.mean()) for name, apart_TS in left.items()}, float(plain_TS.mean()))
    if fault is None or left[fault].max() > STATE_TOLERANCE:
        return None, ""
    if fault == STATE_ORDER and order is not None:
        return fault, f"; stored are {', '.join(_NAMES[i] for i in order)}"
    return fault, ""


def _both(live_TS: States, stored_TS: States) -> tuple[tuple[States, States], tuple[States, States]]:
    return (live_TS, stored_TS), (stored_TS, live_TS)


def _apart(change: Callable[[States], States], one_TS: States, other_TS: States) -> States:
    """[T, 8] what is left when ``other_TS`` are the changed ``one_TS``."""
    return np.abs(change(one_TS) - other_TS)


def _nearer(one_TS: States, other_TS: States) -> States:
    """Of each row, the one of both that leaves less."""
    return np.where(one_TS.sum(axis=1, keepdims=True) <= other_TS.sum(axis=1, keepdims=True), one_TS, other_TS)


def _antipodal(states_TS: States) -> States:
    """The same rotation, by the rest of the full turn about the opposite axis: v -> v (1 - 2 pi / |v|)."""
    changed = np.array(states_TS, dtype=np.float64)
    angle_T1 = np.maximum(np.linalg.norm(changed[:, 3:6], axis=1, keepdims=True), _SMALLEST_ANGLE)
    changed[:, 3:6] *= 1.0 - 2.0 * np.pi / angle_T1
    return changed


def quaternions(states_TS: States) -> NDArray[np.float64]:
    """[T, 4] xyzw of the states' axis-angle; with an angle up to 2 pi the simulator's own sign comes back."""
    rotation_T3 = states_TS[:, 3:6].astype(np.float64)
    angle_T1 = np.linalg.norm(rotation_T3, axis=1, keepdims=True)
    axis_T3 = rotation_T3 / np.maximum(angle_T1, _SMALLEST_ANGLE)
    return np.concatenate([axis_T3 * np.sin(angle_T1 / 2), np.cos(angle_T1 / 2)], axis=1)


# Where the four numbers xyzw (0-3) and the fingers (4, 5) go, after the position; 6: the opening between the fingers.
_KINDS = {
    "xyzw, one finger": (0, 1, 2, 3, 4),
    "wxyz, one finger": (3, 0, 1, 2, 4),
    "xyzw, opening": (0, 1, 2, 3, 6),
    "wxyz, opening": (3, 0, 1, 2, 6),
    "xyz, two fingers": (0, 1, 2, 4, 5),
    "wxy, two fingers": (3, 0, 1, 4, 5),
}


def _with_quaternion(kind: str, sign: int) -> Callable[[States], States]:
    def change(states_TS: States) -> States:
        fingers = states_TS[:, 6:8].astype(np.float64)
        parts = np.concatenate([sign * quaternions(states_TS), fingers, np.abs(fingers).sum(axis=1)[:, None]], axis=1)
        return np.concatenate([states_TS[:, :3].astype(np.float64), parts[:, _KINDS[kind]]], axis=1)

    return change


def _order(live_TS: States, stored_TS: States) -> list[int] | None:
    """Which live number each stored one is, if each is another one and they are not in order."""
    cost_SS = np.abs(live_TS[:, :, None] - stored_TS[:, None, :]).mean(axis=0)  # [live, stored]
    order = [int(i) for i in cost_SS.argmin(axis=0)]
    return order if sorted(order) == list(range(len(order))) and order != sorted(order) else None


def _numbers(state_S: States) -> str:
    return " ".join(f"{value:.3f}" for value in state_S)
