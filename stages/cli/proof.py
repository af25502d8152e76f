"""``geomcache proof``: arms that differ in what they see, trained and evaluated on the same held-out placements."""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomcache.stages.cli import chain, proof_plan
from geomcache.stages.cli.common import (
    EXIT_FINDING,
    ConfigOption,
    JsonOption,
    SetOption,
    say,
    show_table,
    show_values,
)

if TYPE_CHECKING:
    from geomcache.configs.schema import ProofConfig
    from geomcache.stages.evaluate.report.proof import ProofResults, Trained

RESULTS_NAME, PAGE_NAME = "results.json", "results.md"


def proof(
    out: Annotated[Path | None, typer.Option(help="Folder for everything; default runs/proof.")] = None,
    arms: Annotated[
        str | None, typer.Option(metavar="A,B|all", help="Arms to train and evaluate; default: the core.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, what is finished, and about how long.")
    ] = False,
    config: ConfigOption = "tiny/proof",
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove the chain: policies that see nothing, images, or images and geometry, on the same unseen placements.

    Demonstrations, pack, caches, training, evaluation; finished parts are recognised by what they were made from and
    skipped, so a stopped proof continues. Exit 1 when the gate does not hold (docs/proof.md).
    """
    from geomcache.configs.load import load_config
    from geomcache.configs.schema import ProofConfig
    from geomcache.pipeline.files import locked_folder, write_config

    settings = load_config(ProofConfig, config, sets or [], {"out": out})
    work = proof_plan.chosen(settings, arms)
    proof_plan.check(settings, work)
    if dry_run:
        _show_plan(settings, work, as_json)
        return
    from geomcache.stages.evaluate.run import stopped_like_ctrl_c

    with locked_folder(settings.out):
        write_config(settings.out, settings)
        with stopped_like_ctrl_c():
            _data(settings, work)
        with stopped_like_ctrl_c():  # again: Ray, which the first part may have used, leaves handlers of its own
            _arms(settings, work)
    options = [part for text in sets or [] for part in ("--set", text)]
    command = shlex.join(["geomcache", "proof", "--config", str(config), *options])
    results = _report(settings, command, as_json)
    if not results.passed:
        for line in results.gate:
            if line.failed:
                say(f"the gate: {line.sentence}")
        raise typer.Exit(EXIT_FINDING)


def _data(settings: "ProofConfig", work: proof_plan.Work) -> None:
    """Everything before training, one after the other: each uses the cores it is given."""
    out = settings.out
    _run_part(settings, "demos", out / "demos", partial(chain.demos, settings))
    _run_part(settings, "pack", out / "pack", partial(chain.pack, settings))
    for name in proof_plan.caches_of(settings, work):
        _run_part(settings, f"extract {name}", out / "caches" / name, partial(chain.extract, settings, name))


def _run_part(settings: "ProofConfig", title: str, folder: Path, part: chain.Part) -> None:
    chain.run_part(title, _costed(settings, title, folder, part))


def _costed(settings: "ProofConfig", title: str, folder: Path, part: chain.Part) -> chain.Part:
    return partial(chain.with_cost, proof_plan.cost_path(settings, title), folder, part)


def _arms(settings: "ProofConfig", work: proof_plan.Work) -> None:
    """Every training, then its evaluations; the longest first, so that no core waits at the end."""
    seconds = proof_plan.jobs_of(proof_plan.dry_run(settings, work))
    jobs: dict[str, chain.Job] = {}
    for arm, cells in work.items():
        for seed in settings.seeds:
            title, folder = proof_plan.train_part(arm, seed), proof_plan.run_folder(settings, arm, seed)
            job = [(title, _costed(settings, title, folder, partial(train_one, settings, arm, seed)))]
            for cell in cells:
                title = proof_plan.eval_part(arm, seed, cell)
                part = partial(evaluate_one, settings, arm, seed, cell)
                job.append((title, _costed(settings, title, settings.out / title, part)))
            jobs[f"{arm}/seed_{seed}"] = job
    order = sorted(jobs, key=seconds.__getitem__, reverse=True)
    chain.side_by_side([jobs[name] for name in order], settings.processes, threads=1)


def train_one(settings: "ProofConfig", arm: str, seed: int, progress: chain.Progress) -> bool:
    """One training; in a process of its own."""
    from geomcache.stages.train.run import run

    return run(proof_plan.train_config(settings, arm, seed), progress)[1]


def evaluate_one(settings: "ProofConfig", arm: str, seed: int, cell: str, progress: chain.Progress) -> bool:
    """One evaluation; in a process of its own."""
    from geomcache.stages.evaluate.run import run

    return run(proof_plan.eval_config(settings, arm, seed, cell), progress)[1]


def _show_plan(settings: "ProofConfig", work: proof_plan.Work, as_json: bool) -> None:
    lines = proof_plan.dry_run(settings, work)
    minutes = proof_plan.seconds_to_go(settings, lines) / 60
    if as_json:
        show_values({"parts": [line._asdict() for line in lines], "minutes": round(minutes, 1)}, as_json)
        return
    show_table(
        f"geomcache proof into {settings.out}, arms {', '.join(work)}",
        ["part", "state", "about minutes"],
        [[line.part, line.state, f"{line.seconds / 60:.1f}" if line.seconds else "-"] for line in lines],
    )
    typer.echo(
        f"about {minutes:.0f} minutes to go, {settings.processes} arms side by side on cores of their own; parts that "
        "were begun count whole"
    )


def _report(settings: "ProofConfig", command: str, as_json: bool) -> "ProofResults":
    """Of everything that stands, also of arms that were not asked for now."""
    from geomcache.pipeline.files import write_atomic
    from geomcache.stages.evaluate.report import proof as report
    from geomcache.stages.evaluate.report import proof_tables as tables

    trained = proof_plan.standing(settings)
    rules = []
    if settings.gate is not None:
        cell = settings.gate.cell
        rules += [report.Rule(arm, cell, "at least", limit) for arm, limit in settings.gate.at_least.items()]
        rules += [report.Rule(arm, cell, "at most", limit) for arm, limit in settings.gate.at_most.items()]
    results = report.make_results(trained, settings.comparisons, rules, proof_plan.costs(settings))
    write_atomic(settings.out / RESULTS_NAME, results.model_dump_json(indent=2))
    write_atomic(settings.out / PAGE_NAME, tables.results_page(results, command))
    pages = _pages(settings, trained)
    if as_json:
        show_values({**results.model_dump(mode="json"), "pages": list(map(str, pages))}, as_json)
        return results
    for table in tables.main_tables(results):
        if table is not None:
            show_table(*table)
    for sentence in [line.sentence for line in results.comparisons] + [line.sentence for line in results.gate]:
        typer.echo(sentence)
    typer.echo(f"results: {settings.out / PAGE_NAME}")
    for page in pages:
        typer.echo(f"report: {page}")
    return results


def _pages(settings: "ProofConfig", trained: "Sequence[Trained]") -> list[Path]:
    """One page for each cell and training seed: the first arm against each other one."""
    from geomcache.stages.evaluate.report.page import write_comparison, write_evaluation

    pages = []
    for cell in settings.cells:
        for seed in settings.seeds:
            folders = [one.evaluations[cell].folder for one in trained if one.seed == seed and cell in one.evaluations]
            page = settings.out / "reports" / f"{cell}_seed_{seed}.html"
            if len(folders) > 1:
                write_comparison(folders, page, f"geomcache proof: {cell}, training seed {seed}")
            elif folders:
                write_evaluation(folders[0], page, f"geomcache proof: {cell}, training seed {seed}")
            if folders:
                pages.append(page)
    return pages
