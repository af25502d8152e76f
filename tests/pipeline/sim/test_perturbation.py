"""What is executed instead of clean actions: noise, pushes, and the marks of the pushed steps."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from geomcache.pipeline.sim.perturbation import Disturber, Perturbation
from geomcache.pipeline.sim.recorder import Config
from geomcache.pipeline.sim.suites import TaskInfo

STEPS = 400
LABEL = np.array([0.1, -0.2, 0.3, 0.05, -0.05, 0.0, 1.0])


def episode(seed: int, noise: float, perturb: Perturbation | None) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    disturber = Disturber(seed, noise, perturb)
    executed, pushed = zip(*(disturber.disturb(LABEL) for _ in range(STEPS)), strict=True)
    return np.stack(executed) - LABEL, np.array(pushed)


def runs(pushed: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(first step, steps) of each run of pushed steps."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], pushed.astype(int), [0]])))
    return [(int(start), int(stop - start)) for start, stop in edges.reshape(-1, 2)]


def test_noise_alone_is_what_it_was_before_there_were_pushes() -> None:
    """Recordings of older versions must come out the same: one normal vector a step from the seed's generator."""
    rng = np.random.default_rng(7)
    wanted = np.stack([np.clip(LABEL[:3] + 0.05 * rng.standard_normal(3), -1, 1) for _ in range(STEPS)]) - LABEL[:3]
    found, pushed = episode(7, 0.05, None)
    np.testing.assert_array_equal(found[:, :3], wanted)
    assert not found[:, 3:].any()
    assert not pushed.any()


def test_pushes_are_as_long_strong_and_frequent_as_said_and_every_pushed_step_is_marked() -> None:
    starts, bursts, chances = [], [], 0
    for seed in range(40):
        change, pushed = episode(seed, 0.0, Perturbation())
        np.testing.assert_array_equal(pushed, np.abs(change).max(axis=1) > 1e-12)
        assert not change[:, 3:].any()
        assert np.abs(change[:, :3]).max() <= 0.6
        (first, steps), *later = runs(pushed)
        starts.append((first, steps))
        assert np.ptp(change[:steps], axis=0).max() < 1e-12  # one vector for the whole push
        assert min(start for start, _ in later) >= 10
        alone = [(a, n) for a, n in later if n <= 4 and a + n < STEPS]  # others: two in a row, or cut by the end
        assert all(np.abs(change[a : a + n]).max() <= 0.4 for a, n in later)
        bursts += [n for _, n in alone]
        chances += (~pushed[10:]).sum() + len(later)  # steps at which a burst could begin
    assert {first for first, _ in starts} == {0}
    assert {steps for _, steps in starts} == {3, 4, 5, 6, 7, 8}
    assert set(bursts) == {2, 3, 4}
    assert len(bursts) / chances == pytest.approx(1 / 35, rel=0.15)


def test_the_seed_decides_and_noise_does_not_move_the_pushes() -> None:
    one, two = episode(3, 0.0, Perturbation()), episode(3, 0.06, Perturbation())
    np.testing.assert_array_equal(one[1], two[1])
    np.testing.assert_allclose(two[0] - one[0], episode(3, 0.06, None)[0], atol=1e-12)
    assert (episode(4, 0.0, Perturbation())[1] != one[1]).any()
    still = Perturbation(start_push=0.0, burst_probability=0.0)
    assert not episode(3, 0.0, still)[1].any()


def test_what_is_executed_stays_within_the_controllers_range_and_the_label_clean() -> None:
    label = np.full(7, 0.9)
    disturber = Disturber(0, 0.5, Perturbation(burst_probability=1.0, burst_after=0))
    executed = np.stack([disturber.disturb(label)[0] for _ in range(50)])
    assert (executed.min(), executed.max()) == (-1.0, 1.0) or np.abs(executed).max() == 1.0
    np.testing.assert_array_equal(label, np.full(7, 0.9))


@pytest.mark.parametrize("steps", [(0, 3), (4, 2)])
def test_ranges_that_are_none_are_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="no range of steps"):
        Perturbation(burst_steps=steps)


def test_recordings_that_stand_keep_their_digest() -> None:
    """Made by the version before pushes and thinning: a change would refuse every folder of demonstrations."""
    task = TaskInfo("libero_object", 0, "some_task", "some task", Path("x"), 50)
    before = "704fc72f84e0e4dfb7dc5871ec61d974165c8b76706d26beb62974b968520125"
    assert Config(noise=0.1).digest(task) == before
    others = [Config(noise=0.1, observe_every=2), Config(noise=0.1, perturb=Perturbation())]
    assert len({before, *(other.digest(task) for other in others)}) == 3
