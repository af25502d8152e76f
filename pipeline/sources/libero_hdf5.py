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
- ``demo_10`` sorts before ``demo_2`` as text; demonstrations are ordered by number.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import ACTION_DIM, CameraContract, Contract, ImageOrientation
from geomcache.cache_schemas.errors import InputError, SourceDamaged
from geomcache.cache_schemas.fingerprint import digest_files, digest_json
from geomcache.pipeline.camera_geometry import inverse_pose, metric_depth
from geomcache.pipeline.frames import EpisodeHead, EpisodeRows, FrameBatch
from geomcache.pipeline.official_layout import (
    SUFFIXES,
    file_camera_name,
    instruction_of,
    simulator_camera_name,
    suite_named_in,
)
from geomcache.pipeline.orientation import to_upright

_VERSION = 2  # raised whenever the same files give other rows
_RE_DOWNLOAD = "download or record the file again, leave it out of the folder, or go on without it: --on-error skip"
_LARGEST_ACTION = 1.0 + 1e-6
_STATE_FIELDS = (("ee_states", (6,)), ("gripper_states", (2,)))  # of obs, in the order of Contract.state_layout
_METADATA = ("seed", "init_state_index", "noise")

ObservationTime = Literal["after_action", "before_action"]


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


@dataclass(frozen=True)
class _Demo:
    """Where one demonstration is; or, without a name, what is wrong with a whole file."""

    path: Path
    name: str
    problem: SourceDamaged | None = None


