"""Disturbing what the scripted expert executes while its answers stay clean, so that recoveries are demonstrated.

A policy that copies undisturbed demonstrations is lost in the first state that they never visit. Disturbing the
demonstrator while it goes on answering rightly shows the way back (DART: Laskey et al. 2017, arXiv:1703.09327). White
noise alone stays within a few millimetres of the path; a push of several steps leads away from it.

Non-obvious:
- The label of a step is the clean answer in the state that was really reached, so every single label is right. A chunk
  of labels that begins before a push is not: its later actions were answered where only the push leads. So steps whose
  executed action carried a push are marked, and chunks stop counting behind them (PackReader.action_chunk).
- White noise is not marked: it leads nowhere in particular.
- Noise and pushes have generators of their own, so that the noise of a seed is the same with and without pushes.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from geomcache.cache_schemas.base import Schema

STANDARD_NOISE = 0.06  # white noise that goes with the standard pushes
_PUSHES = 1  # tells their generator from the noise's


def _ordered(steps: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"{list(steps)} is no range of steps: at least 1, the smaller number first")
    return steps


_Steps = Annotated[tuple[int, int], AfterValidator(_ordered)]
_Push = Annotated[float, Field(ge=0.0, le=1.0)]


class Perturbation(Schema):
    """Pushes: one constant vector, uniform in a cube, is added to the executed xyz of some steps in a row.

    The defaults are those under which every one of 137 episodes of libero_object still succeeded, and a small policy
    learned to (with white noise STANDARD_NOISE, the recorder's own setting).
    """

    start_steps: _Steps = (3, 8)  # least and most steps of the push that every episode begins with
    start_push: _Push = 0.6  # half the side of its cube, in action units of 5 cm; 0: none
    burst_steps: _Steps = (2, 4)  # of a push on the way
    burst_push: _Push = 0.4
    burst_probability: float = Field(default=1 / 35, ge=0.0, le=1.0)  # that one begins, at each step without a push
    burst_after: int = Field(default=10, ge=0)  # steps at the beginning in which none begins


class Disturber:
    """What is executed instead of one episode's clean actions; a function of the seed and the number of the step."""

    def __init__(self, seed: int, noise: float, perturb: Perturbation | None) -> None:
        """``noise``: standard deviation of the white noise on xyz; ``perturb``: None for no pushes."""
        self._noise, self._perturb = noise, perturb
        self._white, self._pushes = np.random.default_rng(seed), np.random.default_rng([seed, _PUSHES])
        self._step = self._left = 0  # of the episode; of the present push
        self._push_3: NDArray[np.float64] = np.zeros(3)
        if perturb is not None and perturb.start_push > 0.0:
            self._begin(perturb.start_steps, perturb.start_push)

    def disturb(self, label_A: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
        """(what to execute [7] within -1..1, whether it carries a push) for the next step's clean action [7]."""
        perturb, executed_A = self._perturb, label_A.copy()
        if (
            perturb is not None
            and self._left == 0
            and self._step >= perturb.burst_after
            and self._pushes.random() < perturb.burst_probability
        ):
            self._begin(perturb.burst_steps, perturb.burst_push)
        pushed = self._left > 0
        if pushed:
            executed_A[:3] += self._push_3
            self._left -= 1
        executed_A[:3] += self._noise * self._white.standard_normal(3)
        self._step += 1
        return np.clip(executed_A, -1.0, 1.0), pushed

    def _begin(self, steps: tuple[int, int], push: float) -> None:
        self._left = int(self._pushes.integers(*steps, endpoint=True))
        self._push_3 = self._pushes.uniform(-push, push, 3)
