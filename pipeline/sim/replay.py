"""Replaying one demonstration of an official-layout HDF5 file: the simulator shows again what was recorded.

Two ways: ``by_actions`` executes the actions from the first state and says how far that leads from the stored states;
``by_states`` sets each stored state, and cannot drift.

Non-obvious:
- The flat state does not hold where fixtures without joints stand; LIBERO places them anew at every reset, up to
  1.5 cm elsewhere. With our recorder's attributes (seed, init_state_index) the reset is repeated. Else ``model_file``
  says where they stood, and they are put there by body name. That is exact to the file's six digits, and leaves
  everything else as the installed LIBERO builds it. Rebuilding the simulation from the whole MJCF gives the same
  pictures, but rounds every number in it (actions then miss the states by 5e-7 instead of 0), needs the recording
  machine's mesh paths mapped, and fails where the file's objects are registered under other names.
- ``states[j]`` is BEFORE action j. Official files: ``obs[j]`` is AFTER action j. The "no-noops" regeneration (no
  attributes on ``data``): ``obs[j]`` is BEFORE it, and ``states[0]`` was copied from before ten settling no-ops.
- Demonstrations start in the middle: LIBERO's script drops the first five steps. The controller's goal and the
  gripper's ramp are not in the state; they are set to "arrived" and "has obeyed" (exact after four equal commands).
- A picture of a stored state is one or two physics steps (2 ms each, 1 mm of a fast hand) later than what ``step``
  returned; which, is the phase of robosuite's sampling (_AFTER_ACTION_UPDATES).
"""

import contextlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import ACTION_DIM
from geomcache.cache_schemas.errors import InputError, SourceDamaged, UnknownName
from geomcache.pipeline.official_layout import suite_named_in
from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.demo_file import SETTLE_STEPS
from geomcache.pipeline.sim.libero_env import SETTLE_ACTION, LiberoEnv
from geomcache.pipeline.sources._libero_files import Demo, member, observe_every

Way = Literal["actions", "states"]
Scene = Literal["seed", "model_file", "unknown"]  # by what the fixtures were placed; unknown: up to 1.5 cm elsewhere
Pose = NDArray[np.float64]  # [7]: position in metres, quaternion wxyz

_MOVED = 1e-5  # metres or quaternion units; less is the rounding of model_file
_GRIPPER_RAMP_STEPS = 200  # physics steps in which the gripper obeys any command
# Forced updates of the observables before the first step: each one shifts the moment inside a step that is observed.
_AFTER_ACTION_UPDATES = 1  # LIBERO's create_dataset.py: reset_from_xml_string
_BEFORE_ACTION_UPDATES = 2  # the regeneration: reset, set_init_state
_OTHER_ROTATIONS = ("axisangle", "xyaxes", "zaxis", "euler")  # MuJoCo saves quaternions only


@dataclass(frozen=True)
class StoredDemo:
    """What a replay needs of one demonstration."""

    path: Path
    name: str  # demo_<i>
    actions_TA: NDArray[np.float64]  # [T, 7] as they were executed
    states_TD: NDArray[np.float64]  # [T, D] flat states before each action
    observed_before_action: bool  # obs[j] relative to actions[j]
    scene: dict[str, dict[str, Pose]] | None = None  # of model_file: "body" and "camera" -> name -> pose in its parent
    seed_and_init_state: tuple[int, int] | None = None  # of files that `geomcache demos` recorded
    observe_every: int = 1  # k: obs[r] belongs to actions[r * k]

    def __len__(self) -> int:
        return len(self.actions_TA)

    @property
    def where(self) -> str:
        """The demonstration as a person finds it."""
        return f"{self.path.name}: data/{self.name}"


def demo_names(path: Path) -> list[str]:
    """The file's demonstrations, by number; raises ``SourceDamaged`` if it is no file of demonstrations."""
    with reading(path, "") as file:
        names = [name for name in file["data"] if re.fullmatch(r"demo_\d+", name)]
    return sorted(names, key=lambda name: int(name.removeprefix("demo_")))


def read_demo(path: Path, name: str) -> StoredDemo:
    """Read and check everything but the pictures; raises ``SourceDamaged``."""
    with reading(path, name) as file:
        demo = file[f"data/{name}"]
        key = "actions_executed" if "actions_executed" in demo else "actions"
        actions_TA, states_TD = _numbers(path, name, demo, key), _numbers(path, name, demo, "states")
        steps = len(actions_TA)
        if actions_TA.shape[1] != ACTION_DIM or steps < 2 or len(states_TD) != steps:
            found = f"{key} {actions_TA.shape}, states {states_TD.shape}"
            raise damaged(path, name, found, expected=f"(T >= 2, {ACTION_DIM}) actions and a state before each")
        attributes = demo.attrs
        ours = "seed" in attributes and "init_state_index" in attributes
        return StoredDemo(
            path=path,
            name=name,
            actions_TA=actions_TA,
            states_TD=states_TD,
            observed_before_action="problem_info" not in file["data"].attrs,
            scene=_scene_of(path, name, str(attributes["model_file"])) if "model_file" in attributes else None,
            seed_and_init_state=(int(attributes["seed"]), int(attributes["init_state_index"])) if ours else None,
            observe_every=observe_every(demo, Demo(path, name)),
        )


