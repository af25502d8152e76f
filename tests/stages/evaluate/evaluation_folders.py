"""Evaluation folders as ``geomcache eval`` leaves them, made through its schemas: only the episodes are invented."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.grasp import GraspMetrics
from geomcache.stages.evaluate.motion import MotionMetrics
from geomcache.stages.evaluate.results import (
    RESULTS_NAME,
    Conditions,
    EpisodeKey,
    EpisodeResult,
    EpisodeSeconds,
    EvalResults,
    Success,
    SuiteResult,
    task_results,
)

SECONDS = EpisodeSeconds(reset=2.0, physics=3.0, rendering=1.5, encoder=0.5, vlm=1.0, head=0.25, total=9.0)
HORIZONS = {"libero_object": 280, "libero_spatial": 220}


def episode(key: EpisodeKey, success: bool, **changes: Any) -> EpisodeResult:
    """One episode; a success lifts its target at the first attempt, a failure never lifts anything."""
    suite, task, init_state, seed = key
    values: dict[str, Any] = {
        "suite": suite,
        "task": task,
        "task_name": f"task_{task}",
        "instruction": f"put the <soup> {task} away",
        "init_state": init_state,
        "seed": seed,
        "success": success,
        "steps": 120 if success else 280,
        "queries": 15 if success else 35,
        "motion": MotionMetrics(
            ldlj=-8.0 if success else -12.0,
            jerk_rms=10.0,
            seam_ratio=1.5,
            action_change=0.1,
            path_length=1.0,
            path_efficiency=0.5,
            gripper_toggles=2,
        ),
        "grasp": GraspMetrics(
            targets=("soup_1",),
            attempts=1 if success else 2,
            first_attempt_success=success,
            grasped=success,
            wrong_object=False,
            drops=0,
        ),
        "seconds": SECONDS,
        "versions": {"geomcache": "0.1.0", "mujoco": "3.17.0"},
        "fingerprints": {"checkpoint": "c" * 64},
    }
    return EpisodeResult(**{**values, **changes})


def make_results(episodes: Sequence[EpisodeResult], **changes: Any) -> EvalResults:
    """What ``geomcache eval`` sums up; ``changes`` of config, of conditions, or of the record itself."""
    suites = list(dict.fromkeys(one.suite for one in episodes))
    conditions = {name: changes.pop(name) for name in list(changes) if name in Conditions.model_fields}
    config = {name: changes.pop(name) for name in list(changes) if name in EvalConfig.model_fields}
    return EvalResults(
        config=EvalConfig(**{"run": Path("gone"), "out": Path("out"), "suites": tuple(suites) or ("x",), **config}),
        conditions=Conditions(
            **{
                "checkpoint_weights": "w" * 64,
                "checkpoint_step": 500,
                "geomcache_version": "0.1.0",
                "mode": "reproducible",
                "batch_size": 1,
                "device": "cpu",
                **conditions,
            }
        ),
        **{
            "finished": True,
            "overall": Success(**Success.counts(episodes)),
            "suites": tuple(
                SuiteResult(
                    suite=suite,
                    horizon=config.get("horizon", HORIZONS[suite]),
                    **Success.counts([one for one in episodes if one.suite == suite]),
                )
                for suite in suites
            ),
            "tasks": task_results(episodes),
            "episodes": tuple(episodes),
            **changes,
        },
    )


def keys(
    suites: Iterable[str] = ("libero_object",),
    tasks: Iterable[int] = (0, 1),
    states: Iterable[int] = range(5),
    seeds: Iterable[int] = (7,),
) -> list[EpisodeKey]:
    """In the order of results.json."""
    tasks, states, seeds = list(tasks), list(states), list(seeds)
    return [(suite, task, state, seed) for suite in suites for task in tasks for seed in seeds for state in states]


def write_folder(
    folder: Path, found: Iterable[EpisodeKey], success: Callable[[EpisodeKey], bool], **changes: Any
) -> Path:
    """A folder with results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    results = make_results([episode(key, success(key)) for key in found], **changes)
    (folder / RESULTS_NAME).write_text(results.model_dump_json(indent=2))
    return folder
