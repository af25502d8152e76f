"""``geomcache quickstart``: the whole chain at tiny size, in the real simulator, on a laptop."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomcache.cache_schemas.errors import TrainingFailed
from geomcache.stages.cli.common import (
    EXIT_FINDING,
    ConfigOption,
    JsonOption,
    SetOption,
    progress_bar,
    say,
    show_table,
)

if TYPE_CHECKING:
    from geomcache.configs.schema import PackConfig, QuickstartConfig
    from geomcache.pipeline.sim.recorder import Config as DemosConfig
    from geomcache.stages.evaluate.config import EvalConfig
    from geomcache.stages.extract.plan import ExtractConfig
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


def _demos_config(settings: "QuickstartConfig") -> "DemosConfig":
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.pipeline.sim.recorder import Config

    return parse_config(Config, settings.demos, "demos")


def _demos(settings: "QuickstartConfig") -> None:
    from geomcache.pipeline.sim.recorder import record
    from geomcache.stages.cli.demos import attempts_shown, require_all

    config = _demos_config(settings)
    with _Stage("demos") as (stage, progress):
        summary = record(config, settings.out / "demos", attempts_shown(progress, config))
        stage.skipped = summary.attempted == 0
        require_all(summary)


def _pack_config(settings: "QuickstartConfig") -> "PackConfig":
    from geomcache.configs.schema import PackConfig
    from geomcache.pipeline.config_errors import parse_config

    paths = {"sources": [settings.out / "demos"], "out": settings.out / "pack"}
    return parse_config(PackConfig, {**settings.pack, **paths}, "pack")


def _pack(settings: "QuickstartConfig") -> None:
    from geomcache.stages.cli.pack import build_from

    with _Stage("pack") as (stage, progress):
        _, stage.skipped = build_from(_pack_config(settings), progress)


def _extract_config(settings: "QuickstartConfig", name: str) -> "ExtractConfig":
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.stages.extract.plan import ExtractConfig

    paths = {"pack": settings.out / "pack", "out": settings.out / "caches" / name}
    return parse_config(ExtractConfig, {"encoder": name, **settings.extract[name], **paths}, f"extract {name}")


def _extract(settings: "QuickstartConfig") -> None:
    from geomcache.stages.extract.run import run

    for name in settings.extract:
        with _Stage(f"extract {name}") as (stage, progress):
            stage.skipped = run(_extract_config(settings, name), progress).rows_encoded == 0


def _probe(settings: "QuickstartConfig") -> None:
    """Does a cache carry information? Its tokens must tell more than those it is compared with."""
    from geomcache.pipeline.pack.reader import PackReader
    from geomcache.pipeline.store.probe import probe
    from geomcache.pipeline.store.reader import CachedTokens

    for name, against in settings.probe.items():
        with _Stage(f"probe {name}") as (_, progress), PackReader(settings.out / "pack") as pack:
            found = []
            for each in (name, against):
                with CachedTokens(settings.out / "caches" / each) as cache:
                    found.append(probe(cache, pack, progress=progress).r2)
        say(f"a linear map reads surfaces from {name} with R^2 {found[0]:.2f}, from {against} with {found[1]:.2f}")
        if not found[0] > found[1]:
            raise TrainingFailed(
                f"the tokens of {name} tell no more than those of {against}",
                expected=f"R^2 above {found[1]:.3f}",
                found=f"{found[0]:.3f}",
                fix=f"geomcache cache probe {settings.out}/caches/{name} --pack {settings.out}/pack says more",
            )


def _train_config(settings: "QuickstartConfig", name: str) -> "TrainConfig":
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.stages.train.config import TrainConfig

    policy = settings.train[name]
    cache = settings.out / "caches" / policy.cache if policy.cache else None
    data = [{"pack": settings.out / "pack", "cache": cache}]
    filled: dict[str, Any] = {**policy.settings, "data": data, "out": settings.out / "train" / name}
    return parse_config(TrainConfig, filled, f"train {name}")


def _train_one(settings: "QuickstartConfig", name: str, progress: Callable[..., None]) -> bool:
    from geomcache.stages.train.run import run

    return run(_train_config(settings, name), progress)[1]


def _train(settings: "QuickstartConfig") -> None:
    _side_by_side(_train_one, settings, "train")


def _eval_config(settings: "QuickstartConfig", name: str) -> "EvalConfig":
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.stages.evaluate.config import EvalConfig

    paths = {"run": settings.out / "train" / name, "out": settings.out / "eval" / name}
    return parse_config(EvalConfig, {**settings.eval, **paths}, f"eval {name}")


def _evaluate_one(settings: "QuickstartConfig", name: str, progress: Callable[..., None]) -> bool:
    from geomcache.stages.evaluate.run import run

    return run(_eval_config(settings, name), progress)[1]


def _evaluate(settings: "QuickstartConfig") -> None:
    _side_by_side(_evaluate_one, settings, "eval")


def _check(settings: "QuickstartConfig") -> None:
    """Refuse a wrong setting of any stage before the first one starts."""
    from geomcache.configs.schema import QuickstartConfig
    from geomcache.pipeline import plugins
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.pipeline.files import require_config_slot

    require_config_slot(settings.out, QuickstartConfig)
    _demos_config(settings)
    _pack_config(settings)
    for name in settings.extract:
        config = _extract_config(settings, name)
        parse_config(plugins.config_class("encoder", config.encoder), config.encoder_config, f"encoder {name}")
    for name in settings.train:
        _train_config(settings, name)
        _eval_config(settings, name)


_Part = Callable[["QuickstartConfig", str, Callable[..., None]], bool]  # returns whether it was finished before


def _side_by_side(part: _Part, settings: "QuickstartConfig", what: str) -> None:
    """Run one part per policy, each in a process of its own with its share of the cores.

    Small networks gain little from a second thread and lose much to it on shared cores; a second process is all gain.
    """
    processes = min(len(settings.train), os.cpu_count() or 1)
    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")  # neither torch nor an EGL context survives a fork
    with ProcessPoolExecutor(processes, context, initializer=_die_quietly_on_interrupt) as pool:
        titles = {name: f"{what} {name}" for name in settings.train}
        futures = {name: pool.submit(_part_in_process, part, settings, titles[name], name, threads) for name in titles}
        for name, future in futures.items():
            try:
                skipped, seconds = future.result()
            except BrokenProcessPool as problem:
                raise TrainingFailed(
                    f"{titles[name]}: its process was killed",
                    found="no result (out of memory?)",
                    fix="run the same command again; it continues from the last checkpoint or episode",
                ) from problem
            _over(titles[name], skipped, seconds)


def _die_quietly_on_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process; only the parent says so


def _part_in_process(
    part: _Part, settings: "QuickstartConfig", title: str, name: str, threads: int
) -> tuple[bool, float]:
    import torch

    torch.set_num_threads(threads)
    started = time.perf_counter()
    with progress_bar(title, lines=True) as progress:
        return part(settings, name, progress), time.perf_counter() - started


class _Stage:
    """A bar while a stage runs, one line when it is over."""

    def __init__(self, name: str) -> None:
        self._name, self._started, self.skipped = name, time.perf_counter(), False
        self._bar = progress_bar(name)

    def __enter__(self) -> "tuple[_Stage, Callable[..., None]]":
        return self, self._bar.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._bar.__exit__(kind, error, trace)
        if error is None:
            _over(self._name, self.skipped, time.perf_counter() - self._started)


def _over(title: str, skipped: bool, seconds: float) -> None:
    say(f"{title}: " + ("finished before with the same inputs, skipped" if skipped else f"done in {seconds:.0f} s"))


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
