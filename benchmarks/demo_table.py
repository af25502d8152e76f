"""Which tasks the scripted expert solves, in how many steps: planned in the real simulator, nothing rendered.

    python benchmarks/demo_table.py [--states 10] [--suites libero_object libero_spatial] [--noise 0 [0.1 ...]]
                                    [--workers 2] [--out docs/demo_table.md] [--json FILE]

Attempt k is the recorder's attempt k (``geomcache demos``): seed k, shipped initial state k. Keys of the flat JSON:
<suite>_noise_<noise>_{successes, attempts, fewest_of_a_task, mean_steps}.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from geomcache.cache_schemas.errors import GeomcacheError
from geomcache.pipeline.files import write_atomic
from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.recorder import plan_episode
from geomcache.pipeline.sim.system import require_simulator

SUITES = ("libero_object", "libero_spatial")  # what the expert is made for
PREAMBLE = """# What the scripted expert solves

Made by `{command}` with {versions}.

The expert reads the simulator's privileged state and makes demonstrations for trying the pipeline out. They are narrow
(one style, short paths): scripted data, not LIBERO's human demonstrations, and no result of a policy.

Attempt k, from 0 to {last}, has seed k and starts from shipped initial state k, as in `geomcache demos`. Solved means
LIBERO's own goal predicate, after the gripper was told to open, within the suite's episode length. Steps are control
steps (20 a second) of the solved attempts without settling: mean (fewest-most). Noise is the standard deviation added
to the executed xyz action, whose range is -1 to 1; the expert sees only where it led."""


@dataclass(frozen=True)
class TaskResult:
    """What the expert did with one task."""

    suite: str
    index: int
    noise: float
    steps: tuple[int | None, ...]  # of attempt k, settling not counted; None: it failed

    @property
    def solved(self) -> list[int]:
        """Steps of the attempts that succeeded."""
        return [steps for steps in self.steps if steps is not None]

    @property
    def failed(self) -> list[int]:
        """Numbers of the attempts that did not."""
        return [k for k, steps in enumerate(self.steps) if steps is None]


def try_task(suite: str, index: int, states: int, noise: float) -> TaskResult:
    """Let the expert try one task from its first shipped states; the unit of work of one process."""
    steps: list[int | None] = []
    with LiberoEnv(suite, index, depth=False) as env:
        for k in range(states):
            plan = plan_episode(env, k, k, noise)
            steps.append(None if plan is None else len(plan.labels_TA) - 1)  # row 0 is the last settling step
            answer = "failed" if plan is None else f"{steps[-1]} steps"
            print(f"{suite} task {index}, noise {noise:g}, attempt {k}: {answer}", file=sys.stderr, flush=True)
    return TaskResult(suite, index, noise, tuple(steps))


def try_all(units: Iterable[tuple[str, int, int, float]], workers: int) -> list[TaskResult]:
    """Every unit in a pool of spawned processes: a simulator does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(try_task, *unit) for unit in units]
        try:
            results = [future.result() for future in as_completed(futures)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(results, key=lambda result: (result.suite, result.index, result.noise))


def markdown(results: Sequence[TaskResult], states: int, noises: Sequence[float]) -> str:
    """The document: how it was made, one table a suite."""
    names = list(dict.fromkeys(result.suite for result in results))
    command = f"python benchmarks/demo_table.py --states {states} --suites {' '.join(names)}"
    command += f" --noise {' '.join(f'{noise:g}' for noise in noises)}"
    lines = [PREAMBLE.format(command=command, versions=", ".join(versions()), last=states - 1)]
    heads = [f"{column}, noise {noise:g}" for noise in noises for column in ("solved", "steps")]
    for suite in names:
        lines += ["", f"## {suite}", "", f"Episode length: {suites.horizon(suite)} steps.", ""]
        lines += [_row("task", "instruction", *heads), "|---" * (2 + len(heads)) + "|"]
        of_suite = [result for result in results if result.suite == suite]
        for index in sorted({result.index for result in of_suite}):
            cells = [_cells([result]) for result in of_suite if result.index == index]
            lines.append(_row(str(index), suites.task_info(suite, index).instruction, *sum(cells, ())))
        cells = [_cells([result for result in of_suite if result.noise == noise]) for noise in noises]
        lines.append(_row("all", "", *sum(cells, ())))
    return "\n".join(lines) + "\n"


def _cells(results: Sequence[TaskResult]) -> tuple[str, ...]:
    """("solved", "steps") of one task or several."""
    steps = [n for result in results for n in result.solved]
    failed = results[0].failed if len(results) == 1 else []
    which = f" (not {', '.join(map(str, failed))})" if failed else ""
    solved = f"{len(steps)}/{sum(len(result.steps) for result in results)}{which}"
    return solved, f"{statistics.mean(steps):.0f} ({min(steps)}-{max(steps)})" if steps else "-"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def figures(results: Sequence[TaskResult]) -> dict[str, float]:
    """Flat figures of every suite and noise."""
    flat: dict[str, float] = {}
    for suite, noise in dict.fromkeys((result.suite, result.noise) for result in results):
        some = [result for result in results if (result.suite, result.noise) == (suite, noise)]
        solved = [steps for result in some for steps in result.solved]
        key = f"{suite}_noise_{noise:g}"
        flat[f"{key}_successes"] = len(solved)
        flat[f"{key}_attempts"] = sum(len(result.steps) for result in some)
        flat[f"{key}_fewest_of_a_task"] = min(len(result.solved) for result in some)
        flat[f"{key}_mean_steps"] = round(statistics.mean(solved), 1) if solved else 0.0
    return flat


def versions() -> list[str]:
    """Names and versions of the packages that decide the result."""
    packages = ["mujoco", "robosuite", *sorted(set(metadata.packages_distributions()["libero"]))]
    return [f"{package} {metadata.version(package)}" for package in packages]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=10)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/demo_table.md"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.states < 1 or arguments.workers < 1:
        parser.error("--states and --workers are at least 1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the workers
    chosen, noises = list(dict.fromkeys(arguments.suites)), sorted(set(arguments.noise))
    try:
        require_simulator()
        tasks = [(suite, index) for suite in chosen for index in range(suites.task_count(suite))]
        units = [(*task, arguments.states, noise) for task in tasks for noise in noises]
        results = try_all(units, arguments.workers)
    except GeomcacheError as problem:
        print(problem, file=sys.stderr)
        return 2
    write_atomic(arguments.out, markdown(results, arguments.states, noises))
    flat = figures(results)
    print(json.dumps(flat))
    if arguments.json:
        write_atomic(arguments.json, json.dumps(flat))
    return 0


if __name__ == "__main__":
    sys.exit(main())