class Source:
    """Demonstrations of HDF5 files in LIBERO's layout, in file-name then demonstration order."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.files = _find_files(config.path)
        self._demos = [demo for path in self.files for demo in _demos_of(path)]
        if not self._demos:
            raise InputError(
                f"{config.path} holds no demonstrations",
                expected="at least one data/demo_<i> group",
                found="none",
                fix="geomcache demos --suite libero_object --task 0 --episodes 4 --out DIR",
            )
        self.contract, self._observation = self._conventions()

    @property
    def location(self) -> str:
        """Name of the file or folder, for data cards."""
        return self.config.path.resolve().name

    @property
    def details(self) -> Mapping[str, str]:
        """What the files are, as data cards say it."""
        return {
            "format": "LIBERO HDF5",
            "files": str(len(self.files)),
            "image_orientation": self.config.image_orientation,
            "observation": self._observation,
        }

    @cached_property
    def revision(self) -> str:
        """Digest over the bytes of every file and over how they are read."""
        files = [[path.name, digest] for path, digest in zip(self.files, digest_files(self.files), strict=True)]
        return digest_json([_VERSION, files, self.config.model_dump(mode="json", exclude={"path"})])

    @property
    def episode_count(self) -> int:
        """Number of demonstrations; a file that cannot be opened counts as one."""
        return len(self._demos)

    def demonstration(self, episode: int) -> tuple[Path, str]:
        """(file, ``demo_<i>``) of one demonstration, for those who replay it."""
        return self._demos[episode].path, self._demos[episode].name

    @property
    def has_simulator_states(self) -> bool:
        """Whether the first demonstration that can be read can be replayed."""
        for demo in self._demos:
            with suppress(SourceDamaged), _reading(demo) as group:
                return "states" in group
        return False

    def head(self, episode: int) -> EpisodeHead:
        """Everything of one demonstration but its pictures, checked.

        Raises:
            SourceDamaged: a field is missing, of another length or kind, or holds numbers that cannot be.
        """
        demo = self._demos[episode]
        with _reading(demo) as group:
            actions_TA = self._check(group, demo)
            kept = self._rows(len(actions_TA))
            return EpisodeHead(
                where=f"{demo.path.name}: data/{demo.name}",
                suite=_suite_of(group.file, demo.path),
                task=_task_of(demo.path),
                number=int(demo.name.removeprefix("demo_")),
                instruction=instruction_of(_task_of(demo.path)),
                actions_TA=actions_TA[kept:],
                succeeded=_succeeded(group),
                metadata={key: str(group.attrs[key]) for key in _METADATA if key in group.attrs},
            )

    def read(self, episode: int, start: int, stop: int) -> EpisodeRows:
        """Rows ``start`` to ``stop`` - 1 of one demonstration.

        Raises:
            SourceDamaged: the pictures cannot be read, or hold another size than the contract says.
        """
        demo = self._demos[episode]
        with _reading(demo) as group:
            return EpisodeRows(self._frames(group, demo, start, stop), _states(group, demo, start, stop))

    def _rows(self, steps: int) -> int:
        """Actions in front that have no observation before them."""
        return 1 if self._observation == "after_action" and steps else 0

    def _conventions(self) -> tuple[Contract, ObservationTime]:
        """Those of the first demonstration that can be read; ``head`` compares every other one with them."""
        problems = []
        for demo in self._demos:
            try:
                with _reading(demo) as group:
                    official = "problem_info" in group.file["data"].attrs
                    told: ObservationTime = "after_action" if official else "before_action"
                    return self._read_contract(group, demo), self.config.observation or told
            except SourceDamaged as problem:
                problems.append(problem)
        raise problems[0]

    def _read_contract(self, group: h5py.Group, demo: _Demo) -> Contract:
        obs = _member(group, "obs", demo.path)
        cameras = []
        for camera in self.config.cameras:
            images = _member(obs, f"{file_camera_name(camera)}_rgb", demo.path, camera=camera)
            if images.ndim != 4 or images.shape[-1] != 3:
                raise _damaged(demo, f"{images.name} has shape {images.shape}, expected (T, H, W, 3)")
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

    def _check(self, group: h5py.Group, demo: _Demo) -> NDArray[np.float32]:
        """Every field's shape and kind, every number but the pixels; returns the recorded actions [T, 7]."""
        actions_TA = np.asarray(_member(group, "actions", demo.path))
        steps = len(actions_TA)
        if actions_TA.shape != (steps, ACTION_DIM) or steps < 2 or actions_TA.dtype.kind not in "fiu":
            raise _damaged(
                demo, f"actions are {actions_TA.dtype} {actions_TA.shape}, expected numbers (T >= 2, {ACTION_DIM})"
            )
        _require_finite("actions", actions_TA, demo)
        if np.abs(actions_TA).max() > _LARGEST_ACTION:
            step, dim = np.argwhere(np.abs(actions_TA) > _LARGEST_ACTION)[0]
            raise _damaged(demo, f"actions[{step}, {dim}] is {actions_TA[step, dim]:g}, expected -1 to 1")
        for key, shape in _STATE_FIELDS:
            _require_finite(f"obs/{key}", np.asarray(_field(group, key, shape, demo, steps)), demo)
        for camera in self.contract.cameras:
            stored, size = file_camera_name(camera.name), self._stored_size(camera)
            if _field(group, f"{stored}_rgb", (*size, 3), demo, steps).dtype != np.uint8:
                raise _damaged(demo, f"obs/{stored}_rgb is {group[f'obs/{stored}_rgb'].dtype}, expected uint8")
            if self.contract.has_depth:
                _field(group, f"{stored}_depth", (*size, 1), demo, steps)
                for key, side in (("intrinsics", 3), ("extrinsics", 4)):
                    matrices = np.asarray(_field(group, f"{stored}_{key}", (side, side), demo, steps))
                    _require_finite(f"obs/{stored}_{key}", matrices, demo)
        if self.contract.has_depth:
            _depth_attributes(group, demo)
        return actions_TA.astype(np.float32)

    def _stored_size(self, camera: CameraContract) -> tuple[int, int]:
        """(rows, columns) as stored; a quarter turn swaps them."""
        turned = to_upright(np.zeros((camera.height, camera.width, 0)), self.config.image_orientation, row_axis=0)
        return turned.shape[0], turned.shape[1]

    def _frames(self, group: h5py.Group, demo: _Demo, start: int, stop: int) -> FrameBatch:
        rows = slice(start, stop)
        images, depths, intrinsics, extrinsics = [], [], [], []
        for camera in self.contract.cameras:
            stored, size = file_camera_name(camera.name), self._stored_size(camera)
            image = _field(group, f"{stored}_rgb", (*size, 3), demo)[rows]
            images.append(to_upright(image, self.config.image_orientation, row_axis=1))
            if self.contract.has_depth:
                near, far, base_from_world = _depth_attributes(group, demo)
                z_buffer = _field(group, f"{stored}_depth", (*size, 1), demo)[rows][..., 0]
                _require_finite(f"obs/{stored}_depth", z_buffer, demo)
                depths.append(metric_depth(to_upright(z_buffer, self.config.image_orientation, row_axis=1), near, far))
                intrinsics.append(_field(group, f"{stored}_intrinsics", (3, 3), demo)[rows].astype(np.float64))
                extrinsics.append(base_from_world @ _field(group, f"{stored}_extrinsics", (4, 4), demo)[rows])
        if not self.contract.has_depth:
            return FrameBatch(np.stack(images, axis=1))
        return FrameBatch(*(np.stack(part, axis=1) for part in (images, depths, intrinsics, extrinsics)))


def _states(group: h5py.Group, demo: _Demo, start: int, stop: int) -> NDArray[np.float32]:
    parts = [
        _field(group, key, shape, demo)[start:stop] for key, shape in (("ee_states", (6,)), ("gripper_states", (2,)))
    ]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _field(group: h5py.Group, key: str, shape: tuple[int, ...], demo: _Demo, steps: int | None = None) -> Any:
    """``obs/<key>`` [T, *shape], its shape and kind checked; not read yet."""
    values = _member(_member(group, "obs", demo.path), key, demo.path)
    if not isinstance(values, h5py.Dataset):
        raise _damaged(demo, f"obs/{key} is a group, expected an array")
    if steps is not None and len(values.shape) and values.shape[0] != steps:
        raise _damaged(demo, f"obs/{key} has {values.shape[0]} steps but there are {steps} actions")
    if values.shape[1:] != shape or values.dtype.kind not in "fiu":
        raise _damaged(demo, f"obs/{key} is {values.dtype} {values.shape[1:]} a step, expected {shape}")
    return values


