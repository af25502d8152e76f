"""Motion metrics against the package of LDLJ's first author, closed forms, and planted seams."""

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.stages.evaluate.motion import MotionMetrics, Track, motion_means, motion_metrics
from tests.golden.make_monalysa import GOLDEN, HZ, minimum_jerk, paths


def track(path_T3: NDArray[np.float64], hz: float = HZ) -> Track:
    """A path whose actions are all zero."""
    return Track(path_T3, np.zeros((len(path_T3) - 1, 7), np.float32), (0,), hz)


def measured(path_T3: NDArray[np.float64], hz: float = HZ) -> MotionMetrics:
    """Metrics of ``track``."""
    metrics = motion_metrics(track(path_T3, hz))
    assert metrics is not None
    return metrics


def acting(actions_TA: NDArray[np.float64], *chunk_starts: int) -> MotionMetrics:
    """Metrics of a robot that stands while it is told to act."""
    standing = Track(np.zeros((len(actions_TA) + 1, 3)), actions_TA.astype(np.float32), chunk_starts, HZ)
    metrics = motion_metrics(standing)
    assert metrics is not None
    return metrics


def drifting(steps: int, step: float, seam: float, every: int) -> NDArray[np.float64]:
    """[steps, 7] whose first number grows by ``step``, by ``seam`` where a chunk of ``every`` begins."""
    growth = np.full(steps, step)
    growth[::every] = seam
    actions_TA = np.zeros((steps, 7))
    actions_TA[:, 0] = np.cumsum(growth)
    return actions_TA


@pytest.mark.parametrize("name", sorted(paths()))
def test_ldlj_is_that_of_monalysa(name: str) -> None:
    """If this fails the definition has changed: values of older evaluations no longer compare."""
    golden = json.loads(GOLDEN.read_text())["ldlj"]
    assert sorted(golden) == sorted(paths())
    assert measured(paths()[name]).ldlj == pytest.approx(golden[name], abs=1e-9)


def test_minimum_jerk_has_its_closed_form() -> None:
    # Flash and Hogan (1985): the integral of jerk^2 is 720 D^2 / T^5, the peak speed 15/8 D / T.
    steps, hz, distance = 4000, 1000.0, 0.3
    metrics = measured(minimum_jerk(steps), hz)
    # Two samples have no third difference: one at each end, where jerk^2 is 60^2 / 720 = 5 times its mean.
    assert metrics.ldlj == pytest.approx(-np.log(720 / 1.875**2 * (1 - 10 / steps)), abs=1e-4)
    assert metrics.jerk_rms == pytest.approx(np.sqrt(720) * distance / (steps / hz) ** 3, rel=2e-3)
    assert metrics.path_length == pytest.approx(distance)
    assert metrics.path_efficiency == pytest.approx(1.0)


def test_a_circle_has_its_closed_form() -> None:
    radius, steps = 0.1, 80
    angle = 2 * np.pi * np.arange(steps + 1) / steps
    metrics = measured(radius * np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=1))
    chord = 2 * np.sin(np.pi / steps)  # a difference turns the circle and scales it by this
    assert metrics.path_length == pytest.approx(steps * radius * chord)
    assert metrics.path_efficiency == pytest.approx(0.0, abs=1e-12)
    assert metrics.jerk_rms == pytest.approx(radius * (chord * HZ) ** 3)
    dimensionless = (steps / HZ) ** 3 / (radius * chord * HZ) ** 2 * metrics.jerk_rms**2 * (steps - 2) / HZ
    assert metrics.ldlj == pytest.approx(-np.log(dimensionless))


def test_ldlj_has_no_unit() -> None:
    path = paths()["trembling"]
    same = measured(path).ldlj
    assert measured(3.0 * path).ldlj == pytest.approx(same)
    assert measured(path[:, [2, 0, 1]] + 5.0).ldlj == pytest.approx(same, abs=1e-6)
    assert measured(path, hz=3 * HZ).ldlj == pytest.approx(same)
    assert measured(path, hz=3 * HZ).jerk_rms == pytest.approx(27 * measured(path).jerk_rms)


