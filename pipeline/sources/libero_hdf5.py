"""LIBERO's HDF5 layout: one file per task, ``<task>_demo.hdf5``, ``data/demo_<i>``.

Non-obvious:
- In the official files ``obs[j]`` was taken AFTER ``actions[j]`` (LIBERO's create_dataset.py), so the observation at
  which action j+1 is chosen is ``obs[j]``: T recorded steps give T-1 rows (obs[j], actions[j+1]). LIBERO's script drops
  the first 5 steps of a demonstration (the arm still settles); nothing needs to be dropped here.
- The "no-noops" regeneration (OpenVLA's regenerate_libero_dataset.py) has the same fields, but ``obs[j]`` is BEFORE
  ``actions[j]``: T rows. Its files lack every attribute of ``data``, which is how they are told apart.
- Images are the simulator's raw buffer, bottom-up; they are turned upright here and nowhere else.
- Depth, when present, is a z-buffer in [0, 1]; ``depth_near`` and ``depth_far`` (demo attributes written by
  ``geomcache demos``) turn it into metres. Official public files hold none.
- The instruction is the task's name in words, which is what LIBERO's benchmark (and so evaluation) gives a policy;
  ``problem_info`` holds the BDDL file's own wording, which differs ("Pick the milk" / "pick up the milk").
- ``geomcache demos --every k`` observes only every k-th step: ``obs[r]`` was taken after ``actions[r * k]``, so row r
  holds it and the k actions from r * k + 1 on. The demonstration's attribute ``observe_every`` says k.
- The data's attribute ``suite`` (of our recorder) names the suite; several suites share one BDDL file.
- ``demo_10`` sorts before ``demo_2`` as text; demonstrations are ordered by number.
"""

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import ACTION_DIM, CameraContract, Contract, ImageOrientation
from geomcache.cache_schemas.errors import InputError, SourceDamaged
from geomcache.cache_schemas.fingerprint import digest_files, digest_json
from geomcache.pipeline.camera_geometry import metric_depth
from geomcache.pipeline.frames import EpisodeHead, EpisodeRows, FrameBatch
from geomcache.pipeline.official_layout import (
    file_camera_name,
    instruction_of,
    simulator_camera_name,
    suite_named_in,
)
from geomcache.pipeline.orientation import to_upright
from geomcache.pipeline.sources._hub import location_of
from geomcache.pipeline.sources._libero_files import (
    Demo,
    ObservationTime,
    damaged,
    demos_of,
    depth_attributes,
    field,
    find_files,
    member,
    observe_every,
    perturbed_steps,
    reading,
    require_finite,
    require_matrices,
    rows_of,
)

_VERSION = 2  # raised whenever the same files give other rows
_LARGEST_ACTION = 1.0 + 1e-6
_STATE_FIELDS = (("ee_states", (6,)), ("gripper_states", (2,)))  # of obs, in the order of Contract.state_layout
_METADATA = ("seed", "init_state_index", "noise", "perturb")


class Config(Schema):
    """Where the files are and what they follow."""

    path: Path  # one .hdf5 file, or a folder of them (searched recursively)
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")  # V views in order, by simulator name
    image_orientation: ImageOrientation = "bottom_up"
    depth: bool | None = None  # None: taken when every view has it; false: left out
    observation: ObservationTime | None = None  # obs[j] relative to actions[j]; None: told by the file's attributes

    @field_validator("cameras")
    @classmethod
    def _simulator_names(cls, cameras: tuple[str, ...]) -> tuple[str, ...]:
        for camera in cameras:
            if simulator_camera_name(camera) != camera:
                raise ValueError(f"{camera} is a file's short name; say {simulator_camera_name(camera)}")
        if not cameras or len(set(cameras)) != len(cameras):
            raise ValueError("at least one camera, none twice")
        return cameras


