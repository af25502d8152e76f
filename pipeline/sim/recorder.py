"""Recording the scripted expert into files of LIBERO's own demonstration layout.

One file per task, ``<task.name>_demo.hdf5``; every field and attribute of LIBERO's ``create_dataset.py`` (with
depth) under the same name, and these of our own:

    data                attrs: suite, instruction, recorded_by, recorder_config, recorder_digest, cap_index,
                        camera_names; observe_every, if not 1
    data/demo_i         attrs: depth_near, depth_far [m], robot_base_pose [16], seed, init_state_index, noise;
                        observe_every, if not 1; perturb (JSON), if there were pushes; bddl_file_content, if the
                        scene is not that of the file's own (libero_object_choice)
                        actions_executed [T, 7] f64, if noise or pushes were executed
                        perturbed [T] u8, if there were pushes: the executed action carried one
    data/demo_i/obs     <cam>_intrinsics [T, 3, 3] f64 pixels, for the upright image
                        <cam>_extrinsics [T, 4, 4] f64 camera-to-WORLD, metres, OpenCV axes

Depth is the raw z-buffer [T, H, W, 1]; metres = near / (1 - z * (1 - near / far)) (camera_geometry.metric_depth).

Non-obvious:
- Official timing: ``states[j]`` is BEFORE action j, ``obs[j]`` AFTER it. So the observation the first expert action
  was chosen on would be missing; the last settling no-op is therefore kept as step j = 0. LIBERO's script records
  all settling steps and drops the first 5 (cap_index 5); here the others are never recorded, and cap_index is 0.
- ``actions`` are the expert's clean answers; where noise or pushes were executed, replay ``actions_executed``.
- Images and depth are raw, rows bottom-up; the camera robot0_eye_in_hand is called eye_in_hand.
- Each episode is planned without rendering; a success is then replayed with rendering, and every state of the replay
  must equal the planned one exactly. The live simulator under the same seed shows the same frames bit for bit.
- ``observe_every`` k > 1 is no official layout: ``obs`` and ``robot_states`` have ceil(T / k) rows, after actions 0, k,
  2k, ... Rendering then costs less than solving again, so the plan is observed while it is made; rendering does not
  change the dynamics, and a failed attempt's few pictures are thrown away.
- The recording stops when the goal holds after an opening of the gripper was commanded: ``On`` can hold while the
  object is still being held.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError, UnknownName
from geomcache.pipeline.files import locked_folder
from geomcache.pipeline.ray_workers import Pool, run_tasks
from geomcache.pipeline.sim import demo_file, suites
from geomcache.pipeline.sim.demo_file import Config, Demo
from geomcache.pipeline.sim.expert import ScriptedExpert
from geomcache.pipeline.sim.libero_env import SETTLE_ACTION, LiberoEnv
from geomcache.pipeline.sim.observation_rows import ObservationRows
from geomcache.pipeline.sim.perturbation import Disturber, Perturbation
from geomcache.pipeline.sim.system import require_simulator

__all__ = ["Config", "EpisodeReport", "Perturbation", "Plan", "RecordSummary", "plan_episode", "record"]

log = logging.getLogger(__name__)
_ADVICE = "give it more memory: fewer --workers; finished demonstrations are kept"


@dataclass(frozen=True)
class EpisodeReport:
    """What the progress callback is told after every attempt."""

    task_index: int
    task: str
    attempt: int  # from 0, within the task
    seed: int
    init_state_index: int
    succeeded: bool
    demos: int  # of this task so far; counted by the process that gathers the reports
    wanted: int
    steps: int
    plan_seconds: float  # rendering included where it was planned and observed at once (observe_every > 1)
    render_seconds: float


@dataclass(frozen=True)
class RecordSummary:
    """What one call of ``record`` did; skipped files are complete ones of an earlier call."""

    attempted: int
    succeeded: int
    failed: int
    frames: int  # time steps written, all views counted once
    seconds: float
    files: tuple[Path, ...]  # every file that now holds the wanted demonstrations, skipped ones included
    skipped: tuple[Path, ...] = ()
    short_tasks: tuple[str, ...] = ()  # tasks with fewer demonstrations than wanted when the attempts ran out


@dataclass(frozen=True)
class Plan:
    """A solved episode: what was done and every state it went through."""

    labels_TA: NDArray[np.float64]  # [T, 7] clean actions; row 0 is the last settling no-op
    executed_TA: NDArray[np.float64]  # [T, 7]
    perturbed_T: NDArray[np.bool_]  # [T] whether the executed action carried a push
    states_TD: NDArray[np.float64]  # [T, D] before each action
    final_state_D: NDArray[np.float64]  # [D]


def record(config: Config, out: Path, progress: Callable[[EpisodeReport], None] | None = None) -> RecordSummary:
    """Record demonstrations of every task in ``config`` under the folder ``out``.

    A task whose finished file was made from the same configuration is skipped; a file that holds something else
    is an ``InputError`` before anything is recorded. The files do not depend on the number of workers.
    """
    started = time.perf_counter()
    require_simulator()
    tasks = [suites.task_info(config.suite, i) for i in config.tasks or range(suites.task_count(config.suite))]
    files = {task: out / f"{task.name}_demo.hdf5" for task in tasks}
    skipped = [task for task in tasks if _is_recorded(files[task], config, task)]
    with locked_folder(out):
        return _record_tasks(config, out, tasks, skipped, files, progress, started)


def _record_tasks(
    config: Config,
    out: Path,
    tasks: list[suites.TaskInfo],
    skipped: list[suites.TaskInfo],
    files: dict[suites.TaskInfo, Path],
    progress: Callable[[EpisodeReport], None] | None,
    started: float,
) -> RecordSummary:
    open_tasks = {task.index: _OpenTask(config, task, files[task]) for task in tasks if task not in skipped}
    attempts = [attempt for each in open_tasks.values() for attempt in each.next_attempts()]
    for each in open_tasks.values():
        each.finish_if_over()
    pool = Pool(
        count=min(config.workers, max(1, len(attempts))), what="a recording worker", advice=_ADVICE, tasks_each=1
    )
    for _, report in run_tasks(AttemptWorker, (config, out), attempts, pool):
        task = open_tasks[report.task_index]
        attempts[:0] = task.take(report)  # in front, while the simulator of this task is up
        if progress is not None:
            progress(replace(report, demos=task.demos))
        task.finish_if_over()
    return RecordSummary(
        attempted=sum(task.tried for task in open_tasks.values()),
        succeeded=sum(task.succeeded for task in open_tasks.values()),
        failed=sum(task.tried - task.succeeded for task in open_tasks.values()),
        frames=sum(task.steps for task in open_tasks.values()),
        seconds=time.perf_counter() - started,
        files=tuple(files[task] for task in tasks if task in skipped or open_tasks[task.index].demos),
        skipped=tuple(files[task] for task in skipped),
        short_tasks=tuple(task.name for task in open_tasks.values() if task.demos < config.episodes),
    )


def _is_recorded(path: Path, config: Config, task: suites.TaskInfo) -> bool:
    """Whether the task's file is complete; a file that holds fewer demonstrations of the same kind is continued."""
    if not path.exists():
        return False
    digest, attempts = demo_file.recorded_in(path)
    if digest == config.digest(task) and len(attempts) <= config.episodes:
        return len(attempts) == config.episodes
    found = "another recorder configuration"
    if digest is None:
        found = "a file that this recorder did not write"
    elif digest == config.digest(task):
        found = f"{len(attempts)} demonstrations, {config.episodes} were asked for"
    raise InputError(
        f"{path} exists and holds other demonstrations",
        expected="no file there, or one recorded with the same configuration",
        found=found,
        fix=f"record into another folder, or remove it: rm {path}",
    )


