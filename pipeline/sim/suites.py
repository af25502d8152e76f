"""LIBERO's suites and tasks, and ours with spread: names, instructions, episode lengths and initial states.

Initial states have numbers. In LIBERO's own suites they are the 50 shipped ones, for evaluation and demonstrations
alike. A suite with spread (spread.py) has the tasks of its base, and other states: the first ones (0 to 49; 0 to 23 in
libero_object_choice) for evaluation, those behind them for demonstrations. In libero_object_choice (choice.py) a state
also says which scene it is in.

Non-obvious:
- ``libero_10`` is the suite the literature calls "Long"; it is one suite of ten tasks, not ten suites.
- The instruction is the task's file name in words, as published policies are trained and evaluated with. The
  ``:language`` line of the task's BDDL file can be worded differently ("Pick the milk", "pick up the milk").
- The packages register dozens of perturbed suites; only the five public ones and our own three are named here.
- Task names, BDDL files and instructions do not tell a suite with spread from its base.
"""

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import UnknownName
from geomcache.cache_schemas.fingerprint import digest_bytes
from geomcache.pipeline.sim import choice, spread
from geomcache.pipeline.sim.system import missing_part_named, quiet_simulator, require_simulator

# Suite -> the most control steps of one evaluation episode, after settling (OpenVLA's and openpi's numbers).
PUBLIC_SUITES: dict[str, int] = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
# The same, with the suites of spread.py: whatever evaluation and the recorder accept.
SUITES: dict[str, int] = PUBLIC_SUITES | {suite: PUBLIC_SUITES[base] for suite, base in spread.BASES.items()}


@dataclass(frozen=True)
class TaskInfo:
    """One task of a suite."""

    suite: str
    index: int
    name: str  # LIBERO's task name; the demonstration file is <name>_demo.hdf5
    instruction: str
    bddl_path: Path  # LIBERO's own file
    n_init_states: int  # those that evaluation uses: 0 to n - 1


def horizon(suite: str) -> int:
    """The most control steps of one episode of ``suite``."""
    _require_suite(suite)
    return SUITES[suite]


def task_count(suite: str) -> int:
    """How many tasks ``suite`` has."""
    return int(_benchmark(suite).n_tasks)


@functools.cache
def task_info(suite: str, index: int) -> TaskInfo:
    """Describe task ``index`` of ``suite``; raises ``UnknownName`` when there is none."""
    benchmark = _benchmark(suite)
    if not 0 <= index < benchmark.n_tasks:
        raise UnknownName(
            f"{suite} has no task {index}",
            expected=f"a task index from 0 to {benchmark.n_tasks - 1}",
            found=str(index),
            fix="\n".join(["choose one of:", *(f"    {i}  {name}" for i, name in enumerate(_names(benchmark)))]),
        )
    task = benchmark.get_task(index)
    return TaskInfo(
        suite=suite,
        index=index,
        name=task.name,
        instruction=task.language,
        bddl_path=Path(benchmark.get_task_bddl_file_path(index)).resolve(),
        n_init_states=len(_evaluation_states(suite, index)),
    )


@functools.cache
def instructions(suite: str) -> tuple[str, ...]:
    """Of every task of ``suite``, in order; no placements are looked for."""
    benchmark = _benchmark(suite)
    return tuple(str(benchmark.get_task(i).language) for i in range(benchmark.n_tasks))


@functools.cache
def all_instructions() -> tuple[str, ...]:
    """Of every task of every suite, each once."""
    return tuple(sorted({each for suite in PUBLIC_SUITES for each in instructions(suite)}))


def demo_states(suite: str, index: int) -> range:
    """The numbers of the initial states from which demonstrations are recorded; see the module's first lines."""
    task_info(suite, index)  # so that an unknown name is told as such
    evaluation = _evaluation_states(suite, index)
    if suite in spread.BASES:
        demonstrations = len(spread.task_spread(suite, index).demonstrations) * _states_of_a_placement(suite)
        return range(len(evaluation), len(evaluation) + demonstrations)
    return evaluation


