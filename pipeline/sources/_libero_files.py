"""Files of LIBERO's HDF5 layout: which demonstrations they hold, and fields read with every fault named.

Non-obvious: HDF5 can keep an array's bytes in other files (external storage and links, virtual data sets). A data set
from outside must not be able to name files of this machine, so these are refused.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError, SourceDamaged
from geomcache.pipeline.camera_geometry import inverse_pose
from geomcache.pipeline.official_layout import SUFFIXES

RE_DOWNLOAD = "download or record the file again, leave it out of the folder, or go on without it: --on-error skip"

ObservationTime = Literal["after_action", "before_action"]


@dataclass(frozen=True)
class Demo:
    """Where one demonstration is; or, with a problem, what is wrong with a whole file."""

    path: Path
    name: str  # demo_<i>; "" for a whole file
    observation: ObservationTime = "after_action"  # as the file's attributes tell
    problem: SourceDamaged | None = None


def find_files(path: Path) -> list[Path]:
    """The file, or every file of a folder, sorted; what stands under hidden names is unfinished and left alone.

    Raises:
        InputError: there is none.
    """
    if not path.exists():
        raise InputError(
            f"the source {path} does not exist",
            expected="an .hdf5 file or a folder of them",
            fix="geomcache demos --suite libero_object --task 0 --episodes 4 --out DIR",
        )
    found = sorted(file for suffix in SUFFIXES for file in path.rglob(f"*{suffix}"))
    visible = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [path] if path.is_file() else visible
    if not files:
        raise InputError(
            f"the source folder {path} is empty",
            expected="LIBERO files named <task>_demo.hdf5",
            found=", ".join(sorted(p.name for p in path.iterdir())[:4]) or "nothing",
            fix="geomcache demos --suite libero_object --task 0 --episodes 4 --out DIR",
        )
    return files


def demos_of(path: Path) -> list[Demo]:
    """The file's demonstrations by number; a fault of the whole file stands among them as one that cannot be read."""
    try:
        with open_file(path) as file:
            data = member(file, "data", path)
            if not isinstance(data, h5py.Group):
                raise file_damaged(path, "/data is an array, not a group")
            names = [name for name in data if re.fullmatch(r"demo_\d+", name)]
            wanted = np.asarray(data.attrs.get("num_demos", len(names)))
            told: ObservationTime = "after_action" if "problem_info" in data.attrs else "before_action"
    except SourceDamaged as problem:
        return [Demo(path, "", problem=problem)]
    except (OSError, KeyError, RuntimeError) as problem:  # HDF5's own words for a damaged inside
        return [Demo(path, "", problem=file_damaged(path, str(problem)))]
    demos = [Demo(path, name, told) for name in sorted(names, key=lambda name: int(name.removeprefix("demo_")))]
    if wanted.shape != () or wanted.dtype.kind not in "iu" or wanted != len(demos):
        missing = SourceDamaged(
            f"{path}: demonstrations are missing",
            expected=f"{wanted} demonstrations, as the attribute num_demos says",
            found=f"{len(demos)}",
            fix=RE_DOWNLOAD,
        )
        demos.append(Demo(path, "", problem=missing))
    return demos


@contextmanager
def reading(demo: Demo) -> Iterator[h5py.Group]:
    """The demonstration's group; HDF5's own errors are named by file and episode."""
    if demo.problem is not None:
        raise demo.problem
    with open_file(demo.path) as file:
        try:
            yield member(file, f"data/{demo.name}", demo.path)
        except (OSError, KeyError, RuntimeError) as problem:
            raise damaged(demo, str(problem)) from problem


def open_file(path: Path) -> h5py.File:
    """Open for reading; ``SourceDamaged`` if it is no whole HDF5 file."""
    try:
        return h5py.File(path, "r")
    except OSError as problem:
        raise SourceDamaged(
            f"{path} cannot be opened",
            expected="a whole HDF5 file",
            found=str(problem).replace(str(path), path.name),
            fix=RE_DOWNLOAD,
        ) from problem


def member(group: h5py.Group, key: str, path: Path, *, fix: str = RE_DOWNLOAD) -> Any:
    """A group's member, which must lie in the same file; ``SourceDamaged`` names what is there instead."""
    is_group = isinstance(group, h5py.Group)
    if is_group and key in group:
        found = group[key]
        elsewhere = isinstance(found, h5py.Dataset) and (found.external or found.is_virtual)
        if found.file.filename != group.file.filename or elsewhere:
            raise file_damaged(path, f"{found.name} keeps its bytes in other files, which is refused")
        return found
    there = (", ".join(list(group)[:12]) or "nothing") if is_group else "an array, not a group"
    raise SourceDamaged(
        f"{path}: {group.name.strip('/')}/{key} is missing",
        expected=f"the field {key!r} of the official LIBERO layout",
        found=f"no {key}; there is {there}",
        fix=fix,
    )


