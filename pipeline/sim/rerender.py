"""Rendering data sets again that have no depth: every demonstration of official-layout HDF5 files is replayed.

The new file has the source's name, demonstrations, actions, states and attributes; its ``obs`` and ``robot_states``
come from the replay (observation_rows.py says which fields), with the source's timing, so that every reader of the
source reads it, now with depth and cameras. Added: demo attributes depth_near, depth_far, robot_base_pose and
``replay`` (the report, JSON); data attributes camera_names, rerender_config, rerender_digest.

Non-obvious:
- Images are stored raw, bottom-up, whatever the source did.
- ``auto`` replays the actions while they lead through the stored states, which gives exactly what was seen then. Else
  every state is set; pictures are then up to two physics steps late. Files recorded with another MuJoCo end there.
- Each demonstration is a small file of its own until all are done, so a kill loses one; HDF5 never writes the only
  copy of anything where a disk may be full (see demo_file.DemoFile).
"""

import errno
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
from pydantic import Field, field_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.cache_schemas.errors import InputError, SourceDamaged
from geomcache.cache_schemas.fingerprint import digest_file, digest_json
from geomcache.pipeline.files import (
    atomic_writer,
    locked_folder,
    remove_leftovers,
    sync_file,
    sync_folder,
    temporary_name,
)
from geomcache.pipeline.official_layout import file_camera_name
from geomcache.pipeline.ray_workers import Pool, run_tasks
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.observation_rows import ObservationRows, scene_attributes
from geomcache.pipeline.sim.orientation_by_replay import ErrorSums, stored_image
from geomcache.pipeline.sim.orientation_finding import decide
from geomcache.pipeline.sim.replay import Replay, Scene, StoredDemo, Way, demo_names, find_task, read_demo, reading
from geomcache.pipeline.sim.system import require_simulator
from geomcache.pipeline.sources._libero_files import find_files

MATCHED_BELOW = 1e-6  # of any number in the state: actions that stay below it lead through the stored states
_ADVICE = "give it more memory: fewer --workers; finished demonstrations are kept"
_VERSION = 1  # raised whenever the same source and configuration give another file
_FROM_REPLAY = ("obs", "robot_states")
_NOT_COPIED = ("recorder_digest",)  # `geomcache demos` would take the file for its own


class RerenderConfig(Schema):
    """What to render."""

    cameras: tuple[str, ...] = Field(default=("agentview", "robot0_eye_in_hand"), min_length=1)
    height: int = Field(default=128, ge=16)  # pixels
    width: int = Field(default=128, ge=16)  # pixels
    way: Literal["auto", "actions", "states"] = "auto"
    workers: int = Field(default=1, ge=1)  # simulators side by side; the files are the same bytes

    @field_validator("cameras")
    @classmethod
    def _each_once(cls, cameras: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(cameras)) != len(cameras):
            raise ValueError(f"a camera is named twice in {list(cameras)}")
        return cameras

    def digest(self, source: Path) -> str:
        """Of everything that decides what the file rendered from ``source`` holds."""
        return digest_json([_VERSION, digest_file(source), self.model_dump(mode="json", exclude={"workers"})])


@dataclass(frozen=True)
class ReplayReport:
    """How the replay of one demonstration went."""

    file: str  # relative to the source
    demo: str
    damage: str | None = None  # why the demonstration was left out; the rest is then empty
    way: Way | None = None
    scene: Scene | None = None  # by what the fixtures were placed; "unknown": up to 1.5 cm elsewhere
    max_state_error: float | None = None  # of the actions; where they were given up: so far. None: they were not tried
    matched: bool = False  # the actions led through the stored states
    success: bool | None = None  # LIBERO's predicate after the last action
    frames: int = 0
    image_error: float | None = None  # mean difference to the stored images, grey levels of 255; None: it has none
    stored_orientation: ImageOrientation | None = None  # that of the smallest error; None: undecided or views differ


def rerender(
    source: Path,
    out: Path,
    config: RerenderConfig,
    progress: Callable[[ReplayReport, int, int], None] = lambda *_: None,
) -> list[ReplayReport]:
    """Render every demonstration of every HDF5 file under ``source`` into files of the same names under ``out``.

    Finished files of the same source and configuration are skipped, a stopped run goes on with the demonstration it
    was at. Damaged demonstrations are left out and named in their report. ``progress`` hears of what was done now, and
    how many of how many demonstrations stand; the result holds everything.

    Raises:
        InputError: there is nothing to render, or ``out`` holds or would overwrite something else.
        SourceDamaged: a file cannot be opened.
        UnknownName: a file is named after no LIBERO task, or the scene has no such camera.
    """
    require_simulator()
    jobs = [_Job(path, target, source, config) for path, target in _targets(source, out).items()]  # refuses early
    with locked_folder(out):
        return _render_all(jobs, config, progress)


