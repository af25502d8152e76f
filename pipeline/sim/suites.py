"""LIBERO's suites and tasks: names, instructions, episode lengths and shipped initial states.

Non-obvious:
- ``libero_10`` is the suite the literature calls "Long"; it is one suite of ten tasks, not ten suites.
- The instruction is the task's file name in words, as published policies are trained and evaluated with. The
  ``:language`` line of the task's BDDL file can be worded differently ("Pick the milk", "pick up the milk").
- The packages register dozens of perturbed suites; only the five public ones are named here.
"""

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import UnknownName
from geomcache.pipeline.sim.system import missing_part_named, quiet_simulator, require_simulator

# Suite -> the most control steps of one evaluation episode, after settling (OpenVLA's and openpi's numbers).
SUITES: dict[str, int] = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}


@dataclass(frozen=True)
class TaskInfo:
    """One task of a suite."""

    suite: str
    index: int
    name: str  # LIBERO's task name; the demonstration file is <name>_demo.hdf5
    instruction: str
    bddl_path: Path
    n_init_states: int


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
        n_init_states=len(_init_states(suite, index)),
    )


@functools.cache
def all_instructions() -> tuple[str, ...]:
    """Of every task of every suite, each once."""
    return tuple(sorted({str(b.get_task(i).language) for b in map(_benchmark, SUITES) for i in range(b.n_tasks)}))


def init_state(suite: str, index: int, i: int) -> NDArray[np.float64]:
    """Shipped initial state ``i`` of a task: MuJoCo's flat state [1 + nq + nv] (time, qpos, qvel)."""
    task = task_info(suite, index)
    if not 0 <= i < task.n_init_states:
        raise UnknownName(
            f"{suite} task {index} has no initial state {i}",
            expected=f"an index from 0 to {task.n_init_states - 1}",
            found=str(i),
            fix="use a smaller index, or take it modulo the number of initial states",
        )
    return np.array(_init_states(suite, index)[i], dtype=np.float64)


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

        return benchmark.get_benchmark_dict()[suite]()


@functools.cache
def _init_states(suite: str, index: int) -> NDArray[np.float64]:
    states = np.asarray(_benchmark(suite).get_task_init_states(index), dtype=np.float64)
    states.setflags(write=False)
    return states


def _names(benchmark: Any) -> list[str]:
    return [str(name) for name in benchmark.get_task_names()]
