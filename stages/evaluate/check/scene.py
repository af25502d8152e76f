"""The moment of a packed row made again in the simulator, and a demonstration's actions executed in it.

Non-obvious:
- Packs of `geomcache demos` carry (seed, init_state_index), from which the scene is restored exactly. A pack holds
  actions in float32, the recorder executed float64: over an episode states then differ by up to 2e-5 m, rad
  (libero_object) or 1e-3 (libero_spatial, a rim between the fingers), pictures by 0.02 to 0.33 grey levels on average
  (measured, 8 episodes); row 0 is equal bit for bit.
- Other packs hold nothing of the scene; the demonstration files that they were made of do (pipeline/sim/replay.py).
- After a row was left out as a no-op, the simulator is no longer where the next row was taken.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import GeomcacheError, InputError, MissingDependency
from geomcache.pipeline.frames import Observation
from geomcache.pipeline.orientation import to_upright
from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.libero_env import SETTLE_ACTION, LiberoEnv
from geomcache.pipeline.sim.replay import Replay, StoredDemo, is_init_state, read_demo
from geomcache.pipeline.sources._libero_files import find_files
from geomcache.stages.evaluate.check.opened import OpenedRun, StoredEpisode
from geomcache.stages.evaluate.config import EvalConfig

SETTLE_STEPS: int = EvalConfig.model_fields["settle_steps"].default
# m, rad. A third of a slow step; rounding alone leads up to 1e-3 away where something slips between the fingers, and
# from a demonstration file, which does not hold what the controller was aiming at, 2e-3.
STATE_TOLERANCE = 5e-3
START_TOLERANCE = 1e-3  # the same, of row 0, before any action
_SETTLED = 1e-4  # the same, to tell one number of settling steps from the next
_JOINTS = slice(1, 10)  # of a flat state: the arm's seven and the fingers' two come first
_PATIENCE = 10  # steps after the last action, in which the goal may still come true
_MOST_SETTLING = 2 * SETTLE_STEPS


_LARGEST_SEED = 2**32 - 1  # of numpy's generator, which LIBERO seeds
_PACK_AGAIN = "pack the files again: geomcache pack build"
NO_DEMOS = "nothing: LeRobot episodes are not numbered as demonstration files are; what remains is compared above"


@dataclass(frozen=True)
class NoScene:
    """Why the scene of an episode cannot be restored, and what would make it possible."""

    why: str
    fix: str


@dataclass(frozen=True)
class Scene:
    """An episode's scene in a simulator."""

    env: LiberoEnv
    episode: StoredEpisode
    start_from: "tuple[int, int] | StoredDemo"  # (seed, initial state), or the demonstration that was packed
    noisy: bool = False  # the recorder executed other actions than it labelled

    @property
    def executed_TA(self) -> NDArray[np.float64] | None:
        """What was executed, where that is not what was packed; row t answers the observation of row t."""
        if not self.noisy or isinstance(self.start_from, tuple):
            return None
        return self.start_from.actions_TA[_first_action(self.start_from) :][: len(self.episode)]

    def start(self, settle_steps: int | None = None) -> None:
        """Let the simulator show row 0 as the closed loop does; or after ``settle_steps`` that are counted here."""
        if isinstance(self.start_from, tuple):
            self.env.reset(*self.start_from, settle_steps=SETTLE_STEPS if settle_steps is None else 0)
            for _ in range(settle_steps or 0):
                self.env.step(SETTLE_ACTION)
        else:
            next(Replay(self.env, self.start_from).by_actions())

    def own_error(self) -> float:
        """How far the demonstration file's own actions lead from its own states here: of any joint, rad or m.

        0 for scenes made from a seed, whose states the pack itself holds.
        """
        if isinstance(self.start_from, tuple):
            return 0.0
        demo, largest = self.start_from, 0.0
        shown = _first_action(demo)  # states[j] is before action j
        for j in Replay(self.env, demo).by_actions():
            if j + shown < len(demo):
                apart = self.env.flat_state()[_JOINTS] - demo.states_TD[j + shown, _JOINTS]
                largest = max(largest, float(np.abs(apart).max()))
        return largest

    def render(self, camera: str, height: int, width: int) -> NDArray[np.uint8]:
        """[H, W, 3] upright, of the observed moment, at any size."""
        return to_upright(self.env.raw_camera(camera, (height, width)).rgb_HWC, "bottom_up", row_axis=0)


@dataclass
class Replayed:
    """What the simulator showed while a demonstration's actions were executed."""

    episode: StoredEpisode
    states_TS: NDArray[np.float32]  # [T, 8] before each action
    observed: dict[int, Observation]  # of some steps
    success: bool
    seconds_per_step: float  # of the simulator's own clock
    follows: bool = True  # the demonstration, row by row; else only row 0 is the same moment
    corrected: str | None = None  # the fault that had to be undone to follow the demonstration