def _require_finite(what: str, values: NDArray[Any], demo: _Demo) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise _damaged(demo, f"{what} hold NaN or infinite numbers")


def _depth_attributes(group: h5py.Group, demo: _Demo) -> tuple[float, float, NDArray[np.float64]]:
    """(near, far) in metres and the transform [4, 4] from the world to the robot base."""
    try:
        near, far = float(group.attrs["depth_near"]), float(group.attrs["depth_far"])
        base = np.asarray(group.attrs["robot_base_pose"], dtype=np.float64).reshape(4, 4)
    except (KeyError, ValueError, TypeError) as problem:
        raise _damaged(demo, f"attribute depth_near, depth_far or robot_base_pose: {problem}") from problem
    if not 0.0 < near < far:
        raise _damaged(demo, f"depth_near {near:g}, depth_far {far:g}, expected 0 < near < far")
    if not np.allclose(base[:3, :3] @ base[:3, :3].T, np.eye(3), atol=1e-6) or not np.isfinite(base).all():
        raise _damaged(demo, "robot_base_pose is no rigid transform")
    return near, far, inverse_pose(base)


def _succeeded(group: h5py.Group) -> bool | None:
    for key in ("rewards", "dones"):
        if isinstance(group.get(key), h5py.Dataset) and group[key].size and group[key].dtype.kind in "fiub":
            return bool(np.asarray(group[key]).max() > 0)
    return None


def _task_of(path: Path) -> str:
    return path.stem.removesuffix("_demo")


def _suite_of(file: h5py.File, path: Path) -> str:
    bddl = str(file["data"].attrs.get("bddl_file_name", ""))
    return Path(bddl).parent.name if bddl else suite_named_in(str(path.parent))


def _find_files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(
            f"the source {path} does not exist",
            expected="an .hdf5 file or a folder of them",
            fix="geomcache demos --suite libero_object --task 0 --episodes 4 --out DIR",
        )
    files = [path] if path.is_file() else sorted(found for suffix in SUFFIXES for found in path.rglob(f"[!.]*{suffix}"))
    if not files:
        raise InputError(
            f"the source folder {path} is empty",
            expected="LIBERO files named <task>_demo.hdf5",
            found=", ".join(sorted(p.name for p in path.iterdir())[:4]) or "nothing",
            fix="geomcache demos --suite libero_object --task 0 --episodes 4 --out DIR",
        )
    return files


def _demos_of(path: Path) -> list[_Demo]:
    """The file's demonstrations by number; a fault of the whole file stands among them as one that cannot be read."""
    try:
        with _open(path) as file:
            data = _member(file, "data", path)
            names = [name for name in data if re.fullmatch(r"demo_\d+", name)]
            demos = [_Demo(path, name) for name in sorted(names, key=lambda name: int(name.removeprefix("demo_")))]
            wanted = int(data.attrs.get("num_demos", len(names)))
    except SourceDamaged as problem:
        return [_Demo(path, "", problem)]
    if wanted != len(demos):
        missing = SourceDamaged(
            f"{path}: demonstrations are missing",
            expected=f"{wanted} demonstrations, as the attribute num_demos says",
            found=f"{len(demos)}",
            fix=_RE_DOWNLOAD,
        )
        demos.append(_Demo(path, "", missing))
    return demos


@contextmanager
def _reading(demo: _Demo) -> Iterator[h5py.Group]:
    """The demonstration's group; HDF5's own errors are named by file and episode."""
    if demo.problem is not None:
        raise demo.problem
    with _open(demo.path) as file:
        try:
            yield _member(file, f"data/{demo.name}", demo.path)
        except (OSError, KeyError, RuntimeError) as problem:
            raise _damaged(demo, str(problem)) from problem


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as problem:
        raise SourceDamaged(
            f"{path} cannot be opened", expected="a whole HDF5 file", found=str(problem), fix=_RE_DOWNLOAD
        ) from problem


def _member(group: h5py.Group, key: str, path: Path, *, camera: str | None = None) -> Any:
    if isinstance(group, h5py.Group) and key in group:
        return group[key]
    there = ", ".join(list(group)[:12]) if isinstance(group, h5py.Group) else "an array, not a group"
    fix = f"name the cameras that the file has, e.g. --set source.cameras='[agentview]' ({camera} is missing)"
    raise SourceDamaged(
        f"{path}: {group.name.rstrip('/')}/{key} is missing",
        expected=f"the field {key!r} of the official LIBERO layout",
        found=there or "nothing",
        fix=fix if camera else _RE_DOWNLOAD,
    )


def _damaged(demo: _Demo, found: str) -> SourceDamaged:
    return SourceDamaged(
        f"{demo.path}: data/{demo.name} cannot be used",
        expected="the official LIBERO layout",
        found=found,
        fix=_RE_DOWNLOAD,
    )
