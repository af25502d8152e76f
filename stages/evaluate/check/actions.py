"""Actions: a demonstration's chunks as training makes them, through the live decoding, into the simulator.

A replay that leaves the recorded track is explained from three things: the packed actions, the packed states (what the
robot did then) and the replayed states (what it does now). What they suggest is undone and the demonstration replayed
again; a fault is named only if the track is then followed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from geomcache.pipeline.orientation_track import gripper_sign_agrees, hand_poses
from geomcache.stages.evaluate.check.finding import (
    ABSOLUTE,
    CONTROL_RATE,
    GRIPPER_RANGE,
    GRIPPER_SIGN,
    OTHER_STATISTICS,
    SETTLING,
    SHIFTED,
    Finding,
    explanation,
    failed,
    impossible,
    passed,
    statistics_read_as,
)
from geomcache.stages.evaluate.check.opened import MODES, OpenedRun, StoredEpisode
from geomcache.stages.evaluate.check.scene import (
    START_TOLERANCE,
    STATE_TOLERANCE,
    Replayed,
    Scene,
    replay,
    settle_steps_of,
)
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.train.normalise import CONSTANT_SPREAD

Array = NDArray[np.floating]
EXECUTE_STEPS: int = EvalConfig.model_fields["execute_steps"].default
DECODING_TOLERANCE = 1e-5  # action units; float32's rounding is a hundredth of it
_FULL_SCALE = np.array([0.05] * 3 + [0.5] * 3)  # m, rad of an action of 1
_LEAST_SCALE = 1e-3  # of other statistics over the right ones; zeroed or negative numbers are something else
_CLOCK_TOLERANCE = 0.01  # of a control step
_HALF = 0.5  # of the deviation: what an undone fault may leave, at most
_LEAST_MOTION = 0.02  # m over an episode; fingers that stand still would make much of nothing
_REACH = 0.06  # m: no delta of one row leads further, so absolute positions are never further from the robot
_SIMILAR = 0.98  # correlation of absolute positions with the robot's


def check_decoding(run: OpenedRun, episode: StoredEpisode) -> tuple[Finding, Array]:
    """Chunks normalised by training and denormalised by the live path against the packed actions.

    Returns:
        The finding, and the actions [T, 7] that the closed loop executes, EXECUTE_STEPS of each chunk.
    """
    apart, most, labels_TA = episode.pack.info.steps_per_row, min(EXECUTE_STEPS, run.policy.horizon), episode.labels_TA
    rows = np.arange(0, len(episode), max(1, most // apart))
    batch = run.maker.batch(episode.rows(rows.tolist()), with_tokens=False)
    assert batch.actions_BTA is not None
    execute = min(most, max(1, most // apart) * apart)  # control steps from one chunk to the next
    steps_BT = rows[:, None] * apart + np.arange(execute)
    inside_BT = steps_BT < len(labels_TA)
    normalised = batch.actions_BTA.numpy()[:, :execute][inside_BT]
    decoded_TA, packed_TA = run.policy.decode(normalised), labels_TA[steps_BT[inside_BT]]
    compared = f"{len(rows)} chunks, normalised by training and decoded by the live path, with the packed actions"
    if (low := packed_TA[:, 6].min()) >= 0.0 and np.ptp(packed_TA[:, 6]) > 0.0:
        found = f"the packed gripper runs from {low:g} to {packed_TA[:, 6].max():g}"
        return failed("actions", compared, "gripper from -1 (open) to +1 (close)", found, GRIPPER_RANGE), decoded_TA
    if is_absolute(episode.actions_TA, episode.states_TS):
        found = f"row 0: {_numbers(packed_TA[0])}, which is where the hand is, in every row"
        return failed("actions", compared, "deltas, 1 = 0.05 m and 0.5 rad", found, ABSOLUTE), decoded_TA
    if run.config.gripper == "binarise":  # as Normaliser does both ways; numbers in between do not come back
        packed_TA = _with_gripper(packed_TA, np.where(packed_TA[:, 6:] > 0.0, 1.0, -1.0).astype(packed_TA.dtype))
    error = float(np.abs(decoded_TA - packed_TA).max())
    if error <= DECODING_TOLERANCE:
        expected = f"at most {DECODING_TOLERANCE:g}"
        return passed("actions", compared, f"largest difference {error:.2g}", expected), decoded_TA
    fault = _explain_decoding(run, normalised, decoded_TA, packed_TA)
    worst = np.unravel_index(np.abs(decoded_TA - packed_TA).argmax(), packed_TA.shape)
    found = f"{_numbers(decoded_TA[worst[0]])} at step {worst[0]}; largest difference {error:.3g}"
    return failed("actions", compared, _numbers(packed_TA[worst[0]]), found, fault), decoded_TA


def _explain_decoding(run: OpenedRun, normalised: Array, decoded: Array, packed: Array) -> str | None:
    errors = {
        GRIPPER_SIGN: _mean(_with_gripper(packed, -packed[:, 6:]) - decoded),
        GRIPPER_RANGE: min(
            _mean(_with_gripper(packed, factor * packed[:, 6:] + 0.5) - decoded) for factor in (0.5, -0.5)
        ),
        SHIFTED: min(_mean(packed[1:] - decoded[:-1]), _mean(packed[:-1] - decoded[1:])),
    }
    # The gripper has no statistics.
    trained, motion, of_modes = run.config.normalisation, decoded[:, :6], {}
    for mode in MODES:
        if mode != trained:
            read = np.clip(run.fitted(mode).denormalise_actions(normalised), -1.0, 1.0)
            of_modes[statistics_read_as(trained, mode)] = _mean(read[:, :6] - motion)
    fault = explanation(errors, _mean(packed - decoded)) or explanation(of_modes, _mean(packed[:, :6] - motion))
    grips = float(np.abs(packed[:, 6] - decoded[:, 6]).max()) <= DECODING_TOLERANCE
    return fault or (OTHER_STATISTICS if grips and _is_affine(packed, decoded) else None)


def _is_affine(packed: Array, decoded: Array) -> bool:
    """Whether each dimension of the motion is another scale and offset of what it should be, where it is not cut."""
    told = 0
    for dim in range(6):
        whole = np.abs(decoded[:, dim]) < 1.0
        x, y = packed[whole, dim].astype(np.float64), decoded[whole, dim].astype(np.float64)
        if len(x) < 3 or np.ptp(x) < CONSTANT_SPREAD:
            continue
        design = np.stack([x, np.ones_like(x)], axis=1)
        line = np.linalg.lstsq(design, y, rcond=None)[0]
        if line[0] < _LEAST_SCALE or np.abs(design @ line - y).max() > DECODING_TOLERANCE:
            return False
        told += 1
    return told > 0


def check_replay(
    scene: Scene, decoded_TA: Array, decoded_whole: bool, steps: Sequence[int], control_rate_hz: int
) -> tuple[Finding, Replayed]:
    """Execute the demonstration; it must succeed and follow the packed states row by row.

    Args:
        scene: of the episode.
        decoded_TA: [T, 7] as the closed loop would execute them.
        decoded_whole: they are the packed ones; else the packed ones are executed.
        steps: at which an observation is wanted.
        control_rate_hz: of the contract.

    Returns:
        The finding, and the replay that follows the demonstration best.
    """
    episode, stored_TS = scene.episode, scene.episode.states_TS
    actions_TA = decoded_TA if decoded_whole else episode.actions_TA
    what = "decoded actions" if decoded_whole else "packed actions"
    if scene.executed_TA is not None:
        actions_TA, what = scene.executed_TA, "the file's executed actions"
    compared = f"{what} of {episode.where}, executed in the simulator, with the packed states and the goal"
    expected = f"success, and states within {STATE_TOLERANCE:g} m, rad"
    found = replay(scene, actions_TA, steps)
    wanted_seconds = 1.0 / control_rate_hz
    if abs(found.seconds_per_step - wanted_seconds) > _CLOCK_TOLERANCE * wanted_seconds:
        told = f"{found.seconds_per_step:.3f} s of simulated time a step"
        return failed("actions", compared, f"{wanted_seconds:.3f} s", told, CONTROL_RATE), found
    if _follows(found, stored_TS):
        if scene.executed_TA is not None and (wrong := _labels(episode.actions_TA, scene.executed_TA)) is not None:
            compared = f"packed actions of {episode.where} with the file's executed ones"
            return failed("actions", compared, "the same but for noise and pushes of the motion", *wrong), found
        if found.success:
            return passed("actions", compared, _told(found, stored_TS), expected), found
        text = f"{_told(found, stored_TS)}; the demonstration does not reach its goal here"
        fix = "try others: --episodes N; if none reaches its goal, record them again: geomcache demos --replay SOURCE"
        return failed("actions", compared, expected, text, None, fix), found
    at_start = bool(np.abs(found.states_TS[0] - stored_TS[0]).max() <= START_TOLERANCE)
    settled = settle_steps_of(scene, stored_TS[0]) if not at_start else None
    if not at_start and settled is None and found.success:
        text = "success; the states are others from row 0 on, see states"
        return passed("actions", compared, text, "success"), found
    if settled is not None:
        told = f"row 0 is what {settled} settling steps lead to"
        suggestions = [_Undoing(SETTLING, actions_TA, told, settle_steps=settled)]
    else:
        hand_at_start = bool(np.abs(found.states_TS[0] - stored_TS[0])[:3].max() <= START_TOLERANCE)
        suggestions = _suggestions(actions_TA, stored_TS, found.states_TS) if hand_at_start else []
    found.follows = False
    for undoing in suggestions:
        better = replay(scene, undoing.actions_TA, steps, repeats=undoing.repeats, settle_steps=undoing.settle_steps)
        better.follows = _follows(better, stored_TS)
        left, was = (_deviation(each.states_TS, stored_TS) for each in (better, found))
        if undoing.evident or better.follows or left <= _HALF * was:
            text = f"{_told(found, stored_TS)}; {undoing.told}: {_told(better, stored_TS)}"
            return failed("actions", compared, expected, text, undoing.fault), replace(better, corrected=undoing.fault)
    if (drift := scene.own_error()) > STATE_TOLERANCE:
        why = f"the file's own actions lead {drift:.2g} away from its own states in this simulator"
        fix = "record it again here: geomcache demos --replay SOURCE; or demonstrations of your own: geomcache demos"
        return impossible("actions", compared, why, fix), found
    return failed("actions", compared, expected, _told(found, stored_TS), None), found


def _labels(packed: Array, executed: Array) -> tuple[str, str | None] | None:
    """(what is wrong, its fault) with packed labels whose disturbed twins were executed; None: nothing.

    Noise and pushes are on the motion only, and no larger than to make the right row's the most alike.
    """
    rows = min(len(packed), len(executed))
    label, done = packed[:rows], executed[:rows]
    here, later, earlier = (
        _mean(label[first : rows - last, :6] - done[last : rows - first, :6])
        for first, last in ((0, 0), (1, 0), (0, 1))
    )
    if min(later, earlier) < here:
        return f"mean difference {here:.3g}, {min(later, earlier):.3g} one row apart", SHIFTED
    apart = np.abs(label[:, 6] - done[:, 6]).max()
    if apart <= DECODING_TOLERANCE:
        return None
    turned = np.abs(label[:, 6] + done[:, 6]).max() <= DECODING_TOLERANCE
    return f"the gripper differs by up to {apart:.3g}", GRIPPER_SIGN if turned else None


def _follows(replayed: Replayed, stored_TS: Array) -> bool:
    return bool(np.abs(replayed.states_TS - stored_TS).max() <= STATE_TOLERANCE)


@dataclass(frozen=True)
class _Undoing:
    fault: str
    actions_TA: Array
    told: str  # how it was undone
    repeats: int = 1
    settle_steps: int | None = None
    evident: bool = False  # the numbers themselves show it, whether or not undoing them leads along the track


def _suggestions(actions: Array, stored: Array, live: Array) -> list[_Undoing]:
    """What may be wrong, the likeliest first, and what undoes it."""
    suggested = []
    grip, here = actions[:, 6:], _hand_deviation(live, stored)
    agrees_then, agrees_now = (gripper_sign_agrees(actions, states).score for states in (stored, live))
    if grip.min() >= 0.0:
        whole = _with_gripper(actions, (2.0 * grip - 1.0) * (1.0 if agrees_then > 0.0 else -1.0))
        suggested.append(_Undoing(GRIPPER_RANGE, whole, "with the gripper in -1..1", evident=True))
    elif agrees_then < 0.0 or agrees_now < 0.0:
        suggested.append(_Undoing(GRIPPER_SIGN, _with_gripper(actions, -grip), "with the gripper's sign turned"))
    if is_absolute(actions, stored):
        told = "with the actions as deltas to the packed states"
        suggested.append(_Undoing(ABSOLUTE, _deltas(actions, stored), told, evident=True))
    then, now = np.diff(stored[:, :3], axis=0), np.diff(live[:, :3], axis=0)
    times = round(float((then * now).sum() / max((now**2).sum(), 1e-12)))
    if times > 1:  # the packed states go further in a row
        told = f"with every action executed {times} times"
        suggested.append(_Undoing(CONTROL_RATE, actions, told, repeats=times))
    if _hand_deviation(live[:-1], stored[1:]) < _HALF * here:
        later = np.concatenate([actions[:1], actions[:-1]])
        suggested.append(_Undoing(SHIFTED, later, "with every action one row later"))
    if _hand_deviation(live[1:], stored[:-1]) < _HALF * here:
        earlier = np.concatenate([actions[1:], actions[-1:]])
        suggested.append(_Undoing(SHIFTED, earlier, "with every action one row earlier"))
    return suggested


def _deviation(live: Array, stored: Array) -> float:
    """How far row-to-row motion differs, as a share of the stored motion; of the hand or the fingers, the larger."""
    parts = (slice(0, 3), slice(6, 8))
    moved = [[np.diff(states[:, part], axis=0) for states in (live, stored)] for part in parts]
    return max(float(np.abs(now - then).sum() / max(np.abs(then).sum(), _LEAST_MOTION)) for now, then in moved)


def _hand_deviation(live: Array, stored: Array) -> float:
    """The hand's alone: fingers that tremble on an object do so in no row twice alike."""
    now, then = (np.diff(states[:, :3], axis=0) for states in (live, stored))
    return float(np.abs(now - then).sum() / max(np.abs(then).sum(), _LEAST_MOTION))


