"""One self-contained HTML page about a folder of runs: policies, curves, tokens, rollouts."""

import base64
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
from geomcache.stages.evaluate.pictures import curves_picture
from geomcache.stages.evaluate.run import RESULTS_NAME, EvalResults, read_results
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
        found = _evaluation_of(folder, run)
        results = found[1] if found else None
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
                success=f"{results.successes}/{len(results.episodes)}" if results else "-",
                interval=f"[{results.low:.2f}, {results.high:.2f}]" if results else "-",
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
            expected="NAME/result.json or train/NAME/result.json of a finished geomcache train",
            found="none",
            fix=f"geomcache train --out {folder}/train/NAME ...",
        )
    import jinja2

    template = resources.files("geomcache.stages.evaluate").joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    metrics = {run.name: read_metrics(run / METRICS_NAME) for run in _runs(folder)}
    page = environment.from_string(template).render(
        title=title,
        version=geomcache.__version__,
        folder=folder.name,
        policies=policies,
        curve=_base64(curves_picture(metrics)),
        caches=_caches(folder),
        evaluations=_evaluations(folder),
    )
    write_atomic(out, page)
    return out


def _runs(folder: Path) -> list[Path]:
    """Finished runs, by name."""
    found = {path.parent for pattern in ("*", "train/*") for path in folder.glob(f"{pattern}/{RESULT_NAME}")}
    return sorted(found, key=lambda run: run.name)


def _evaluation_of(folder: Path, run: Path) -> tuple[Path, EvalResults] | None:
    """Where a run's results lie, and the results; results of an older training of the same name are not its own."""
    for path in (run / "eval", folder / "eval" / run.name):
        if (path / RESULTS_NAME).exists():
            results = read_results(path)
            plain = results.config.averaged and not results.config.without_geometry
            if plain and results.checkpoint_weights == weights_digest(read_card(latest_checkpoint(run))):
                return path, results
    return None


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    found = []
    for run in _runs(folder):
        evaluation = _evaluation_of(folder, run)
        if evaluation is None:
            continue
        path, results = evaluation
        tasks = []
        for task in results.tasks:
            first = next(episode for episode in results.episodes if episode.task == task.task)
            picture = path / task.filmstrip
            if picture.exists():
                tasks.append({**task.model_dump(), "first": first, "picture": _base64(picture.read_bytes())})
        found.append({"name": run.name, "tasks": tasks})
    return found


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
            pictures.append({"name": path.parent.name, "text": text, "picture": _base64(picture)})
    return pictures


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
