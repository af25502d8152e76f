"""What a page says about one evaluation: charts, tasks with their pictures, metrics, time, training, provenance."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.stages.evaluate.motion import motion_means
from geomcache.stages.evaluate.pictures import Mark, curves_picture, data_uri, success_chart, webp_uri
from geomcache.stages.evaluate.report.inputs import Evaluation
from geomcache.stages.evaluate.report.table import number, percent, rates_of
from geomcache.stages.evaluate.results import (
    EpisodeResult,
    EpisodeSeconds,
    Success,
    TaskResult,
    failure_name,
    filmstrip_name,
    video_name,
)
from geomcache.stages.train.diagnose_run import JSON_NAME as DIAGNOSIS_JSON
from geomcache.stages.train.diagnose_run import PICTURE_NAME as DIAGNOSIS_PICTURE
from geomcache.stages.train.diagnose_run import RunDiagnosis
from geomcache.stages.train.metrics import METRICS_NAME, read_metrics

_LARGEST_VIDEO = 4 << 20  # bytes that are put into the page; larger ones stay beside it
_QUERY_PARTS = {"encoder": "encoder and codec", "vlm": "VLM", "head": "compressor and head"}
_PARTS = {
    "physics": "physics",
    "rendering": "rendering",
    **_QUERY_PARTS,
    "reset": "scene reset and settling",
    "other": "the rest",
}


@dataclass(frozen=True)
class Picture:
    """Of an episode; ``uri`` is None where there is none, and ``missing`` says why."""

    uri: str | None
    missing: str = ""


@dataclass(frozen=True)
class TaskView:
    """One task of the page."""

    result: TaskResult
    first: EpisodeResult
    filmstrip: Picture
    video: Picture | None  # None: there is no video
    failure: EpisodeResult | None  # the first one
    failure_strip: Picture | None  # None: it is the first episode, whose filmstrip stands there already
    failure_text: str


def view(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that the template ``evaluation`` of report_parts.html.j2 shows."""
    results, folder = evaluation.results, evaluation.folder
    episodes = results.episodes
    return {
        "name": evaluation.name,
        "arm": evaluation.arm,
        "changes": ", ".join(results.config.describe_changes()),
        "results": results,
        "restarts": sum(episode.restarts for episode in episodes),
        "chart": chart([evaluation]),
        "tasks": [_task(folder, task, episodes) for task in results.tasks],
        "metrics": _metrics(episodes),
        "queries": sum(episode.queries for episode in episodes),
        "latency": [(name, per_query(episodes, part)) for part, name in _QUERY_PARTS.items()],
        "time": _time(episodes),
        "training": _training(evaluation),
        "settings": _settings(evaluation),
        "versions": _counted(episode.versions for episode in episodes),
        "fingerprints": _counted(episode.fingerprints for episode in episodes),
    }


def chart(evaluations: Sequence[Evaluation]) -> str:
    """Success by suite, then by task; the evaluations of one task below each other."""
    several = len(evaluations) > 1
    groups: dict[str, list[Mark]] = {}
    for colour, evaluation in enumerate(evaluations):
        results = evaluation.results
        for suite in results.suites:
            heading = f"{suite.suite}, all tasks" if several else suite.suite
            label = evaluation.name if several else "all tasks"
            groups.setdefault(heading, []).append(_mark(label, suite, colour))
    for colour, evaluation in enumerate(evaluations):
        for task in evaluation.results.tasks:
            label = f"{task.task}: {task.instruction}"
            heading = f"{task.suite} {label}" if several else task.suite
            own = evaluation.name if several else label
            groups.setdefault(heading, []).append(_mark(own, task, colour))
    return success_chart(list(groups.items()))


def per_query(episodes: Sequence[EpisodeResult], part: str) -> float | None:
    """Mean milliseconds of ``part`` of one query of the policy."""
    queries = sum(episode.queries for episode in episodes)
    return 1000 * _seconds(episodes, part) / queries if queries else None


def how_it_failed(episode: EpisodeResult) -> str:
    """What the simulator's contact check tells about a failure."""
    grasp = episode.grasp
    if grasp is None:
        return "nothing to grasp in this task"
    if grasp.grasped:
        return "a target was lifted and lost" if grasp.drops else "a target was lifted, not brought to its goal"
    if grasp.wrong_object:
        return "another object was lifted"
    return f"{grasp.attempts} attempts to grasp, none lifted" if grasp.attempts else "no attempt to grasp"


def _mark(label: str, found: Success, colour: int) -> Mark:
    return Mark(label, found.successes, found.episodes, found.rate, found.low, found.high, colour)


def _task(folder: Path, task: TaskResult, episodes: Iterable[EpisodeResult]) -> TaskView:
    own = [episode for episode in episodes if (episode.suite, episode.task) == (task.suite, task.task)]
    failure = next((episode for episode in own if not episode.success), None)
    return TaskView(
        result=task,
        first=own[0],
        filmstrip=_strip(folder, filmstrip_name(task.suite, task.task)),
        video=_video(folder, video_name(task.suite, task.task)),
        failure=failure,
        failure_strip=_strip(folder, failure_name(task.suite, task.task)) if failure not in (None, own[0]) else None,
        failure_text=how_it_failed(failure) if failure else "",
    )