@dataclass
class Scenes:
    """Scenes of a run's episodes; one simulator at a time."""

    run: OpenedRun
    demos: Path | None = None
    _open: dict[tuple[str, int], LiberoEnv] = field(default_factory=dict)

    def of(self, episode: StoredEpisode) -> "Scene | NoScene":
        """The scene of ``episode``; the simulator of another task is closed."""
        info = episode.pack.info
        if info.request.no_ops is not None and info.no_op_rows:
            return NoScene(
                f"{info.no_op_rows} rows of {episode.pack.path} were left out as no-ops: its actions do not lead on",
                "check a run that was trained on a pack built without --drop-no-ops",
            )
        if info.steps_per_row > 1:
            return NoScene(
                f"rows of {episode.pack.path} are {info.steps_per_row} control steps apart: not every moment of an "
                "episode is there to be followed",
                "check a run that was trained on demonstrations recorded without --every",
            )
        start, disturbed = None, False
        try:
            metadata = json.loads(episode.record.metadata)
            disturbed = float(metadata.get("noise", 0.0)) > 0.0 or "perturb" in metadata
            if "seed" in metadata:
                start = int(metadata["seed"]), int(metadata["init_state_index"])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as problem:
            return NoScene(f"the episode's metadata are damaged ({problem!r})", _PACK_AGAIN)
        fix = demos_fix(episode)
        try:
            if start is not None and not disturbed:
                env = self._env(episode)
                if not 0 <= start[0] <= _LARGEST_SEED or not is_init_state(env.task, start[1]):
                    return NoScene(f"the episode's metadata are damaged (seed, initial state: {start})", _PACK_AGAIN)
                return Scene(env, episode, start)
            if self.demos is None or fix == NO_DEMOS:
                executed = "noise or pushes were executed that the pack does not hold"
                why = executed if disturbed else "the pack does not hold the scene"
                return NoScene(why, fix)
            return Scene(self._env(episode), episode, _find_demo(self.demos, episode), disturbed)
        except MissingDependency:
            raise
        except GeomcacheError as problem:  # no such task, no such file
            return NoScene(f"{problem.what} ({problem.found})", problem.fix)

    def close(self) -> None:
        """Free the simulator."""
        for env in self._open.values():
            env.close()
        self._open.clear()

    def _env(self, episode: StoredEpisode) -> LiberoEnv:
        suite, contract = episode.record.suite, self.run.policy.card.contract
        tasks = {suites.task_info(suite, i).name: i for i in range(suites.task_count(suite))}
        key = suite, tasks.get(episode.record.task, -1)
        if key not in self._open:
            self.close()
            camera = contract.cameras[0]
            self._open[key] = LiberoEnv(
                *key,
                cameras=contract.camera_names,
                height=camera.height,
                width=camera.width,
                depth=self.run.policy.needs_depth,
            )
        return self._open[key]


def demos_fix(episode: StoredEpisode) -> str:
    """What makes a replay of a pack without its scenes possible."""
    if any(source.kind != "libero_hdf5" for source in episode.pack.info.request.sources):
        return NO_DEMOS
    return "--demos FOLDER with the HDF5 demonstration files that the pack was made of"


def _first_action(demo: StoredDemo) -> int:
    """The action that answers the first picture."""
    return 0 if demo.observed_before_action else 1


def _find_demo(folder: Path, episode: StoredEpisode) -> StoredDemo:
    name = f"{episode.record.task}_demo"
    for path in find_files(folder):
        if path.stem == name:
            demo = read_demo(path, f"demo_{episode.record.number}")
            if len(demo) - _first_action(demo) >= len(episode):
                return demo
            raise InputError(
                f"{demo.where} is not what was packed",
                expected=f"at least {len(episode)} rows",
                found=f"{len(demo)} actions",
                fix=demos_fix(episode),
            )
    raise InputError(
        f"{folder} holds no demonstrations of {episode.record.task}",
        expected=f"{name}.hdf5",
        found="other files",
        fix=demos_fix(episode),
    )


def replay(
    scene: Scene,
    actions_TA: NDArray[np.floating],
    steps: Sequence[int],
    *,
    repeats: int = 1,
    settle_steps: int | None = None,
) -> Replayed:
    """Execute one action after the other from row 0 on; look at ``steps``.

    Args:
        scene: of the demonstration.
        actions_TA: [T, 7] in environment units.
        steps: at which an observation is kept, before their action.
        repeats: control steps of each action.
        settle_steps: before row 0; None: as the closed loop settles.
    """
    env, states, observed, success = scene.env, [], {}, False
    scene.start(settle_steps)
    began = env.flat_state()[0]
    for step, action in enumerate(actions_TA):
        states.append(env.proprioception().state_S)
        if step in steps:
            observed[step] = env.observe()
        for _ in range(repeats):
            success = env.step(action) or success
    seconds = float(env.flat_state()[0] - began) / (len(actions_TA) * repeats)
    still = np.array([*np.zeros(6), actions_TA[-1, 6]])
    for _ in range(_PATIENCE):
        success = success or env.step(still)
    return Replayed(scene.episode, np.stack(states), observed, success, seconds)


def settle_steps_of(scene: Scene, state_S: NDArray[np.float32]) -> int | None:
    """After how many settling steps, counted here, the robot's state is ``state_S``; None: after none of the first."""
    if not isinstance(scene.start_from, tuple):
        return None
    scene.start(0)
    for step in range(_MOST_SETTLING + 1):
        if np.abs(scene.env.proprioception().state_S - state_S).max() < _SETTLED:
            return step
        scene.env.step(SETTLE_ACTION)
    return None
