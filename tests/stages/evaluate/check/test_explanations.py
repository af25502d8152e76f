"""What explains a difference, on numbers made by hand; needs no simulator."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from geomcache.stages.evaluate.check.actions import _deltas, _labels, _suggestions
from geomcache.stages.evaluate.check.finding import FIXES, Finding, explanation, failed, impossible, passed
from geomcache.stages.evaluate.check.frames import _filters, _shifted, fault_of
from geomcache.stages.evaluate.check.run import CheckReport, sample_steps
from geomcache.stages.evaluate.check.states import explain_states

Array = NDArray[Any]
NO_FRAMES = impossible("frames", "f", "", "")


def _moving(rows: int = 30) -> Array:
    """[T, 8] states of a hand that moves and turns about a moving axis, by nearly half a turn."""
    t = np.linspace(0.0, 1.0, rows)
    place = np.stack([0.3 * t, 0.1 * np.sin(6 * t), 1.0 - 0.2 * t], axis=1)
    rotation = np.stack([2.9 + 0.1 * t, 0.4 * t, -0.3 * t], axis=1)
    finger = 0.02 + 0.01 * np.cos(9 * t)
    return np.concatenate([place, rotation, np.stack([finger, -0.9 * finger], axis=1)], axis=1)


def test_a_fault_is_named_only_if_it_explains_clearly_better() -> None:
    assert explanation({"BGR": 0.1, "exposure": 5.0}, 10.0) == "BGR"
    assert explanation({"BGR": 0.1, "exposure": 0.12}, 10.0) is None
    assert explanation({"BGR": 3.0}, 10.0) is None
    assert explanation({}, 10.0) is None
    assert explanation({"BGR": 0.0}, 0.0) is None


def test_fixes_mend_what_was_found() -> None:
    assert all(fix for fix in FIXES.values())
    turned = failed("frames", "", "", "", fault_of("rot90_left"))
    assert "image_orientation" in turned.fix
    assert "report it" in turned.fix
    assert failed("tokens", "", "", "", "BGR").fix.startswith("geomcache extract")
    assert "policy.safetensors" in failed("open loop", "", "", "", "raw weights for averaged ones").fix
    assert "train again" in failed("policy inputs", "", "", "", "min_max statistics read as q99").fix


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([passed("states", "s", "")], "the two sides agree"),
        (
            [passed("states", "s", ""), impossible("frames", "f", "", "")],
            "what could be compared agrees; not possible: f",
        ),
        ([NO_FRAMES], "nothing could be compared; not possible: f"),
        ([failed("frames", "g", "", "", "BGR"), NO_FRAMES], "found: BGR; not possible: f"),
    ],
)
def test_the_last_line_does_not_call_agreement_what_was_not_compared(findings: list[Finding], verdict: str) -> None:
    assert CheckReport(run="r", checkpoint="c", looked_at="", findings=tuple(findings)).verdict == verdict


def test_sampled_steps_hold_both_ends_and_neighbours() -> None:
    steps = sample_steps(150)
    assert steps[0] == 0
    assert steps[-1] == 149
    assert 1 in np.diff(steps)
    assert sample_steps(1) == [0]


@pytest.mark.parametrize("first", ["xyzw", "wxyz", "xyz", "wxy"])
@pytest.mark.parametrize("fingers", ["one", "opening"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_quaternions_in_every_layout_are_named(first: str, fingers: str, sign: float) -> None:
    live = _moving()
    quaternion = sign * Rotation.from_rotvec(live[:, 3:6]).as_quat()[:, ["xyzw".index(letter) for letter in first]]
    end = np.abs(live[:, 6:]).sum(axis=1, keepdims=True) if fingers == "opening" else live[:, 6:7]
    if len(first) == 3:
        end = live[:, 6:]
    stored = np.concatenate([live[:, :3], quaternion, end], axis=1)
    assert explain_states(live, stored)[0] == "quaternion for axis-angle"
    assert explain_states(stored, live)[0] == "quaternion for axis-angle"


def test_deltas_of_absolute_poses_lead_where_they_say() -> None:
    states = _moving()
    wanted = np.concatenate([states[1:, :6], np.ones((len(states) - 1, 1))], axis=1)
    found = _deltas(wanted, states[:-1])
    turn = Rotation.from_rotvec(states[1:, 3:6]) * Rotation.from_rotvec(states[:-1, 3:6]).inv()
    np.testing.assert_allclose(found[:, :3], np.diff(states[:, :3], axis=0) / 0.05, atol=1e-6)
    np.testing.assert_allclose(found[:, 3:6], turn.as_rotvec() / 0.5, atol=1e-6)
    np.testing.assert_array_equal(found[:, 6], 1.0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_gripper_of_0_to_1_is_undone_by_the_fingers_motion(sign: float) -> None:
    rows = np.arange(40)
    states = _moving(len(rows))
    closing = np.where(rows < 20, -1.0, 1.0)
    opening = np.where(rows < 20, 0.04, np.clip(0.04 - 0.005 * (rows - 20), 0.0, None))
    states[:, 6:] = np.stack([opening, -opening], axis=1)
    actions = np.concatenate([np.zeros((len(rows), 6)), closing[:, None]], axis=1)
    packed = np.concatenate([actions[:, :6], 0.5 + 0.5 * sign * actions[:, 6:]], axis=1)
    first = _suggestions(packed, states, states)[0]
    assert first.fault == "gripper range"
    np.testing.assert_array_equal(first.actions_TA, actions)


def test_labels_of_noisy_episodes() -> None:
    rng = np.random.default_rng(0)
    label = np.concatenate([np.cumsum(rng.normal(0, 0.1, (60, 6)), axis=0), np.sign(rng.normal(size=(60, 1)))], axis=1)
    executed = label.copy()
    executed[:, :3] += rng.normal(0, 0.05, (60, 3))
    turned = label * [1, 1, 1, 1, 1, 1, -1]
    stuck = label * [1, 1, 1, 1, 1, 1, 0]
    assert _labels(label, executed) is None
    faults = [_labels(wrong, executed) for wrong in (turned, np.roll(label, 1, 0), np.roll(label, -1, 0), stuck)]
    assert [found and found[1] for found in faults] == ["gripper sign", *["chunk shifted by one"] * 2, None]
    assert all(faults)


def test_a_filter_that_does_not_widen_reads_the_pixels_beside_the_centre() -> None:
    row = np.array([10, 20, 40, 80, 100, 0, 50, 200], dtype=np.uint8)
    image = np.repeat(np.repeat(row[None, :, None], 8, axis=0), 3, axis=2)
    small = _filters((2, 2))["bilinear without antialiasing (OpenCV)"](image)
    np.testing.assert_array_equal(small[0, :, 0], [30, 25])  # the means of pixels 1 and 2, and 5 and 6


def test_pictures_one_row_apart() -> None:
    live = np.random.default_rng(0).integers(0, 255, (4, 1, 5, 5, 3)).astype(np.uint8)
    assert _shifted([3, 4, 5, 6], np.roll(live, 1, axis=0), live) == 0.0
    assert _shifted([3, 4, 5, 6], np.roll(live, -1, axis=0), live) == 0.0
    assert _shifted([0, 2, 4, 6], np.roll(live, 1, axis=0), live) == np.inf