def test_rough_motion_scores_below_smooth_motion() -> None:
    smooth, jumps, trembling = (
        measured(paths()[name]).ldlj for name in ("minimum_jerk", "jumps_every_8_steps", "trembling")
    )
    assert smooth is not None
    assert jumps is not None
    assert trembling is not None
    assert smooth > jumps > trembling


def test_uniform_motion_has_no_jerk_to_take_the_logarithm_of() -> None:
    line = np.outer(np.arange(41) / 64, [1.0, 0.0, 0.0])  # exact in binary
    metrics = measured(line)
    assert (metrics.ldlj, metrics.jerk_rms) == (None, 0.0)
    assert metrics.path_length == pytest.approx(40 / 64)
    assert metrics.path_efficiency == pytest.approx(1.0)


def test_a_robot_that_stands_has_no_smoothness() -> None:
    still = measured(np.zeros((30, 3)))
    assert (still.ldlj, still.path_efficiency, still.seam_ratio) == (None, None, None)
    assert (still.jerk_rms, still.path_length, still.action_change, still.gripper_toggles) == (0.0, 0.0, 0.0, 0)
    trembling = np.zeros((30, 3))
    trembling[::2, 2] = 1e-4  # 29 times a tenth of a millimetre: not a centimetre in all
    assert measured(trembling).ldlj is None
    assert measured(trembling).path_length == pytest.approx(29e-4)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_too_few_steps_have_no_metrics(steps: int) -> None:
    path = np.arange(3.0 * (steps + 1)).reshape(-1, 3)
    assert motion_metrics(track(path)) is None
    assert motion_metrics(replace(track(path), chunk_starts=())) is None


def test_five_steps_have_metrics() -> None:
    assert measured(minimum_jerk(5)).ldlj is not None


@pytest.mark.parametrize(("seam", "ratio"), [(0.01, 1.0), (0.1, 10.0), (0.001, 0.1)])
def test_planted_seams_are_found(seam: float, ratio: float) -> None:
    metrics = acting(drifting(40, 0.01, seam, every=8), *range(0, 40, 8))
    assert metrics.seam_ratio == pytest.approx(ratio, rel=1e-4)
    assert metrics.action_change == pytest.approx((4 * seam + 35 * 0.01) / 39, rel=1e-4)


def test_a_change_is_the_length_of_six_numbers_and_the_gripper_is_none_of_them() -> None:
    actions_TA = np.zeros((6, 7))
    actions_TA[3:, [1, 4]] = 0.3, 0.4
    actions_TA[2:, 6] = 1.0
    metrics = acting(actions_TA, 0, 3)
    assert metrics.action_change == pytest.approx(0.5 / 5)
    assert metrics.seam_ratio is None  # nothing changes inside the chunks


def test_there_is_no_seam_ratio_without_seams_or_without_an_inside() -> None:
    actions_TA = drifting(10, 0.01, 0.01, every=10)
    assert acting(actions_TA, 0).seam_ratio is None
    assert acting(actions_TA, *range(10)).seam_ratio is None


@pytest.mark.parametrize(
    ("commands", "toggles"),
    [
        ([-1, -1, -1, -1, -1], 0),
        ([1, 1, 1, 1, 1], 1),  # it is open before
        ([-1, 1, 1, -1, -1], 2),
        ([-1, 0.2, -0.2, 1, -1], 4),
        ([0, 0, 1, 0, 0], 1),  # zero keeps what was
        ([1, 0, 1, 0, -1], 2),
    ],
)
def test_gripper_toggles(commands: list[float], toggles: int) -> None:
    actions_TA = np.zeros((5, 7))
    actions_TA[:, 6] = commands
    assert acting(actions_TA, 0).gripper_toggles == toggles


def test_means_leave_out_what_has_no_number() -> None:
    moving, still = measured(paths()["circle"]), measured(np.zeros((9, 3)))
    means = motion_means([moving, None, still])
    assert (means.episodes, means.ldlj, means.path_efficiency) == (2, moving.ldlj, moving.path_efficiency)
    assert means.path_length == pytest.approx(moving.path_length / 2)
    assert means.seam_ratio is None
    assert motion_means([]).model_dump(exclude={"episodes"}) == dict.fromkeys(MotionMetrics.model_fields)