def _strip(folder: Path, name: str) -> Picture:
    try:
        return Picture(webp_uri(folder / name))
    except FileNotFoundError:
        return Picture(None, f"no picture: {name} is not there")
    except OSError:  # Pillow's own error for what is no picture is one of these
        return Picture(None, f"no picture: {name} cannot be read")


def _video(folder: Path, name: str) -> Picture | None:
    path = folder / name
    if not path.exists():
        return None
    size = path.stat().st_size
    if size > _LARGEST_VIDEO:
        return Picture(None, f"{name} has {size / 1e6:.0f} MB, too many for this page")
    return Picture(data_uri(path.read_bytes(), "video/mp4"))


def _metrics(episodes: Sequence[EpisodeResult]) -> list[tuple[str, list[str]]]:
    """Lines of all, successful and failed episodes."""
    groups = [episodes, [one for one in episodes if one.success], [one for one in episodes if not one.success]]
    motions = [motion_means(one.motion for one in group) for group in groups]
    grasps = [rates_of(group) for group in groups]
    steps = [sum(one.steps for one in group) / len(group) if group else None for group in groups]
    return [
        ("episodes", [str(len(group)) for group in groups]),
        ("control steps", [number(value, 0) for value in steps]),
        ("LDLJ, nearer to 0 is smoother", [number(one.ldlj) for one in motions]),
        ("RMS jerk, m/s³", [number(one.jerk_rms) for one in motions]),
        ("seam ratio, 1 = no seam", [number(one.seam_ratio) for one in motions]),
        ("change of action a step", [number(one.action_change, 3) for one in motions]),
        ("path, m", [number(one.path_length) for one in motions]),
        ("path efficiency, 1 = straight", [number(one.path_efficiency) for one in motions]),
        ("gripper toggles", [number(one.gripper_toggles, 1) for one in motions]),
        ("episodes with something to grasp", [str(one.episodes) for one in grasps]),
        ("attempts to grasp", [number(one.attempts_per_episode, 1) for one in grasps]),
        ("target lifted, %", [percent(one.grasp_rate) for one in grasps]),
        ("lifted by the first attempt, %", [percent(one.first_attempt_rate) for one in grasps]),
        ("placed once lifted, %", [percent(one.placed_given_grasped) for one in grasps]),
        ("another object lifted, %", [percent(one.wrong_object_rate) for one in grasps]),
        ("drops", [number(one.drops_per_episode) for one in grasps]),
    ]


def _seconds(episodes: Iterable[EpisodeResult], part: str) -> float:
    return sum(float(getattr(episode.seconds, part)) for episode in episodes)


def _time(episodes: Sequence[EpisodeResult]) -> list[tuple[str, float, float]]:
    """(part, seconds an episode, share of the whole)."""
    assert _PARTS.keys() - {"other"} == EpisodeSeconds.model_fields.keys() - {"total"}
    total = _seconds(episodes, "total")
    if not total:
        return []
    found = [(name, max(0.0, _seconds(episodes, part))) for part, name in _PARTS.items()]
    return [(name, seconds / len(episodes), seconds / total) for name, seconds in found]


def _training(evaluation: Evaluation) -> dict[str, str]:
    """Curves and diagnosis of the run, where it lies on this machine."""
    run, found = evaluation.run, dict[str, str]()
    if run is None:
        return found
    lines = read_metrics(run / METRICS_NAME)
    if lines:
        found["curves"] = data_uri(curves_picture({evaluation.name: lines}))
    strip = _strip(run, DIAGNOSIS_PICTURE)
    if strip.uri is not None:
        found["diagnosis"] = strip.uri
        found["verdict"] = _verdict(run / DIAGNOSIS_JSON, evaluation.results.conditions.checkpoint_step)
    return found


def _verdict(path: Path, step: int) -> str:
    try:
        found = RunDiagnosis.parse(path.read_bytes(), str(path), InputError)
    except (GeomcacheError, FileNotFoundError):
        return f"{path.name} beside this picture cannot be read"
    return found.verdict + ("" if found.step == step else f" (at step {found.step}; evaluated was step {step})")


def _settings(evaluation: Evaluation) -> dict[str, object]:
    """config and conditions, less what says nothing: unset beliefs."""
    values = {**evaluation.results.conditions.model_dump(), **evaluation.results.config.model_dump(mode="json")}
    return {name: value for name, value in values.items() if value is not None and value != {}}


def _counted(records: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """A value for each name; with counts where episodes differ, as after an upgrade in the middle."""
    seen: dict[str, Counter[str]] = {}
    for record in records:
        for name, value in record.items():
            seen.setdefault(name, Counter())[value] += 1
    return {
        name: next(iter(values))
        if len(values) == 1
        else ", ".join(f"{one} ({n} episodes)" for one, n in values.items())
        for name, values in sorted(seen.items())
    }