class Source:
    """Demonstrations of HDF5 files in LIBERO's layout, in file-name then demonstration order."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.files = find_files(config.path)
        self._demos = [demo for path in self.files for demo in demos_of(path)]
        if not self._demos:
            raise InputError(
                f"{config.path} holds no demonstrations",
                expected="at least one data/demo_<i> group",
                found="none",
                fix="geomcache demos --suite libero_object --task 0 --episodes 4 --out DIR",
            )
        self.contract = self._first_contract()

    @property
    def location(self) -> str:
        """Name of the file, folder or hub data set, for data cards."""
        return location_of(self.config.path)

    @property
    def details(self) -> Mapping[str, str]:
        """What the files are, as data cards say it."""
        return {
            "format": "LIBERO HDF5",
            "files": str(len(self.files)),
            "image_orientation": self.config.image_orientation,
            "observation": ", ".join(sorted({self.observation(episode) for episode in range(len(self._demos))})),
        }

    @cached_property
    def revision(self) -> str:
        """Digest over the bytes of every file and over how they are read."""
        there = [path for path in self.files if path.exists()]  # a dangling link is told by its head
        files = [
            [path.name, suite_named_in(str(path.resolve().parent)), digest]
            for path, digest in zip(there, digest_files(there), strict=True)
        ]
        return digest_json([_VERSION, files, self.config.model_dump(mode="json", exclude={"path"})])

    @property
    def episode_count(self) -> int:
        """Number of demonstrations; a file that cannot be opened counts as one."""
        return len(self._demos)

    def where(self, episode: int) -> str:
        """File and demonstration as a person finds them."""
        demo = self._demos[episode]
        return f"{demo.path.name}: data/{demo.name}" if demo.name else demo.path.name

    def observation(self, episode: int) -> ObservationTime:
        """When obs[j] was taken relative to actions[j]: as declared, else as the file's attributes tell."""
        return self.config.observation or self._demos[episode].observation

    def demonstration(self, episode: int) -> tuple[Path, str]:
        """(file, ``demo_<i>``) of one demonstration, for those who replay it."""
        return self._demos[episode].path, self._demos[episode].name

    @property
    def has_simulator_states(self) -> bool:
        """Whether the first demonstration that can be read can be replayed."""
        for demo in self._demos:
            with suppress(SourceDamaged), reading(demo) as group:
                return "states" in group
        return False

    def head(self, episode: int) -> EpisodeHead:
        """Everything of one demonstration but its pictures, checked.

        Raises:
            SourceDamaged: a field is missing, of another length or kind, or holds numbers that cannot be.
        """
        demo = self._demos[episode]
        with reading(demo) as group:
            actions_TA = self._check(group, demo)
            first = 1 if self.observation(episode) == "after_action" else 0  # that action has no observation before it
            perturbed_T = perturbed_steps(group, demo, len(actions_TA))
            return EpisodeHead(
                where=self.where(episode),
                suite=_suite_of(group.file, demo.path),
                task=_task_of(demo.path),
                number=int(demo.name.removeprefix("demo_")),
                instruction=instruction_of(_task_of(demo.path)),
                actions_TA=actions_TA[first:],
                succeeded=_succeeded(group),
                metadata={key: str(group.attrs[key]) for key in _METADATA if key in group.attrs},
                steps_per_row=observe_every(group, demo),
                perturbed_T=None if perturbed_T is None else perturbed_T[first:],
            )

    def read(self, episode: int, start: int, stop: int) -> EpisodeRows:
        """Rows ``start`` to ``stop`` - 1 of one demonstration.

        Raises:
            SourceDamaged: the pictures cannot be read, or hold another size than the contract says.
        """
        demo = self._demos[episode]
        with reading(demo) as group:
            return EpisodeRows(self._frames(group, demo, start, stop), _states(group, demo, start, stop))

    def _first_contract(self) -> Contract:
        """That of the first demonstration that can be read; ``head`` compares every other one with it."""
        problems = []
        for demo in self._demos:
            try:
                with reading(demo) as group:
                    return self._read_contract(group, demo)
            except SourceDamaged as problem:
                problems.append(problem)
        raise problems[0]

    def _read_contract(self, group: h5py.Group, demo: Demo) -> Contract:
        obs = member(group, "obs", demo.path)
        cameras = []
        for camera in self.config.cameras:
            fix = f"name the cameras that the file has, e.g. --set source.cameras='[agentview]' ({camera} is missing)"
            images = member(obs, f"{file_camera_name(camera)}_rgb", demo.path, fix=fix)
            if not isinstance(images, h5py.Dataset) or images.ndim != 4 or images.shape[-1] != 3:
                raise damaged(demo, f"obs/{file_camera_name(camera)}_rgb is no array (T, H, W, 3)")
            blank = to_upright(np.zeros((*images.shape[1:3], 0)), self.config.image_orientation, row_axis=0)
            cameras.append(CameraContract(name=camera, height=blank.shape[0], width=blank.shape[1]))
        missing = [
            f"{file_camera_name(camera)}_{field}"
            for camera in self.config.cameras
            for field in ("depth", "intrinsics", "extrinsics")
            if f"{file_camera_name(camera)}_{field}" not in obs
        ]
        if self.config.depth and missing:
            raise SourceDamaged(
                f"{demo.path}: data/{demo.name} has no depth",
                expected=f"obs/{missing[0]}",
                found=", ".join(obs),
                fix="add it by replay: geomcache demos --replay SOURCE --out DIR",
            )
        has_depth = not missing if self.config.depth is None else self.config.depth
        return Contract(image_orientation="upright", cameras=tuple(cameras), has_depth=has_depth)

    def _check(self, group: h5py.Group, demo: Demo) -> NDArray[np.float32]:
        """Every field's shape and kind, every number but the pixels; returns the recorded actions [T, 7]."""
        actions_TA = np.asarray(member(group, "actions", demo.path))
        steps = len(actions_TA) if actions_TA.ndim else 0
        if actions_TA.shape != (steps, ACTION_DIM) or steps < 2 or actions_TA.dtype.kind not in "fiu":
            raise damaged(
                demo, f"actions are {actions_TA.dtype} {actions_TA.shape}, expected numbers (T >= 2, {ACTION_DIM})"
            )
        every = observe_every(group, demo)
        require_finite("actions", actions_TA, demo)
        if np.abs(actions_TA).max() > _LARGEST_ACTION:
            step, dim = np.argwhere(np.abs(actions_TA) > _LARGEST_ACTION)[0]
            raise damaged(demo, f"actions[{step}, {dim}] is {actions_TA[step, dim]:g}, expected -1 to 1")
        if 0.0 <= actions_TA[:, -1].min() < 1.0:
            raise damaged(demo, "the gripper runs from 0 to 1, expected -1 (open) to +1 (close)")
        for key, shape in _STATE_FIELDS:
            require_finite(f"obs/{key}", np.asarray(field(group, key, shape, demo, steps, every)), demo)
        for camera in self.contract.cameras:
            stored, size = file_camera_name(camera.name), self._stored_size(camera)
            if field(group, f"{stored}_rgb", (*size, 3), demo, steps, every).dtype != np.uint8:
                raise damaged(demo, f"obs/{stored}_rgb is {group[f'obs/{stored}_rgb'].dtype}, expected uint8")
            if self.contract.has_depth:
                field(group, f"{stored}_depth", (*size, 1), demo, steps, every)
                for key, side in (("intrinsics", 3), ("extrinsics", 4)):
                    matrices = np.asarray(field(group, f"{stored}_{key}", (side, side), demo, steps, every))
                    require_finite(f"obs/{stored}_{key}", matrices, demo)
                    require_matrices(f"obs/{stored}_{key}", matrices, demo)
        if self.contract.has_depth:
            depth_attributes(group, demo)
        return actions_TA.astype(np.float32)

    def _stored_size(self, camera: CameraContract) -> tuple[int, int]:
        """(rows, columns) as stored; a quarter turn swaps them."""
        turned = to_upright(np.zeros((camera.height, camera.width, 0)), self.config.image_orientation, row_axis=0)
        return turned.shape[0], turned.shape[1]

    def _frames(self, group: h5py.Group, demo: Demo, start: int, stop: int) -> FrameBatch:
        rows = slice(start, stop)
        images, depths, intrinsics, extrinsics = [], [], [], []
        for camera in self.contract.cameras:
            stored, size = file_camera_name(camera.name), self._stored_size(camera)
            image = rows_of(group, f"{stored}_rgb", (*size, 3), demo, rows)
            images.append(to_upright(image, self.config.image_orientation, row_axis=1))
            if self.contract.has_depth:
                near, far, base_from_world = depth_attributes(group, demo)
                z_buffer = rows_of(group, f"{stored}_depth", (*size, 1), demo, rows)[..., 0]
                if not ((z_buffer >= 0.0) & (z_buffer <= 1.0)).all():  # false for NaN too
                    raise damaged(demo, f"obs/{stored}_depth is no z-buffer: {z_buffer.min():g} to {z_buffer.max():g}")
                depths.append(metric_depth(to_upright(z_buffer, self.config.image_orientation, row_axis=1), near, far))
                intrinsics.append(rows_of(group, f"{stored}_intrinsics", (3, 3), demo, rows).astype(np.float64))
                extrinsics.append(base_from_world @ rows_of(group, f"{stored}_extrinsics", (4, 4), demo, rows))
        if not self.contract.has_depth:
            return FrameBatch(np.stack(images, axis=1))
        return FrameBatch(*(np.stack(part, axis=1) for part in (images, depths, intrinsics, extrinsics)))


def _states(group: h5py.Group, demo: Demo, start: int, stop: int) -> NDArray[np.float32]:
    parts = [rows_of(group, key, shape, demo, slice(start, stop)) for key, shape in _STATE_FIELDS]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _succeeded(group: h5py.Group) -> bool | None:
    for key in ("rewards", "dones"):
        if isinstance(group.get(key), h5py.Dataset) and group[key].size and group[key].dtype.kind in "fiub":
            return bool(np.asarray(group[key]).max() > 0)
    return None


def _task_of(path: Path) -> str:
    return path.stem.removesuffix("_demo")


def _suite_of(file: h5py.File, path: Path) -> str:
    if "suite" in file["data"].attrs:
        return str(file["data"].attrs["suite"])
    bddl = str(file["data"].attrs.get("bddl_file_name", ""))
    return Path(bddl).parent.name if bddl else suite_named_in(str(path.resolve().parent))