@dataclass(frozen=True)
class Attempt:
    """One try of the expert; its number decides seed, initial state and noise."""

    task_index: int
    number: int


class _OpenTask:
    """The bookkeeping of one task: attempts are numbered, and the first successes in that order are kept.

    As many attempts are under way as demonstrations are missing, never more, so that any number of workers makes the
    same attempts as one.
    """

    def __init__(self, config: Config, task: suites.TaskInfo, path: Path) -> None:
        self._config, self.name, self._index = config, task.name, task.index
        self._collection = demo_file.DemoCollection(path, config, task)
        self._most = config.max_attempts if config.max_attempts is not None else 2 * config.episodes
        self._next = self._running = 0
        self._is_over = False
        self._kept: list[int] = []  # attempts whose demonstrations make the file
        self.tried = self.succeeded = self.steps = 0

    @property
    def demos(self) -> int:
        """Demonstrations so far."""
        return len(self._kept)

    def next_attempts(self) -> list[Attempt]:
        """What must be tried now; demonstrations of an earlier run are counted."""
        attempts = []
        while self.demos + self._running < self._config.episodes and self._next < self._most:
            if self._next in self._collection:
                self._kept.append(self._next)
            else:
                attempts.append(Attempt(self._index, self._next))
                self._running += 1
            self._next += 1
        return attempts

    def take(self, report: EpisodeReport) -> list[Attempt]:
        """Count one finished attempt; returns those that must follow."""
        self._running -= 1
        self.tried += 1
        if report.succeeded:
            self._collection.include(report.attempt)
            self.succeeded += 1
            self._kept.append(report.attempt)
        return self.next_attempts()

    def finish_if_over(self) -> None:
        """Join the demonstrations under the task's name when nothing more will come."""
        if self._running or self._is_over:
            return
        self._is_over = True
        self.steps = self._collection.finish(self._kept)
        if self.demos < self._config.episodes:
            log.warning("%s: %d of %d demonstrations", self.name, self.demos, self._config.episodes)