def _render_all(
    jobs: "list[_Job]", config: RerenderConfig, progress: Callable[[ReplayReport, int, int], None]
) -> list[ReplayReport]:
    by_label = {job.label: job for job in jobs}
    tasks = [task for job in jobs for task in job.missing()]
    total = sum(len(job.names) for job in jobs)
    done = total - len(tasks)
    for job in jobs:
        job.finish_if_over()
    pool = Pool(count=min(config.workers, max(1, len(tasks))), what="a rendering worker", advice=_ADVICE, tasks_each=1)
    for _, report in run_tasks(RenderWorker, (config,), tasks, pool):
        done += 1
        progress(report, done, total)
        job = by_label[report.file]
        job.take(report)
        job.finish_if_over()
    return [report for job in jobs for report in job.reports()]


def _targets(source: Path, out: Path) -> dict[Path, Path]:
    """Each file of the source and where its new one goes."""
    paths = find_files(source)
    if source.is_file():
        root, overwrites = source.parent, out.resolve() == source.parent.resolve()
    else:
        root, overwrites = source, out.resolve().is_relative_to(source.resolve())
    if overwrites:
        raise InputError(
            f"{out} lies inside the source",
            expected="another folder, so that no file is overwritten or replayed twice",
            found=str(source),
            fix="choose another --out",
        )
    return {path: out / path.relative_to(root) for path in paths}


@dataclass(frozen=True)
class _RenderTask:
    """One demonstration to render, into a file of its own."""

    path: Path
    name: str
    label: str  # of the file, in reports
    part: Path
    digest: str