def field(
    group: h5py.Group, key: str, shape: tuple[int, ...], demo: Demo, steps: int | None = None, every: int = 1
) -> Any:
    """``obs/<key>`` [T, *shape] of T ``steps``, ``every`` of which one was observed; checked, not read yet."""
    values = member(member(group, "obs", demo.path), key, demo.path)
    if not isinstance(values, h5py.Dataset):
        raise damaged(demo, f"obs/{key} is a group, expected an array")
    if steps is not None and len(values.shape) and values.shape[0] != -(-steps // every):
        thinned = f", one in {every} of them observed" if every > 1 else ""
        raise damaged(demo, f"obs/{key} has {values.shape[0]} steps but there are {steps} actions{thinned}")
    if values.shape[1:] != shape or values.dtype.kind not in "fiu":
        raise damaged(demo, f"obs/{key} is {values.dtype} {values.shape[1:]} a step, expected {shape}")
    return values


def rows_of(group: h5py.Group, key: str, shape: tuple[int, ...], demo: Demo, rows: slice) -> NDArray[Any]:
    """Some rows of ``obs/<key>``, read."""
    values = field(group, key, shape, demo)
    try:
        return np.asarray(values[rows])
    except (OSError, RuntimeError) as problem:
        raise damaged(demo, f"obs/{key}, rows {rows.start} to {rows.stop}: {problem}") from problem


def require_finite(what: str, values: NDArray[Any], demo: Demo) -> None:
    """Raise ``SourceDamaged`` for NaN or infinite numbers."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise damaged(demo, f"{what} hold NaN or infinite numbers")


def require_matrices(what: str, matrices_TNN: NDArray[Any], demo: Demo) -> None:
    """Raise ``SourceDamaged`` unless intrinsics [T, 3, 3] have focal lengths and extrinsics [T, 4, 4] are rigid."""
    if matrices_TNN.shape[-1] == 3:
        good = (matrices_TNN[:, 0, 0] > 0.0) & (matrices_TNN[:, 1, 1] > 0.0)
    else:
        turns = matrices_TNN[:, :3, :3]
        good = np.isclose(turns @ turns.swapaxes(1, 2), np.eye(3), atol=1e-5).all(axis=(1, 2))
    if not good.all():
        raise damaged(demo, f"{what}[{int(np.argmin(good))}] is no camera matrix")


def observe_every(group: h5py.Group, demo: Demo) -> int:
    """k of a recording in which only every k-th control step was observed (``geomcache demos``); 1 of all others."""
    every = group.attrs.get("observe_every", 1)
    if not isinstance(every, int | np.integer) or every < 1:
        raise damaged(demo, f"the attribute observe_every is {every!r}, expected a whole number from 1 on")
    return int(every)


def perturbed_steps(group: h5py.Group, demo: Demo, steps: int) -> NDArray[np.bool_] | None:
    """[T] the executed action carried a push; None where the file says nothing of pushes."""
    if "perturbed" not in group:
        return None
    values = np.asarray(member(group, "perturbed", demo.path))
    if values.shape != (steps,) or values.dtype.kind not in "bu" or values.max() > 1:
        raise damaged(demo, f"perturbed is {values.dtype} {values.shape}, expected 0 or 1 for each of {steps} actions")
    return values.astype(np.bool_)


def depth_attributes(group: h5py.Group, demo: Demo) -> tuple[float, float, NDArray[np.float64]]:
    """(near, far) in metres and the transform [4, 4] from the world to the robot base."""
    try:
        near, far = float(group.attrs["depth_near"]), float(group.attrs["depth_far"])
        base = np.asarray(group.attrs["robot_base_pose"], dtype=np.float64).reshape(4, 4)
    except (KeyError, ValueError, TypeError) as problem:
        raise damaged(demo, f"attribute depth_near, depth_far or robot_base_pose: {problem}") from problem
    if not 0.0 < near < far:
        raise damaged(demo, f"depth_near {near:g}, depth_far {far:g}, expected 0 < near < far")
    if not np.isfinite(base).all() or not np.allclose(base[:3, :3] @ base[:3, :3].T, np.eye(3), atol=1e-6):
        raise damaged(demo, "robot_base_pose is no rigid transform")
    return near, far, inverse_pose(base)


def damaged(demo: Demo, found: str) -> SourceDamaged:
    """The error of one demonstration."""
    return SourceDamaged(
        f"{demo.path}: data/{demo.name} cannot be used",
        expected="the official LIBERO layout",
        found=found,
        fix=RE_DOWNLOAD,
    )


def file_damaged(path: Path, found: str) -> SourceDamaged:
    """The error of a whole file."""
    return SourceDamaged(f"{path} cannot be used", expected="the official LIBERO layout", found=found, fix=RE_DOWNLOAD)