def init_state(suite: str, index: int, i: int) -> NDArray[np.float64]:
    """Initial state ``i`` of a task, of evaluation or of demonstrations.

    MuJoCo's flat state [1 + nq + nv] (time, qpos, qvel).
    """
    evaluation, demonstrations = range(task_info(suite, index).n_init_states), demo_states(suite, index)
    if i not in evaluation and i not in demonstrations:
        raise UnknownName(
            f"{suite} task {index} has no initial state {i}",
            expected=f"an index from 0 to {max([*evaluation, *demonstrations])}",
            found=str(i),
            fix="use a smaller index, or take it modulo the number of initial states",
        )
    scene, number = _scene(suite, index, i)
    shipped_ND = _shipped_states(suite, scene)
    if suite in spread.BASES:
        return spread.task_spread(suite, scene).state(number, shipped_ND)
    return np.array(shipped_ND[number], dtype=np.float64)


def init_state_digest(suite: str, index: int, i: int) -> str:
    """Of an initial state's numbers: another list of states gives another one."""
    return digest_bytes(init_state(suite, index, i).tobytes())


def scene_bddl(suite: str, index: int, i: int) -> str | None:
    """BDDL text of the scene that initial state ``i`` of a task is in; None: the one that the task's own file has."""
    scene, _ = _scene(suite, index, i)
    if scene == index:
        return None
    return choice.with_task_of(_bddl(suite, scene), _bddl(suite, index))


def instructions_at(suite: str, index: int, i: int) -> list[str]:
    """What a policy can be told at initial state ``i``: the instructions of the suite's tasks.

    In the choice suite only those whose object is in the scene.
    """
    if suite != choice.SUITE:
        return list(instructions(suite))
    scene, _ = _scene(suite, index, i)
    objects = choice.objects_of(_bddl(suite, scene))
    return [told for other, told in enumerate(instructions(suite)) if choice.target_of(_bddl(suite, other)) in objects]


@functools.cache
def goal_state(suite: str, instruction: str) -> tuple[tuple[str, ...], ...]:
    """The goal predicates of the first task of ``suite`` that has this instruction, as LIBERO's parser reads them."""
    path = _benchmark(suite).get_task_bddl_file_path(instructions(suite).index(instruction))
    with missing_part_named(), quiet_simulator():
        from libero.libero.envs import bddl_utils

        problem = bddl_utils.robosuite_parse_problem(path)
    return tuple(map(tuple, problem["goal_state"]))


def _require_suite(suite: str) -> None:
    if suite in SUITES:
        return
    close = difflib.get_close_matches(suite, SUITES, n=1, cutoff=0.5)
    raise UnknownName(
        f"there is no LIBERO suite {suite!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
        expected=f"one of {', '.join(SUITES)}",
        found=repr(suite),
        fix=f"use {close[0]}" if close else "use one of the names above",
    )


@functools.cache
def _benchmark(suite: str) -> Any:
    _require_suite(suite)
    require_simulator()
    with missing_part_named(), quiet_simulator():
        from libero.libero import benchmark

        return benchmark.get_benchmark_dict()[spread.BASES.get(suite, suite)]()


def _scene(suite: str, index: int, i: int) -> tuple[int, int]:
    """(the task whose scene initial state ``i`` is in, the state's number among that task's placements or states)."""
    if suite != choice.SUITE:
        return index, i
    scenes = [choice.objects_of(_bddl(suite, scene)) for scene in range(task_count(suite))]
    return choice.scene_and_layout(choice.target_of(_bddl(suite, index)), scenes, i)


def _states_of_a_placement(suite: str) -> int:
    return choice.STATES_OF_A_LAYOUT if suite == choice.SUITE else 1


@functools.cache
def _bddl(suite: str, index: int) -> str:
    return Path(_benchmark(suite).get_task_bddl_file_path(index)).read_text(encoding="utf-8")


def _evaluation_states(suite: str, index: int) -> range:
    if suite in spread.BASES:
        return range(len(spread.task_spread(suite, index).evaluation) * _states_of_a_placement(suite))
    return range(len(_shipped_states(suite, index)))


@functools.cache
def _shipped_states(suite: str, index: int) -> NDArray[np.float64]:
    states = np.asarray(_benchmark(suite).get_task_init_states(index), dtype=np.float64)
    states.setflags(write=False)
    return states


def _names(benchmark: Any) -> list[str]:
    return [str(name) for name in benchmark.get_task_names()]