def find_task(path: Path) -> suites.TaskInfo:
    """The LIBERO task of a file, by its name ``<task>_demo.hdf5``; raises ``UnknownName``."""
    with reading(path, "") as file:
        told = {name: str(file["data"].attrs.get(name, "")) for name in ("suite", "bddl_file_name")}
    task = path.stem.removesuffix("_demo")
    hinted = told["suite"] or suite_named_in(told["bddl_file_name"] or str(path.parent))
    known = [hinted, *suites.PUBLIC_SUITES] if hinted in suites.SUITES else suites.PUBLIC_SUITES
    for suite in dict.fromkeys(known):  # spread suites have the tasks of public ones: they must be named
        for index in range(suites.task_count(suite)):
            if (found := suites.task_info(suite, index)).name == task:
                return found
    raise UnknownName(
        f"{path.name} is named after no LIBERO task",
        expected="<task>_demo.hdf5 with a task of " + ", ".join(suites.SUITES),
        found=repr(task),
        fix="give the file its official name again",
    )


def is_init_state(task: suites.TaskInfo, number: int) -> bool:
    """Whether the task has an initial state of that number, for evaluation or for demonstrations."""
    return number in range(task.n_init_states) or number in suites.demo_states(task.suite, task.index)


class Replay:
    """One demonstration in the simulator.

    While ``by_actions`` or ``by_states`` is iterated, ``env`` shows at each j what ``obs[j]`` of the file shows.
    """

    def __init__(self, env: LiberoEnv, demo: StoredDemo) -> None:
        self._env, self._demo = env, demo
        self.scene: Scene = "unknown"
        self.max_state_error: float | None = None  # of by_actions so far: largest difference of any number in a state
        self._at_start = False
        self._restore()

    def by_actions(self) -> Iterator[int]:
        """Execute every action; restarts the episode if something was shown before."""
        env, demo = self._env, self._demo
        if not self._at_start:
            self._restore()
        self._at_start = False
        errors = []
        for j, action in enumerate(demo.actions_TA):
            errors.append(np.abs(env.flat_state() - demo.states_TD[j]).max())
            self.max_state_error = float(np.max(errors))  # NaN stays NaN
            if demo.observed_before_action:
                if j == 0:
                    self._settle()
                yield j
                env.step(action)
            else:
                env.step(action)
                yield j

    def by_states(self) -> Iterator[int]:
        """Set every state; the last action is executed, so that the goal can be asked about."""
        last = len(self._demo) - 1
        for j in range(len(self._demo)):
            self.show(j)
            if j < last or self._demo.observed_before_action:
                yield j
        if self._demo.observed_before_action:
            self._execute_last()
        else:
            yield last

    def show(self, j: int) -> None:
        """Let ``env`` show the moment of ``obs[j]``, whatever it showed before."""
        self._at_start = False
        states_TD = self._demo.states_TD
        if self._demo.observed_before_action:
            self._set_state(states_TD[j])
            if j == 0:
                self._obey(SETTLE_ACTION)
                self._settle()
        elif j + 1 < len(states_TD):
            self._set_state(states_TD[j + 1])
        else:
            self._execute_last()

    def _restore(self) -> None:
        """Place the fixtures and start the episode."""
        env, demo = self._env, self._demo
        try:
            if demo.seed_and_init_state is not None:
                seed, init_state = demo.seed_and_init_state
                if not is_init_state(env.task, init_state):
                    found = f"init_state_index {init_state}"
                    raise damaged(demo.path, demo.name, found, expected=f"an initial state of {env.task.suite}")
                env.reset(seed, init_state, settle_steps=SETTLE_STEPS - 1)  # the last settling step is recorded
                self.scene = "seed"
            else:
                env.reset(0, demo.states_TD[0], settle_steps=0)
        except InputError as problem:
            raise damaged(demo.path, demo.name, problem.found, expected=problem.expected) from problem
        if env.flat_state().shape != demo.states_TD[0].shape:
            found = f"states of {demo.states_TD.shape[1]} numbers"
            raise damaged(demo.path, demo.name, found, expected=f"{env.flat_state().size} numbers for this task")
        placed = demo.scene is not None and self._place_as_in(demo.scene)
        if demo.seed_and_init_state is None:
            self.scene = "model_file" if placed else "unknown"
            self._set_state(demo.states_TD[0])
            if not demo.observed_before_action:  # those start from a reset, as this does
                self._obey(demo.actions_TA[0])
        self._at_start = True

    def _place_as_in(self, scene: dict[str, dict[str, Pose]]) -> bool:
        """Put bodies and cameras where the MJCF has them; False if it does not know every fixture of the task."""
        inner = self._env.simulator
        model = inner.sim.model._model
        places = [("body", model.body(i).name, model.body_pos[i], model.body_quat[i]) for i in range(model.nbody)]
        places += [("camera", model.cam(i).name, model.cam_pos[i], model.cam_quat[i]) for i in range(model.ncam)]
        for kind, name, pos_3, quat_4 in places:
            wanted_7 = scene[kind].get(name)
            if wanted_7 is not None and np.abs(wanted_7 - [*pos_3, *quat_4]).max() > _MOVED:
                pos_3[:], quat_4[:] = wanted_7[:3], wanted_7[3:]
        return all(fixture.root_body in scene["body"] for fixture in inner.fixtures_dict.values())

    def _set_state(self, state_D: NDArray[np.float64]) -> None:
        """What ControlEnv.set_init_state does, with the recording's phase of sampling."""
        inner = self._env.simulator
        inner.sim.set_state_from_flattened(state_D)
        inner.sim.forward()
        inner._check_success()
        inner._post_process()  # a stove's glow
        for observable in inner._observables.values():
            observable.reset()
        for _ in range(_BEFORE_ACTION_UPDATES if self._demo.observed_before_action else _AFTER_ACTION_UPDATES):
            inner._update_observables(force=True)

    def _obey(self, action_A: NDArray[np.float64]) -> None:
        """Let the controller have arrived where the hand is, and the gripper have obeyed ``action_A``."""
        robot = self._env.simulator.robots[0]
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        for _ in range(_GRIPPER_RAMP_STEPS):
            robot.gripper.format_action(action_A[-1:])

    def _settle(self) -> None:
        for _ in range(SETTLE_STEPS):
            self._env.step(SETTLE_ACTION)

    def _execute_last(self) -> None:
        self._set_state(self._demo.states_TD[-1])
        self._obey(self._demo.actions_TA[-2])
        self._env.step(self._demo.actions_TA[-1])


