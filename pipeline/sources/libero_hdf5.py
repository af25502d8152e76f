"""The official LIBERO HDF5 layout: one file per task, ``<task>_demo.hdf5``, ``data/demo_<i>``.

Non-obvious:
- ``obs[j]`` was taken AFTER ``actions[j]`` (LIBERO's create_dataset.py), so the observation at which action j+1
  is chosen is ``obs[j]``. A demonstration of T recorded steps therefore gives T-1 rows: (obs[j], actions[j+1]).
- Images are the simulator's raw buffer, bottom-up; they are turned upright here and nowhere else.
- Depth, when present, is a z-buffer in [0, 1]; ``depth_near`` and ``depth_far`` (demo attributes written by
  ``geomcache demos``) turn it into metres. Official public files hold none.
- The instruction is the task's name in words, which is what LIBERO's benchmark (and so evaluation) gives a policy;
  ``problem_info`` holds the BDDL file's own wording, which differs ("Pick the milk" / "pick up the milk").
- ``demo_10`` sorts before ``demo_2`` as text; demonstrations are ordered by number.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import ACTION_DIM, CameraContract, Contract, ImageOrientation
from geomcache.cache_schemas.errors import InputError, SourceDamaged
from geomcache.cache_schemas.fingerprint import digest_file, digest_json
from geomcache.pipeline.camera_geometry import inverse_pose, metric_depth
from geomcache.pipeline.frames import Episode, FrameBatch
from geomcache.pipeline.official_layout import file_camera_name, instruction_of, simulator_camera_name
from geomcache.pipeline.orientation import to_upright

_VERSION = 1  # raised whenever the same files give other episodes
_RE_DOWNLOAD = "download or record the file again, or leave it out of the folder"


class Config(Schema):
    """Where the files are and what they follow."""

    path: Path  # one .hdf5 file, or a folder of them (searched recursively)
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")  # V views in order, by simulator name
    image_orientation: ImageOrientation = "bottom_up"

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
    """Episodes of official-layout HDF5 files, in file-name then demonstration order."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.files = _find_files(config.path)
        self._demos = [(path, name) for path in self.files for name in _demo_names(path)]
        if not self._demos:
            raise InputError(
                f"{config.path} holds no demonstrations",
                expected="at least one data/demo_<i> group",
                found="none",
                fix="geomcache demos --suite libero_object --task 0 --episodes 4 --out DIR",
            )
        self.contract = self._read_contract()

    @property
    def location(self) -> str:
        """Name of the file or folder, for data cards."""
        return self.config.path.resolve().name

    @property
    def revision(self) -> str:
        """Digest over the bytes of every file and over how they are read."""
        files = [[path.name, digest_file(path)] for path in self.files]
        return digest_json([_VERSION, files, list(self.config.cameras), self.config.image_orientation])

    @property
    def episode_count(self) -> int:
        """Number of demonstrations."""
        return len(self._demos)

    def episodes(self) -> Iterator[Episode]:
        """Yield every demonstration; see the module's notes for the alignment of rows.

        Raises:
            SourceDamaged: a field is missing, truncated, of another length or holds non-finite numbers.
        """
        for path, name in self._demos:
            with _open(path) as file:
                try:
                    yield self._read(file, path, name)
                except (OSError, KeyError, RuntimeError) as problem:
                    raise _damaged(path, name, str(problem)) from problem

    def _read_contract(self) -> Contract:
        path, name = self._demos[0]
        with _open(path) as file:
            obs = _member(file, f"data/{name}/obs", path)
            cameras, has_depth = [], True
            for camera in self.config.cameras:
                images = _member(obs, f"{file_camera_name(camera)}_rgb", path, camera=camera)
                if images.ndim != 4 or images.shape[-1] != 3:
                    raise _damaged(path, name, f"{images.name} has shape {images.shape}, expected (T, H, W, 3)")
                cameras.append(CameraContract(name=camera, height=images.shape[1], width=images.shape[2]))
                has_depth &= all(
                    f"{file_camera_name(camera)}_{field}" in obs for field in ("depth", "intrinsics", "extrinsics")
                )
            return Contract(image_orientation="upright", cameras=tuple(cameras), has_depth=has_depth)

    def _read(self, file: h5py.File, path: Path, name: str) -> Episode:
        demo = _member(file, f"data/{name}", path)
        obs = _member(demo, "obs", path)
        actions_TA = np.asarray(_member(demo, "actions", path), dtype=np.float32)
        steps = len(actions_TA)
        if actions_TA.shape != (steps, ACTION_DIM) or steps < 2:
            raise _damaged(path, name, f"actions of shape {actions_TA.shape}, expected (T >= 2, {ACTION_DIM})")

        def field(key: str, *shape: int) -> NDArray[Any]:
            values = np.asarray(_member(obs, key, path))
            if len(values.shape) and len(values) != steps:
                raise _damaged(path, name, f"obs/{key} has {len(values)} steps but there are {steps} actions")
            if values.shape[1:] != shape or values.dtype.kind not in "fiu":
                raise _damaged(path, name, f"obs/{key} is {values.dtype} {values.shape[1:]} a step, expected {shape}")
            return finite(f"obs/{key}", values)

        def finite(what: str, values: NDArray[Any]) -> NDArray[Any]:
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise _damaged(path, name, f"{what} hold NaN or infinite numbers")
            return values

        finite("actions", actions_TA)
        states_TS = np.concatenate([field("ee_states", 6), field("gripper_states", 2)], axis=1).astype(np.float32)
        frames = self._read_frames(demo, field, path, name)
        task = path.stem.removesuffix("_demo")
        return Episode(
            suite=Path(str(file["data"].attrs.get("bddl_file_name", "unknown/x"))).parent.name,
            task=task,
            episode=int(name.removeprefix("demo_")),
            instruction=instruction_of(task),
            frames=frames[slice(0, steps - 1)],  # the last observation has no action
            states_TS=states_TS[:-1],
            actions_TA=actions_TA[1:],
            metadata={key: str(demo.attrs[key]) for key in ("seed", "init_state_index", "noise") if key in demo.attrs},
        )

    def _read_frames(self, demo: h5py.Group, field: Any, path: Path, name: str) -> FrameBatch:
        images, depths, intrinsics, extrinsics = [], [], [], []
        for camera in self.contract.cameras:
            stored, height, width = file_camera_name(camera.name), camera.height, camera.width
            image = field(f"{stored}_rgb", height, width, 3)
            if image.dtype != np.uint8:
                raise _damaged(path, name, f"obs/{stored}_rgb is {image.dtype}, expected uint8")
            images.append(to_upright(image, self.config.image_orientation, row_axis=1))
            if self.contract.has_depth:
                near, far = float(demo.attrs["depth_near"]), float(demo.attrs["depth_far"])
                z_buffer = to_upright(
                    field(f"{stored}_depth", height, width, 1)[..., 0], self.config.image_orientation, row_axis=1
                )
                depths.append(metric_depth(z_buffer, near, far))
                intrinsics.append(field(f"{stored}_intrinsics", 3, 3))
                base_from_world = inverse_pose(np.asarray(demo.attrs["robot_base_pose"]).reshape(4, 4))
                extrinsics.append(base_from_world @ field(f"{stored}_extrinsics", 4, 4))
        if not self.contract.has_depth:
            return FrameBatch(np.stack(images, axis=1))
        return FrameBatch(
            np.stack(images, axis=1),
            np.stack(depths, axis=1),
            np.stack(intrinsics, axis=1),
            np.stack(extrinsics, axis=1),
        )