class RenderWorker:
    """Replays demonstrations; holds the simulator of one LIBERO task at a time."""

    def __init__(self, config: RerenderConfig) -> None:
        self._config = config
        self._env: LiberoEnv | None = None

    def start(self) -> None:
        """Say at once when there is no simulator."""
        require_simulator()

    def run(self, task: _RenderTask) -> ReplayReport:
        """Render one demonstration; its part is safe on disk when this returns."""
        try:
            return self._render(task, self._simulator(task.path), read_demo(task.path, task.name))
        except SourceDamaged as problem:
            return ReplayReport(task.label, task.name, damage=f"{problem.what}: {problem.found}")

    def close(self) -> None:
        """Free the simulator."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _simulator(self, path: Path) -> LiberoEnv:
        wanted = find_task(path)
        if self._env is None or self._env.task != wanted:
            self.close()
            config = self._config
            self._env = LiberoEnv(
                wanted.suite, wanted.index, cameras=config.cameras, height=config.height, width=config.width
            )
        return self._env

    def _render(self, task: _RenderTask, env: LiberoEnv, demo: StoredDemo) -> ReplayReport:
        wanted, replay = self._config.way, Replay(env, demo)
        way: Way = "states" if wanted == "states" else "actions"
        seen = self._observe(env, demo, replay, way, give_up=wanted == "auto")
        if seen is None:
            way, seen = "states", self._observe(env, demo, replay, "states")
        assert seen is not None, "only actions are given up"
        rows, sums = seen
        findings = [decide(means, camera) for camera, means in sums.items() if means]
        orientations = {finding.best if finding.decided else None for finding in findings}
        report = ReplayReport(
            file=task.label,
            demo=demo.name,
            way=way,
            scene=replay.scene,
            max_state_error=replay.max_state_error,
            matched=way == "actions" and _matches(replay),
            success=env.success(),
            frames=len(rows),
            image_error=sum(finding.error for finding in findings) / len(findings) if findings else None,
            stored_orientation=orientations.pop() if len(orientations) == 1 else None,
        )
        self._keep(task, rows, scene_attributes(env) | {"replay": json.dumps(asdict(report))})
        return report

    def _observe(
        self, env: LiberoEnv, demo: StoredDemo, replay: Replay, way: Way, *, give_up: bool = False
    ) -> tuple[ObservationRows, dict[str, dict[ImageOrientation, float]]] | None:
        """(observations, each camera's difference to the stored images); None if the actions were given up."""
        rows = ObservationRows(demo.observe_every)
        sums = {camera: ErrorSums() for camera in self._stored_cameras(demo)}
        for j in replay.by_actions() if way == "actions" else replay.by_states():
            if give_up and not _matches(replay):
                return None
            if not rows.take(env):
                continue
            for camera, comparison in sums.items():
                rendered = rows.last(f"obs/{file_camera_name(camera)}_rgb")
                comparison.add(stored_image(demo.path, demo.name, camera, j // demo.observe_every), rendered)
        return rows, {camera: comparison.means() for camera, comparison in sums.items()}

    def _stored_cameras(self, demo: StoredDemo) -> list[str]:
        """The views to render of which the source has images as well."""
        with reading(demo.path, demo.name) as file:
            stored = file[f"data/{demo.name}"].get("obs", {})
            return [camera for camera in self._config.cameras if f"{file_camera_name(camera)}_rgb" in stored]

    def _keep(self, task: _RenderTask, rows: ObservationRows, attributes: dict[str, Any]) -> None:
        memory = io.BytesIO()
        with reading(task.path, task.name) as source, h5py.File(memory, "w") as file:
            data = file.create_group("data")
            data.attrs["rerender_digest"] = task.digest
            source.copy(f"data/{task.name}", data, task.name, shallow=True)  # obs without what is in it
            group = data[task.name]
            for key in _FROM_REPLAY:
                group.pop(key, None)
            for name, value in attributes.items():
                group.attrs[name] = value
            rows.write(group)
        with atomic_writer(task.part) as part:
            part.write(memory.getbuffer())


class _Job:
    """One file and the one it becomes: what is done, what is missing, and the joining."""

    def __init__(self, path: Path, target: Path, source: Path, config: RerenderConfig) -> None:
        find_task(path)  # a file that is named after no task is refused before anything is rendered
        self._path, self._target, self._config = path, target, config
        self.label = path.name if source.is_file() else str(path.relative_to(source))
        self.names, self._digest = demo_names(path), config.digest(path)
        self._parts = target.with_name(f".{target.name}.parts")
        self._found: dict[str, tuple[Path, ReplayReport]] = {}
        self._damaged: dict[str, ReplayReport] = {}
        if target.exists():
            self._found = self._finished_in(target)
            if not self._found:
                raise InputError(
                    f"{target} exists and holds something else",
                    expected="no file there, or one rendered from the same source with the same configuration",
                    fix=f"render into another folder, or remove it: rm {target}",
                )
        if target.parent.is_dir():
            remove_leftovers(target.parent)
        for part in self._parts.glob("demo_*.hdf5"):
            self._found |= {name: found for name, found in self._finished_in(part).items() if name not in self._found}

    def missing(self) -> list[_RenderTask]:
        """What is to be rendered."""
        return [
            _RenderTask(self._path, name, self.label, self._parts / f"{name}.hdf5", self._digest)
            for name in self.names
            if name not in self._found
        ]

    def take(self, report: ReplayReport) -> None:
        """Count one demonstration in, or as damaged."""
        if report.damage is None:
            self._found[report.demo] = self._parts / f"{report.demo}.hdf5", report
        else:
            self._damaged[report.demo] = report

    def reports(self) -> list[ReplayReport]:
        """One for every demonstration of the source, in its order."""
        return [self._damaged[name] if name in self._damaged else self._found[name][1] for name in self.names]

    def finish_if_over(self) -> None:
        """Join the new file when every demonstration is there or damaged."""
        is_over = len(self._found) + len(self._damaged) == len(self.names)
        if is_over and any(file != self._target for file, _ in self._found.values()):
            self._join()

    def _finished_in(self, path: Path) -> dict[str, tuple[Path, ReplayReport]]:
        """Demonstration -> the file it is in and its report; empty if the file is of another source or setting."""
        try:
            with h5py.File(path, "r") as file:
                if file["data"].attrs["rerender_digest"] != self._digest:
                    return {}
                return {
                    name: (path, ReplayReport(**json.loads(demo.attrs["replay"])))
                    for name, demo in file["data"].items()
                }
        except (OSError, KeyError, RuntimeError, ValueError, TypeError):
            return {}

    def _join(self) -> None:
        """Write the new file under its name, whole, and remove the parts."""
        needed = sum(file.stat().st_size for file in {file for file, _ in self._found.values()})
        if needed > shutil.disk_usage(self._parts.parent).free:
            raise OSError(errno.ENOSPC, "no room to join the demonstrations", str(self._target))
        temporary = temporary_name(self._target)
        try:
            with h5py.File(temporary, "w") as file:
                data = file.create_group("data")
                with reading(self._path, "") as source:
                    attributes = dict(source["data"].attrs)
                for name in _NOT_COPIED:
                    attributes.pop(name, None)
                attributes |= {
                    "num_demos": len(self._found),
                    "total": sum(report.frames for _, report in self._found.values()),
                    "camera_names": json.dumps([file_camera_name(name) for name in self._config.cameras]),
                    "rerender_config": self._config.model_dump_json(exclude={"workers"}),
                    "rerender_digest": self._digest,
                }
                for name, value in attributes.items():
                    data.attrs[name] = value
                for name in self.names:
                    if name in self._found:
                        with h5py.File(self._found[name][0], "r") as part:
                            part.copy(f"data/{name}", data, name)
            sync_file(temporary)
            temporary.replace(self._target)
        except RuntimeError as problem:  # what h5py says when the last buffers do not fit on the disk
            raise InputError(
                f"{self._target} could not be written",
                found=str(problem),
                fix="make room, then run the same command again; finished demonstrations are kept",
            ) from problem
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self._target.parent)
        shutil.rmtree(self._parts, ignore_errors=True)


def _matches(replay: Replay) -> bool:
    return replay.max_state_error is not None and replay.max_state_error <= MATCHED_BELOW