@contextlib.contextmanager
def reading(path: Path, name: str) -> Iterator[h5py.File]:
    """An open file; HDF5's own errors inside the block become ``SourceDamaged``, named by file and demonstration."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as problem:
        raise damaged(path, name, str(problem)) from problem


def damaged(path: Path, name: str, found: str, *, expected: str = "the official LIBERO layout") -> SourceDamaged:
    """The error that names a file and, if the fault is in one, a demonstration."""
    return SourceDamaged(
        f"{path}: data/{name} cannot be replayed" if name else f"{path} cannot be replayed",
        expected=expected,
        found=found,
        fix="download or record the file again, or leave it out",
    )


def _numbers(path: Path, name: str, demo: Any, key: str) -> NDArray[np.float64]:
    """A field of [T, n] finite numbers."""
    values = member(demo, key, path)
    if not isinstance(values, h5py.Dataset) or values.ndim != 2 or values.dtype.kind not in "fiu":
        raise damaged(path, name, f"{key} is {values}", expected=f"{key}, numbers in rows")
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise damaged(path, name, f"{key} hold NaN or infinite numbers")
    return numbers


def _scene_of(path: Path, name: str, model_file: str) -> dict[str, dict[str, Pose]]:
    """Where an MJCF file has its bodies and cameras."""
    expected = "an MJCF scene with pos and quat, as MuJoCo saves them"
    try:
        root = ET.fromstring(model_file)
    except ET.ParseError as problem:
        raise damaged(path, name, f"model_file: {problem}", expected=expected) from problem
    scene: dict[str, dict[str, Pose]] = {}
    for kind in ("body", "camera"):
        scene[kind] = {}
        for element in root.iter(kind):
            numbers = f"{element.get('pos', '0 0 0')} {element.get('quat', '1 0 0 0')}".split()
            try:
                pose_7 = np.array(numbers, dtype=np.float64)
            except ValueError:
                pose_7 = np.full(0, np.nan)
            rotated_otherwise = any(key in element.attrib for key in _OTHER_ROTATIONS)
            if pose_7.shape != (7,) or not np.isfinite(pose_7).all() or rotated_otherwise:
                raise damaged(path, name, f"model_file: <{kind}> {element.attrib}", expected=expected)
            scene[kind][element.get("name", "")] = pose_7
    return scene