class AttemptWorker:
    """Tries, and records what succeeds; holds the simulator of one task at a time."""

    def __init__(self, config: Config, out: Path) -> None:
        self._config, self._out = config, out
        self._env: LiberoEnv | None = None

    def start(self) -> None:
        """Say at once when there is no simulator."""
        require_simulator()

    def run(self, attempt: Attempt) -> EpisodeReport:
        """One attempt; a success is safe on disk when this returns."""
        config, env = self._config, self._simulator(attempt.task_index)
        task = env.task
        seed = config.seed + attempt.number
        states = suites.demo_states(config.suite, task.index)
        if not states:
            raise UnknownName(
                f"no placements for demonstrations are listed for {config.suite} task {task.index}",
                expected="a task with some",
                found="placements for evaluation alone",
                fix="draw them: python -m geomcache.pipeline.sim.spread_draw "
                f"--suite {config.suite} --tasks {task.index} --out FOLDER",
            )
        init = states[(config.first_init_state + attempt.number) % len(states)]
        started = time.perf_counter()
        observed = ObservationRows(config.observe_every)
        at_once = observed if config.observe_every > 1 else None
        plan = plan_episode(env, seed, init, config.noise, config.perturb, at_once)
        planned = time.perf_counter()
        if plan is not None:
            if at_once is None:
                _replay(env, plan, seed, init, observed)
            demo = Demo(
                env,
                config,
                attempt=attempt.number,
                seed=seed,
                init_state_index=init,
                labels_TA=plan.labels_TA,
                executed_TA=plan.executed_TA,
                perturbed_T=plan.perturbed_T,
                states_TD=plan.states_TD,
                observed=observed,
            )
            demo_file.write_part(self._out / f"{task.name}_demo.hdf5", config, task, demo)
        return EpisodeReport(
            task_index=task.index,
            task=task.name,
            attempt=attempt.number,
            seed=seed,
            init_state_index=init,
            succeeded=plan is not None,
            demos=0,
            wanted=config.episodes,
            steps=0 if plan is None else len(plan.labels_TA),
            plan_seconds=planned - started,
            render_seconds=time.perf_counter() - planned,
        )

    def close(self) -> None:
        """Free the simulator."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _simulator(self, task_index: int) -> LiberoEnv:
        if self._env is None or self._env.task.index != task_index:
            self.close()
            config = self._config
            self._env = LiberoEnv(
                config.suite, task_index, cameras=config.cameras, height=config.height, width=config.width, depth=True
            )
        return self._env


def _start(env: LiberoEnv, seed: int, init: int, settle_steps: int) -> None:
    env.reset(seed, init, settle_steps=settle_steps - 1)  # the last settling step is recorded


def plan_episode(
    env: LiberoEnv,
    seed: int,
    init: int,
    noise: float,
    perturb: Perturbation | None = None,
    observed: ObservationRows | None = None,
) -> Plan | None:
    """Run the expert, rendering only for ``observed``; None when it failed within the suite's horizon."""
    disturber = Disturber(seed, noise, perturb)
    _start(env, seed, init, demo_file.SETTLE_STEPS)
    labels, executed, perturbed = [SETTLE_ACTION.copy()], [SETTLE_ACTION.copy()], [False]
    states = [env.flat_state()]
    env.step(SETTLE_ACTION)
    if observed is not None:
        observed.take(env)
    for label in ScriptedExpert(env).actions():
        if len(labels) > env.horizon:
            return None
        action, pushed = disturber.disturb(label)
        labels.append(label)
        executed.append(action)
        perturbed.append(pushed)
        states.append(env.flat_state())
        success = env.step(action)
        if observed is not None:
            observed.take(env)
        if success and label[-1] < 0.0:
            return Plan(np.stack(labels), np.stack(executed), np.array(perturbed), np.stack(states), env.flat_state())
    return None


def _replay(env: LiberoEnv, plan: Plan, seed: int, init: int, observed: ObservationRows) -> None:
    """Execute the plan again, rendering after every step, and prove that it is the same episode."""
    _start(env, seed, init, demo_file.SETTLE_STEPS)
    for j, action in enumerate(plan.executed_TA):
        _require_equal(env.flat_state(), plan.states_TD[j], seed, j)
        env.step(action)
        observed.take(env)
    _require_equal(env.flat_state(), plan.final_state_D, seed, len(plan.labels_TA))


def _require_equal(found: NDArray[np.float64], planned: NDArray[np.float64], seed: int, step: int) -> None:
    if not np.array_equal(found, planned):
        error = float(np.abs(found - planned).max())
        raise RuntimeError(
            f"the simulator did not repeat itself (seed {seed}, step {step}, largest state error {error:g})"
        )
