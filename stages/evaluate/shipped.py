"""Exported policies in evaluation: those that come with geomcache, by name; what each is for; what it was measured at.

A policy that comes with geomcache is a folder ``configs/checkpoints/NAME`` as ``geomcache export`` writes it.
"""

import difflib
from importlib import resources
from pathlib import Path

from geomcache.cache_schemas.errors import InputError, UnknownName
from geomcache.pipeline.sim import spread, suites
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.results import read_results
from geomcache.stages.train.checkpoint import CARD_NAME, is_exported, read_card
from geomcache.stages.train.export_record import Measured, read_record

_RESULTS = Path("runs/eval")  # of exported policies, whose own folders hold nothing else


def shipped_folder() -> Path:
    """Where policies that come with geomcache lie; need not exist."""
    return Path(str(resources.files("geomcache"))) / "configs" / "checkpoints"


def shipped_names() -> list[str]:
    """Of the policies that come with geomcache."""
    return sorted(path.parent.name for path in shipped_folder().glob(f"*/{CARD_NAME}"))


def find_policy(run: Path) -> Path:
    """``run`` itself where there is such a path (or where it cannot be a name), else the shipped policy of that name.

    Raises:
        UnknownName: neither.
    """
    if run.exists() or len(run.parts) != 1:
        return run
    names = shipped_names()
    if run.name in names:
        return shipped_folder() / run.name
    close = difflib.get_close_matches(run.name, names, n=1, cutoff=0.5)
    raise UnknownName(
        f"there is neither a folder nor a shipped policy {run.name!r}"
        + (f"; did you mean {close[0]!r}?" if close else ""),
        expected=f"a run folder, or one of the policies that come with geomcache: {', '.join(names) or 'none here'}",
        found=repr(run.name),
        fix=f"use {close[0]}" if close else f"correct the path, or geomcache train --out {run} ...",
    )


def default_out(run: Path) -> Path:
    """Where results go that were not told where: ``RUN/eval``; of an exported policy ``runs/eval/NAME``."""
    return _RESULTS / run.resolve().name if is_exported(run) else run / "eval"


def with_defaults(config: EvalConfig) -> EvalConfig:
    """Suites and tasks that an exported policy was trained on, where the settings leave them open.

    Of a suite that it was not trained on, all tasks. Settings of a run that was not exported are returned as they are.

    Raises:
        InputError: it is not known for which suites it is, or it has different tasks in several suites.
        UnknownName: no such suite, or no such task in it.
    """
    if not is_exported(config.run):
        return config
    trained, given = read_record(config.run).tasks, config.model_fields_set
    found = config.suites if "suites" in given else tuple(suite for suite in trained if suite in suites.SUITES)
    if not found:
        raise InputError(
            f"{config.run} does not say for which suite it is",
            expected=f"one of {', '.join(suites.SUITES)}",
            found=", ".join(trained),
            fix="--suite SUITE",
        )
    tasks = config.tasks
    if "tasks" not in given:
        each = {_numbers(suite, trained[suite]) if suite in trained else None for suite in found}
        if len(each) > 1:
            raise InputError(
                f"{config.run} was trained on different tasks of {', '.join(found)}",
                expected="one choice of tasks for every suite",
                found="neither one --suite nor --tasks",
                fix=f"--suite {found[0]}",
            )
        (tasks,) = each
    steps = config.execute_steps
    if "execute_steps" not in given:
        steps = min(steps, read_card(config.run).policy.dit.horizon)
    return config.model_copy(update={"suites": found, "tasks": tasks, "execute_steps": steps})


def _changes(config: EvalConfig, suite: str) -> list[str]:
    """How the protocol differed from the plain one."""
    found = ["geometry masked"] if config.without_geometry else []
    if config.horizon not in (None, suites.horizon(suite)):
        found.append(f"{config.horizon} control steps instead of {suites.horizon(suite)}")
    if config.settle_steps != EvalConfig.model_fields["settle_steps"].default:
        found.append(f"{config.settle_steps} settling steps")
    return found + config.describe_changes()


def measured(folder: Path) -> list[Measured]:
    """What an evaluation found, a record for every suite.

    Raises:
        InputError: no results, unfinished ones, or those of weights that no export has.
    """
    results = read_results(folder)
    config = results.config
    if not results.finished:
        raise InputError(
            f"{folder} is unfinished, and says nothing of the episodes that are missing",
            expected="a finished evaluation",
            found=f"{len(results.episodes)} episodes",
            fix=f"geomcache eval --resume --out {folder}",
        )
    if not config.averaged:
        raise InputError(
            f"{folder} is of weights that do not act",
            expected="an evaluation of the averaged weights, which are exported",
            found="averaged: false",
            fix="evaluate the run without that setting",
        )
    found = []
    for suite in results.suites:
        own = [episode for episode in results.episodes if episode.suite == suite.suite]
        states = [episode.init_state for episode in own]
        found.append(
            Measured(
                weights=results.conditions.checkpoint_weights,
                suite=suite.suite,
                tasks=tuple(sorted({episode.task for episode in own})),
                init_states=(min(states), max(states)),
                seeds=tuple(sorted({episode.seed for episode in own})),
                execute_steps=config.execute_steps,
                changes=tuple(_changes(config, suite.suite)),
                episodes=suite.episodes,
                successes=suite.successes,
                low=suite.low,
                high=suite.high,
            )
        )
    return found


def _numbers(suite: str, names: tuple[str, ...]) -> tuple[int, ...]:
    """Of the tasks with these names; a data set may have named a task by its instruction."""
    base = spread.BASES.get(suite, suite)  # has the same tasks, and all of them
    known = [suites.task_info(base, number) for number in range(suites.task_count(base))]
    by_name = [{info.name, info.instruction.replace(" ", "_")} for info in known]
    if unknown := [name for name in names if not any(name in each for each in by_name)]:
        raise UnknownName(
            f"{suite} has no task {unknown[0]!r}, which the policy was trained on",
            expected=f"one of {', '.join(info.name for info in known)}",
            found=repr(unknown[0]),
            fix="--tasks NUMBERS",
        )
    return tuple(number for number, each in enumerate(by_name) if not each.isdisjoint(names))
