"""One self-contained HTML page about a folder of runs: policies, curves, tokens, rollouts."""

import base64
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import geomcache
from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.pipeline.files import write_atomic
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.stages.evaluate.pictures import curves_picture, tokens_picture
from geomcache.stages.evaluate.run import RESULTS_NAME, EvalResults, read_results
from geomcache.stages.train.checkpoint import latest_checkpoint, read_card
from geomcache.stages.train.loop import METRICS_NAME, read_metrics
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
    success: str
    interval: str


def policy_rows(folder: Path) -> list[PolicyRow]:
    """The table of every finished run under ``folder/train``, with its evaluation of the same name if there is one."""
    rows = []
    for result_path in sorted((folder / "train").glob(f"*/{RESULT_NAME}")):
        run = result_path.parent
        result = TrainResult.parse(result_path.read_bytes(), str(result_path), InputError)
        card = read_card(latest_checkpoint(run))
        results = _results_of(folder, run)
        rows.append(
            PolicyRow(
                name=run.name,
                geometry=card.recipe.spec.encoder if card.recipe else "none",
                parameters=result.parameters,
                steps=result.steps,
                error=result.open_loop_error,
                baseline=result.mean_action_error,
                ratio=result.open_loop_ratio,
                success=f"{results.successes}/{len(results.episodes)}" if results else "-",
                interval=f"[{results.low:.2f}, {results.high:.2f}]" if results else "-",
            )
        )
    return rows


def write_report(folder: Path, out: Path, title: str) -> Path:
    """Write the page for everything that stands under ``folder`` (``train/``, ``eval/``, ``caches/``, ``pack/``).

    Raises:
        InputError: there is no finished run under ``folder``.
    """
    policies = policy_rows(folder)
    if not policies:
        raise InputError(
            f"{folder} holds nothing to report",
            expected="train/NAME/result.json of a finished geomcache train",
            found="none",
            fix=f"geomcache train --out {folder}/train/NAME ...",
        )
    import jinja2

    template = resources.files("geomcache.stages.evaluate").joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    metrics = {row.name: read_metrics(folder / "train" / row.name / METRICS_NAME) for row in policies}
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


def _results_of(folder: Path, run: Path) -> EvalResults | None:
    path = folder / "eval" / run.name
    if not (path / RESULTS_NAME).exists():
        return None
    results = read_results(path)
    same = results.checkpoint_weights == digest_file(latest_checkpoint(run) / "policy.safetensors")
    return results if same else None  # results of an older training of the same name do not belong to this run


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    found = []
    for run in sorted(path.parent for path in (folder / "train").glob(f"*/{RESULT_NAME}")):
        path, results = folder / "eval" / run.name, _results_of(folder, run)
        if results is None:
            continue
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
            spec = cache.spec
            picture = tokens_picture(
                pack.images([row])[0],
                cache.tokens([row])[0].numpy(),
                spec.grid,
                spec.cameras,
                points=spec.tap == "xyz",
            )
            cache.close()
            text = (
                f"row {row}, tap {spec.tap}, {spec.views} views x {spec.tokens_per_view} tokens x {spec.dim}, "
                f"codec {spec.codec}; licence of the weights: {cache.recipe.encoder.license}"
            )
            pictures.append({"name": path.parent.name, "text": text, "picture": _base64(picture)})
    return pictures


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