def _find_files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(
            f"the source {path} does not exist",
            expected="an .hdf5 file or a folder of them",
            fix="geomcache demos --suite libero_object --task 0 --episodes 4 --out DIR",
        )
    files = [path] if path.is_file() else sorted([*path.rglob("*.hdf5"), *path.rglob("*.h5")])
    if not files:
        raise InputError(
            f"the source folder {path} is empty",
            expected="LIBERO files named <task>_demo.hdf5",
            found=", ".join(sorted(p.name for p in path.iterdir())[:4]) or "nothing",
            fix="geomcache demos --suite libero_object --task 0 --episodes 4 --out DIR",
        )
    return files


def _demo_names(path: Path) -> list[str]:
    with _open(path) as file:
        names = [name for name in _member(file, "data", path) if re.fullmatch(r"demo_\d+", name)]
        return sorted(names, key=lambda name: int(name.removeprefix("demo_")))


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as problem:
        raise SourceDamaged(
            f"{path} cannot be opened", expected="a whole HDF5 file", found=str(problem), fix=_RE_DOWNLOAD
        ) from problem


def _member(group: h5py.Group, key: str, path: Path, *, camera: str | None = None) -> Any:
    if key in group:
        return group[key]
    there = ", ".join(list(group)[:12]) or "nothing"
    fix = f"name the cameras that the file has, e.g. --set source.cameras='[agentview]' ({camera} is missing)"
    raise SourceDamaged(
        f"{path}: {group.name.rstrip('/')}/{key} is missing",
        expected=f"the field {key!r} of the official LIBERO layout",
        found=there,
        fix=fix if camera else _RE_DOWNLOAD,
    )


def _damaged(path: Path, name: str, found: str) -> SourceDamaged:
    return SourceDamaged(
        f"{path}: data/{name} cannot be used",
        expected="the official LIBERO layout",
        found=found,
        fix=_RE_DOWNLOAD,
    )
