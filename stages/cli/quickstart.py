"""``geomcache quickstart``: the whole chain at tiny size, in the real simulator, on a laptop."""

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomcache.cache_schemas.errors import TrainingFailed
from geomcache.stages.cli import chain
from geomcache.stages.cli.common import EXIT_FINDING, ConfigOption, JsonOption, SetOption, say, show_table

if TYPE_CHECKING:
    from geomcache.configs.schema import QuickstartConfig
    from geomcache.stages.evaluate.config import EvalConfig
    from geomcache.stages.train.config import TrainConfig


def quickstart(
    out: Annotated[Path | None, typer.Option(help="Folder for everything; default runs/quickstart.")] = None,
    config: ConfigOption = "quickstart/quickstart",
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the whole chain: demonstrations, pack, extract, train, eval, report.

    Finished stages are recognised by what they were made from and skipped. Exit 1 when a policy did not learn.
    """
    from geomcache.configs.load import load_config
    from geomcache.configs.schema import QuickstartConfig
    from geomcache.pipeline.files import write_config

    settings = load_config(QuickstartConfig, config, sets or [], {"out": out})
    _check(settings)
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    for name, stage in (
        ("demos", _demos),
        ("pack", _pack),
        ("extract", _extract),
        ("probe", _probe),
        ("train", _train),
        ("eval", _evaluate),
    ):
        began = time.perf_counter()
        stage(settings)
        seconds[name] = round(time.perf_counter() - began, 1)
    write_config(settings.out, settings)
    failed = _report(settings, as_json, seconds, time.perf_counter() - started)
    if failed:
        say(
            f"not learned: {', '.join(failed)}: the open-loop error on training frames is not below "
            f"{settings.largest_open_loop_ratio:g} of the mean action's"
        )
        raise typer.Exit(EXIT_FINDING)


def _demos(settings: "QuickstartConfig") -> None:
    chain.run_part("demos", partial(chain.demos, settings))


def _pack(settings: "QuickstartConfig") -> None:
    chain.run_part("pack", partial(chain.pack, settings))


def _extract(settings: "QuickstartConfig") -> None:
    for name in settings.extract:
        chain.run_part(f"extract {name}", partial(chain.extract, settings, name))


def _probe(settings: "QuickstartConfig") -> None:
    """Does a cache carry information? Its tokens must tell more than those it is compared with."""
    for name, against in settings.probe.items():
        found: list[float] = []
        chain.run_part(f"probe {name}", partial(_r2_of, settings, (name, against), found))
        say(f"a linear map reads surfaces from {name} with R^2 {found[0]:.2f}, from {against} with {found[1]:.2f}")
        if not found[0] > found[1]:
            raise TrainingFailed(
                f"the tokens of {name} tell no more than those of {against}",
                expected=f"R^2 above {found[1]:.3f}",
                found=f"{found[0]:.3f}",
                fix=f"geomcache cache probe {settings.out}/caches/{name} --pack {settings.out}/pack says more",
            )


def _r2_of(settings: "QuickstartConfig", names: Sequence[str], found: list[float], progress: chain.Progress) -> bool:
    from geomcache.pipeline.pack.reader import PackReader
    from geomcache.pipeline.store.probe import probe
    from geomcache.pipeline.store.reader import CachedTokens

    with PackReader(settings.out / "pack") as pack:
        for each in names:
            with CachedTokens(settings.out / "caches" / each) as cache:
                found.append(probe(cache, pack, progress=progress).r2)
    return False


def _train_config(settings: "QuickstartConfig", name: str) -> "TrainConfig":
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.stages.train.config import TrainConfig

    policy = settings.train[name]
    cache = settings.out / "caches" / policy.cache if policy.cache else None
    data = [{"pack": settings.out / "pack", "cache": cache}]
    filled: dict[str, Any] = {**policy.settings, "data": data, "out": settings.out / "train" / name}
    return parse_config(TrainConfig, filled, f"train {name}")


def _train_one(settings: "QuickstartConfig", name: str, progress: chain.Progress) -> bool:
    from geomcache.stages.train.run import run

    return run(_train_config(settings, name), progress)[1]


def _train(settings: "QuickstartConfig") -> None:
    _side_by_side(_train_one, settings, "train")


def _eval_config(settings: "QuickstartConfig", name: str) -> "EvalConfig":
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.stages.evaluate.config import EvalConfig

    paths = {"run": settings.out / "train" / name, "out": settings.out / "eval" / name}
    return parse_config(EvalConfig, {**settings.eval, **paths}, f"eval {name}")


def _evaluate_one(settings: "QuickstartConfig", name: str, progress: chain.Progress) -> bool:
    from geomcache.stages.evaluate.run import run

    return run(_eval_config(settings, name), progress)[1]


def _evaluate(settings: "QuickstartConfig") -> None:
    _side_by_side(_evaluate_one, settings, "eval")


def _check(settings: "QuickstartConfig") -> None:
    """Refuse a wrong setting of any stage before the first one starts."""
    chain.check(settings)
    for name in settings.train:
        _train_config(settings, name)
        _eval_config(settings, name)


def _side_by_side(part: Callable[..., bool], settings: "QuickstartConfig", what: str) -> None:
    """Run one part per policy, each in a process of its own with its share of the cores."""
    cores = os.cpu_count() or 1
    processes = min(len(settings.train), cores)
    jobs = [[(f"{what} {name}", partial(part, settings, name))] for name in settings.train]
    chain.side_by_side(jobs, processes, threads=max(1, cores // processes))


def _report(settings: "QuickstartConfig", as_json: bool, seconds: dict[str, float], total: float) -> list[str]:
    """Write the page, print the table; returns the policies that did not learn."""
    from dataclasses import asdict

    from geomcache.stages.evaluate.report.page import policy_rows, write_report

    page = write_report(settings.out, settings.out / "report.html", "geomcache quickstart")
    rows = [row for row in policy_rows(settings.out) if row.name in settings.train]
    if as_json:
        table = {"policies": [asdict(row) for row in rows], "seconds": seconds, "report": str(page)}
        typer.echo(json.dumps(table))
    else:
        show_table(
            "quickstart: the real simulator, tiny networks of the real classes",
            [
                "policy",
                "geometry",
                "open-loop error",
                "mean action",
                "ratio",
                "closed-loop success",
                "95 % interval",
            ],
            [
                [
                    row.name,
                    row.geometry,
                    f"{row.error:.3f}",
                    f"{row.baseline:.3f}",
                    f"{row.ratio:.2f}",
                    row.success,
                    row.interval,
                ]
                for row in rows
            ],
        )
        typer.echo(
            "seconds: " + ", ".join(f"{name} {value:g}" for name, value in seconds.items()) + f"; all {total:.0f}"
        )
        typer.echo(f"report: {page}")
    return [row.name for row in rows if not row.ratio < settings.largest_open_loop_ratio]
