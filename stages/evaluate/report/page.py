"""Self-contained HTML pages: a folder of runs, one evaluation, evaluations compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import geomcache
from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.pipeline.files import write_atomic
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.channel_stats import describe_tokens
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.token_picture import tokens_picture
from geomcache.stages.evaluate.pictures import curves_picture, data_uri
from geomcache.stages.evaluate.report.evaluation import chart, view
from geomcache.stages.evaluate.report.inputs import (
    Evaluation,
    better_call,
    is_evaluation,
    open_evaluation,
    open_evaluations,
    what_is_there,
)
from geomcache.stages.evaluate.report.table import Report, make_report, markdown, tables
from geomcache.stages.train.checkpoint import latest_checkpoint, read_card, weights_digest
from geomcache.stages.train.metrics import METRICS_NAME, read_metrics
from geomcache.stages.train.run import RESULT_NAME, TrainResult


@dataclass(frozen=True)
class PolicyRow:
    """One line of the table."""

    name: str
    geometry: str
    parameters: int
    steps: int
    error: float
    baseline: float
    ratio: float
    held_out: str  # open-loop error on held-out episodes
    success: str
    interval: str


def policy_rows(folder: Path) -> list[PolicyRow]:
    """The table of every finished run, each with its evaluation if there is one."""
    rows = []
    for run in _runs(folder):
        result_path = run / RESULT_NAME
        result = TrainResult.parse(result_path.read_bytes(), str(result_path), InputError)
        card = read_card(latest_checkpoint(run))
        evaluation = _evaluation_of(folder, run)
        success = evaluation.results.overall if evaluation else None
        rows.append(
            PolicyRow(
                name=run.name,
                geometry=card.recipe.spec.encoder if card.recipe else "none",
                parameters=result.parameters,
                steps=result.steps,
                error=result.open_loop_error,
                baseline=result.mean_action_error,
                ratio=result.open_loop_ratio,
                held_out=f"{result.validation.open_loop_error:.3f}" if result.validation else "-",
                success=f"{success.successes}/{success.episodes}" if success else "-",
                interval=f"[{success.low:.2f}, {success.high:.2f}]" if success else "-",
            )
        )
    return rows


def write_report(folder: Path, out: Path, title: str) -> Path:
    """Write the page for a folder of runs, or for one laid out as the quickstart's (``train/NAME``, ``eval/NAME``,
    ``caches/``, ``pack/``). A run's evaluation is ``RUN/eval`` or ``eval/NAME``.

    Raises:
        InputError: there is no finished run under ``folder``.
    """
    policies = policy_rows(folder)
    if not policies:
        raise InputError(
            f"{folder} holds nothing to report",
            expected="results.json of a geomcache eval; or NAME/result.json or train/NAME/result.json of a finished "
            "geomcache train",
            found=what_is_there(folder),
            fix=better_call(folder) or f"geomcache train --out {folder}/train/NAME ...",
        )
    evaluations = [found for run in _runs(folder) if (found := _evaluation_of(folder, run))]
    page: dict[str, Any] = {}
    if len(evaluations) > 1:
        try:
            page = _comparison(make_report(evaluations), evaluations)
        except InputError as problem:  # different suites or rules: each stands for itself
            page = {"not_compared": f"{problem.what} ({problem.found})"}
    return _write(
        out,
        title,
        folder.name,
        policies=policies,
        curve=data_uri(curves_picture({run.name: read_metrics(run / METRICS_NAME) for run in _runs(folder)})),
        caches=_caches(folder),
        evaluations=[view(each) for each in evaluations],
        **page,
    )


def write_evaluation(folder: Path, out: Path, title: str) -> Evaluation:
    """Write the page of one evaluation, and return it.

    Raises:
        InputError: ``folder`` holds no results, or some that cannot be read.
        SchemaTooNew: a newer geomcache wrote them.
    """
    evaluation = open_evaluation(folder)
    _write(out, title, str(folder), evaluations=[view(evaluation)])
    return evaluation


def write_comparison(folders: Sequence[Path], out: Path, title: str) -> Report:
    """Compare evaluations with the first one, write the page, and return what was found.

    Raises:
        InputError: one cannot be read or is given twice, or two cannot be paired.
        SchemaTooNew: a newer geomcache wrote one.
    """
    evaluations = open_evaluations(folders)
    report = make_report(evaluations)
    _write(out, title, ", ".join(map(str, folders)), **_comparison(report, evaluations))
    return report


def _comparison(report: Report, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    from markupsafe import Markup

    found = tables(report)
    return {
        "comparison": report,
        "tables": found,
        "markdown": "\n".join(map(markdown, found)),
        "chart": Markup(chart(evaluations)),
    }


def _write(out: Path, title: str, subtitle: str, **parts: Any) -> Path:
    import jinja2
    from markupsafe import Markup

    folder = resources.files("geomcache.stages.evaluate.report")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text())
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    empty = dict.fromkeys(("policies", "caches", "evaluations", "curve", "comparison", "not_compared"), ())
    page: dict[str, Any] = {**empty, "title": title, "subtitle": subtitle, "version": geomcache.__version__, **parts}
    page["evaluations"] = [{**each, "chart": Markup(each["chart"])} for each in page["evaluations"]]
    write_atomic(out, environment.get_template("report.html.j2").render(page))
    return out


def _runs(folder: Path) -> list[Path]:
    """Finished runs, by name."""
    found = {path.parent for pattern in ("*", "train/*") for path in folder.glob(f"{pattern}/{RESULT_NAME}")}
    return sorted(found, key=lambda run: run.name)


def _evaluation_of(folder: Path, run: Path) -> Evaluation | None:
    """A run's evaluation; results of an older training of the same name are not its own."""
    for path in (run / "eval", folder / "eval" / run.name):
        if is_evaluation(path):
            found = open_evaluation(path, run.name)
            config, conditions = found.results.config, found.results.conditions
            plain = config.averaged and not config.without_geometry and not config.describe_changes()
            if plain and conditions.checkpoint_weights == weights_digest(read_card(latest_checkpoint(run))):
                return found
    return None


def _caches(folder: Path) -> list[dict[str, str]]:
    """A frame beside its tokens, for every cache of the folder's pack."""
    pictures = []
    if not (folder / "pack").exists():
        return []
    with PackReader(folder / "pack") as pack:
        row = pack.episodes[0].first_row + pack.episodes[0].rows // 3
        for path in sorted((folder / "caches").glob("*/manifest.json")):
            try:
                cache = CachedTokens(path.parent)
            except GeomcacheError:
                continue  # an unfinished cache has no place in a report
            if cache.recipe.fingerprint.pack != pack.info.digest:
                continue  # made from another pack than the one that lies here
            picture = tokens_picture(cache.spec, cache.tokens([row])[0].numpy(), pack.images([row])[0])
            cache.close()
            text = f"row {row}: {describe_tokens(cache)}; licence of the weights: {cache.recipe.encoder.license}"
            pictures.append({"name": path.parent.name, "text": text, "picture": data_uri(picture)})
    return pictures
