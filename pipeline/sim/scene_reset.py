"""Resetting LIBERO's inner environment, so that the same seed gives the same scene.

Non-obvious:
- Fixtures without joints are placed at every reset from numpy's GLOBAL generator, which the caller gets back.
- LIBERO appends its drawer and stove initialisers at every reset without clearing them, so with the same seed the
  fixtures would stand elsewhere in the second episode. The list is cleared before the model is built.
- ``ControlEnv.reset`` retries in a ``finally: continue`` and so swallows every error, Ctrl-C too; here the inner
  environment is reset.
- Without ``rebuild`` robosuite keeps its model (0.1 s instead of 1.5 s), and two things are not as after a hard reset:
  the gripper's ramp keeps its last command, and fixtures stand where they were placed last, from where LIBERO places
  what lies on them (an impossible place opens a debugger in LIBERO's sampler). With both put right, every state of an
  episode of the scripted expert is the same bit for bit (test); nothing is promised about pictures (LIBERO colours
  sites in the model).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_MOST_PLACEMENT_TRIES = 20


@contextlib.contextmanager
def callers_random_state() -> Iterator[None]:
    """Put numpy's global generator back as the caller had it; LIBERO seeds and draws from it."""
    before = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(before)


def reset_inner(inner: Any, *, rebuild: bool) -> None:
    """Reset robosuite's environment (not LIBERO's wrapper); ``rebuild`` compiles its model anew."""
    inner.hard_reset = rebuild
    if not rebuild:
        _undo(inner)
    try:
        _reset(inner, rebuild=rebuild)
    finally:
        inner.hard_reset = True


def _undo(inner: Any) -> None:
    """Put back what an episode leaves behind in the model and in robosuite's objects."""
    for robot in inner.robots:
        robot.gripper.current_action = np.zeros(robot.gripper.dof)
    model = inner.sim.model
    for name, fixture in inner.fixtures_dict.items():
        if name in inner.obj_body_id:
            element = inner.model.worldbody.find(f".//body[@name='{fixture.root_body}']")
            body = model.body_name2id(fixture.root_body)
            model.body_pos[body] = np.array(element.get("pos", "0 0 0").split(), dtype=np.float64)
            model.body_quat[body] = np.array(element.get("quat", "1 0 0 0").split(), dtype=np.float64)


def _reset(inner: Any, *, rebuild: bool) -> None:
    from robosuite.utils.errors import RandomizationError

    reset: Callable[[], Any] = inner.reset
    for attempt in range(_MOST_PLACEMENT_TRIES):
        if rebuild:  # which appends them
            inner.object_property_initializers.clear()
        try:
            reset()
        except RandomizationError:
            if attempt == _MOST_PLACEMENT_TRIES - 1:
                raise
        else:
            return