def _told(replayed: Replayed, stored_TS: Array) -> str:
    errors = np.abs(replayed.states_TS - stored_TS)
    worst = f"states differ by up to {errors[:, :3].max():.2g} m, {errors[:, 3:6].max():.2g} rad"
    return f"{'success' if replayed.success else 'no success'}, {worst}, fingers {errors[:, 6:].max():.2g} m"


def _with_gripper(actions: Array, gripper_T1: Array) -> Array:
    return np.concatenate([actions[:, :6], gripper_T1], axis=1)


def is_absolute(actions: Array, states: Array) -> bool:
    """Whether the first three numbers are places near the robot and go where it goes."""
    near = np.abs(actions[:, :3] - states[:, :3]).max() < _REACH
    moving = np.ptp(states[:, :3], axis=0) > _REACH
    if not np.ptp(actions[:, :3], axis=0)[moving].all():
        return False
    alike = [np.corrcoef(actions[:, i], states[:, i])[0, 1] > _SIMILAR for i in np.flatnonzero(moving)]
    return bool(near and alike and all(alike))


def _deltas(actions: Array, states: Array) -> Array:
    """Absolute poses (position, axis-angle) as deltas to the states, in action units."""
    wanted, now = hand_poses(actions), hand_poses(states)
    turn_T33 = wanted[:, :3, :3] @ np.swapaxes(now[:, :3, :3], 1, 2)
    angle_T = np.arccos(np.clip((np.trace(turn_T33, axis1=1, axis2=2) - 1.0) / 2.0, -1.0, 1.0))
    axis_T3 = np.stack([turn_T33[:, i, j] - turn_T33[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], axis=1)
    length_T1 = np.maximum(np.linalg.norm(axis_T3, axis=1, keepdims=True), 1e-12)
    motion_T6 = np.concatenate([wanted[:, :3, 3] - now[:, :3, 3], angle_T[:, None] * axis_T3 / length_T1], axis=1)
    return _with_gripper(np.clip(motion_T6 / _FULL_SCALE, -1.0, 1.0), actions[:, 6:])


def _mean(difference: Array) -> float:
    return float(np.abs(difference).mean())


def _numbers(action_A: Array) -> str:
    return " ".join(f"{value:.3f}" for value in action_A)
