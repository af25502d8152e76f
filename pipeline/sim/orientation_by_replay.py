"""Finding how an HDF5 data set stores its images: render the same moments, compare under all eight orientations.

The stored states say what the pictures must show, so nothing is assumed about the data set's history. Fixtures that
could not be placed as recorded, or another size, cost some certainty but not the answer.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.pipeline.official_layout import file_camera_name
from geomcache.pipeline.orientation import ORIENTATIONS, to_upright
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.orientation_finding import OrientationFinding, decide
from geomcache.pipeline.sim.replay import Replay, damaged, demo_names, find_task, read_demo, reading


def find_orientation(
    path: Path, cameras: Sequence[str], *, demo: str | None = None, frames: int = 6
) -> tuple[OrientationFinding, ...]:
    """Render ``frames`` moments of a demonstration and compare them with what the file holds.

    Args:
        path: one file of LIBERO's layout, with ``states``.
        cameras: simulator names of the views to look at.
        demo: ``demo_<i>``; None for the file's first.
        frames: moments, spread over the demonstration.

    Returns:
        A finding for each camera, in their order; ``agreed_orientation`` makes one answer of them.

    Raises:
        SourceDamaged: the file, the demonstration or a camera's images cannot be used.
    """
    names = [demo] if demo is not None else demo_names(path)
    if not names:
        raise damaged(path, "", "no demonstration", expected="at least one data/demo_<i>")
    stored, task = read_demo(path, names[0]), find_task(path)
    every = stored.observe_every
    moments = np.unique(np.linspace(0, (len(stored) - 2) // every, frames).round().astype(int)).tolist()
    images = {camera: [stored_image(path, names[0], camera, j) for j in moments] for camera in cameras}
    errors: dict[str, dict[ImageOrientation, float]] = {}
    by_size = sorted(cameras, key=lambda camera: images[camera][0].shape)
    for (height, width, _), group in itertools.groupby(by_size, key=lambda camera: images[camera][0].shape):
        views = tuple(group)
        with LiberoEnv(task.suite, task.index, cameras=views, height=height, width=width) as env:
            replay = Replay(env, stored)
            sums = {camera: ErrorSums() for camera in views}
            for k, j in enumerate(moments):
                replay.show(j * every)
                for camera in views:
                    sums[camera].add(images[camera][k], env.raw_camera(camera).rgb_HWC)
        errors |= {camera: sums[camera].means() for camera in views}
    return tuple(decide(errors[camera], camera) for camera in cameras)


def stored_image(path: Path, demo: str, camera: str, j: int) -> NDArray[np.uint8]:
    """[H, W, 3] of one view as the file holds it; raises ``SourceDamaged``."""
    field = f"obs/{file_camera_name(camera)}_rgb"
    with reading(path, demo) as file:
        images = file[f"data/{demo}/{field}"]
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not j < len(images):
            found = f"{field} is {images.dtype} {images.shape}"
            raise damaged(path, demo, found, expected=f"uint8 (T > {j}, H, W, 3)")
        return np.asarray(images[j])


class ErrorSums:
    """How far stored images of one view are from rendered ones, for each orientation, in grey levels of 255."""

    def __init__(self) -> None:
        self._sums: dict[ImageOrientation, float] = {}
        self._count = 0

    def add(self, stored_HWC: NDArray[np.uint8], rendered_HWC: NDArray[np.uint8]) -> None:
        """Compare one image with the simulator's raw one; of two sizes the larger is shrunk."""
        true_HWC = to_upright(rendered_HWC, "bottom_up", row_axis=0)
        height, width, _ = true_HWC.shape
        for orientation in ORIENTATIONS:
            turned_HWC = to_upright(stored_HWC, orientation, row_axis=0)
            if turned_HWC.shape[0] * width != turned_HWC.shape[1] * height:
                continue  # a quarter turn of an image that is not square
            one, other = _same_size(turned_HWC, true_HWC)
            error = float(np.abs(one.astype(np.int16) - other).mean())
            self._sums[orientation] = self._sums.get(orientation, 0.0) + error
        self._count += 1

    def means(self) -> dict[ImageOrientation, float]:
        """Mean absolute difference of each orientation that the images' shape allows."""
        return {orientation: total / self._count for orientation, total in self._sums.items()}


def _same_size(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Both images at the smaller one's size; their sides have one ratio."""
    if len(one) > len(other):
        return _shrunk(one, other.shape), other
    if len(one) < len(other):
        return one, _shrunk(other, one.shape)
    return one, other


def _shrunk(image_HWC: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(image_HWC).resize((shape[1], shape[0]), Image.Resampling.BOX))
