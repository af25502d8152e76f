"""Frames: stored pictures against those rendered at the same moments, and the faults that change pictures."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.pipeline.orientation import ORIENTATIONS, to_upright
from geomcache.stages.evaluate.check.finding import (
    BGR,
    EXPOSURE,
    FLIPPED,
    MIRRORED,
    RESIZE,
    SHIFTED,
    SWAPPED_CAMERAS,
    TURNED,
    Finding,
    explanation,
    failed,
    passed,
)
from geomcache.stages.evaluate.check.scene import Replayed, Scene

Images = NDArray[np.uint8]  # [N, V, H, W, 3]
# Grey levels, mean over pictures: of row 0, where the moment is the same, and of all rows of a replay.
LARGEST_AT_START, LARGEST_DIFFERENCE = 0.5, 1.5
_RENDER_SIDES = (64, 84, 96, 112, 128, 224, 256, 384, 512)  # pixels, at which data sets are rendered
_SATURATED = 5  # grey levels from either end, where a change of exposure is cut

_TURNS = {"upside_down": TURNED, "rot180": MIRRORED, "bottom_up": FLIPPED}  # other orientations go by their own names
_INVERSE: dict[str, ImageOrientation] = {"rot90_left": "rot90_right", "rot90_right": "rot90_left"}  # the rest: itself


def check_frames(replayed: Replayed, scene: Scene | None) -> tuple[Finding, Images, Images]:
    """Stored pictures of the replay's observed steps against the rendered ones.

    Args:
        replayed: a replay that follows the demonstration.
        scene: to render row 0 at other sizes when nothing else explains a difference.

    Returns:
        The finding, the stored and the live images [N, V, H, W, 3].
    """
    steps = sorted(replayed.observed) if replayed.follows else [0]
    stored = replayed.episode.frames(steps).images_BVHWC
    live = np.concatenate([replayed.observed[step].frame.images_BVHWC for step in steps])
    difference = _difference(stored, live)
    at_start = _difference(stored[:1], live[:1])
    compared = f"stored pictures of {len(steps)} rows, {stored.shape[1]} cameras, with rendered ones"
    found = f"mean difference {difference:.3g} grey levels, row 0 {at_start:.3g}"
    expected = f"at most {LARGEST_DIFFERENCE:g} grey levels, row 0 {LARGEST_AT_START:g}"
    if difference <= LARGEST_DIFFERENCE and at_start <= LARGEST_AT_START:
        return passed("frames", compared, found, expected), stored, live
    errors = picture_errors(stored, live) | {SHIFTED: _shifted(steps, stored, live)}
    fault, how = explanation(errors, difference), ""
    if fault is not None:
        how = f"; {errors[fault]:.3g} when that is undone"
    else:
        fault, how = _of_some_views(stored, live, replayed.episode.pack.info.contract.camera_names)
    if fault is None and scene is not None:
        view = int(np.abs(stored[0].astype(np.float32) - live[0]).mean(axis=(1, 2, 3)).argmax())
        one = stored[:1, view : view + 1], live[:1, view : view + 1]
        resized, told = _resized(scene, stored[0], view)
        fault = explanation({**picture_errors(*one), RESIZE: resized}, _difference(*one))
        how = told if fault == RESIZE else ""
    return failed("frames", compared, expected, found + how, fault), stored, live


def picture_errors(stored: Images, live: Images) -> dict[str, float]:
    """Fault -> mean difference that is left when the live pictures are changed in its way."""
    errors = {fault: _difference(stored, change(live)) for fault, change in picture_faults(live.shape).items()}
    errors[EXPOSURE] = _exposure(stored, live)
    return errors


def picture_faults(shape: Sequence[int]) -> Mapping[str, Callable[[Images], Images]]:
    """Changes of pictures [N, V, H, W, 3] that keep their shape, by the fault's name."""
    faults: dict[str, Callable[[Images], Images]] = {BGR: lambda images: np.ascontiguousarray(images[..., ::-1])}
    if shape[1] > 1:
        faults[SWAPPED_CAMERAS] = lambda images: np.ascontiguousarray(images[:, ::-1])
    for orientation in ORIENTATIONS:
        if orientation != "upright" and (shape[2] == shape[3] or orientation in _TURNS):
            undo = _INVERSE.get(orientation, orientation)
            faults[fault_of(orientation)] = partial(to_upright, orientation=undo, row_axis=2)
    return faults


def fault_of(orientation: ImageOrientation) -> str:
    """The fault of pictures that are stored so instead of upright."""
    return _TURNS.get(orientation, f"stored {orientation}")


def _of_some_views(stored: Images, live: Images, names: Sequence[str]) -> tuple[str | None, str]:
    """The one fault of those cameras that differ, where others are right."""
    named: dict[str, str | None] = {}
    for view, name in enumerate(names):
        one = stored[:, view : view + 1], live[:, view : view + 1]
        if (plain := _difference(*one)) > LARGEST_DIFFERENCE:
            named[name] = explanation(picture_errors(*one), plain)
    (fault, *others) = set(named.values()) or {None}
    return (fault, f"; {', '.join(named)} only") if fault is not None and not others else (None, "")


def _difference(stored: Images, live: Images) -> float:
    return float(np.abs(stored.astype(np.float32) - live).mean())


def _shifted(steps: Sequence[int], stored: Images, live: Images) -> float:
    """Over neighbouring rows: each picture with that of the row before, and after."""
    pairs = [place for place in range(len(steps) - 1) if steps[place + 1] == steps[place] + 1]
    if not pairs:
        return np.inf
    here, there = np.array(pairs), np.array(pairs) + 1
    return min(_difference(stored[here], live[there]), _difference(stored[there], live[here]))


def _exposure(stored: Images, live: Images) -> float:
    """With the gain and offset, or the gamma, that fits best."""
    x, y = live.astype(np.float64), stored.astype(np.float64)
    inside = (x > _SATURATED) & (x < 255 - _SATURATED) & (y > _SATURATED) & (y < 255 - _SATURATED)
    if inside.sum() < 2 or np.ptp(x[inside]) == 0.0:
        return np.inf
    gain, offset = np.polyfit(x[inside], y[inside], 1)
    a, b = np.log(x[inside] / 255.0), np.log(y[inside] / 255.0)
    gamma = float((a * b).sum() / (a * a).sum())
    guesses = (gain * x + offset, 255.0 * (x / 255.0) ** gamma)
    return min(float(np.abs(np.clip(np.round(guess), 0, 255) - y).mean()) for guess in guesses)


def _resized(scene: Scene, stored_VHWC: Images, view: int) -> tuple[float, str]:
    """(mean difference, how) of row 0 rendered at the size, and brought to its own by the filter, that fit best."""
    scene.start()
    height, width = stored_VHWC.shape[1:3]
    best, how = np.inf, ""
    camera = scene.env.contract.camera_names[view]  # one is enough, and rendering is what takes time
    for side in sorted({*_RENDER_SIDES, 2 * height, 4 * height} - {height}):
        whole = scene.render(camera, side, side * width // height)
        for name, resize in _filters((height, width)).items():
            error = _difference(stored_VHWC[view], resize(whole))
            if error < best:
                best, how = error, f"; {error:.3g} in row 0 when rendered at {side} pixels and resized by {name}"
    return best, how


def _filters(size: tuple[int, int]) -> dict[str, Callable[[Images], Images]]:
    """Ways to bring a picture [H, W, 3] to ``size``; PIL's widen their filter when they shrink, OpenCV's do not."""
    height, width = size

    def pil(kind: Image.Resampling) -> Callable[[Images], Images]:
        return lambda image: np.asarray(Image.fromarray(image).resize((width, height), kind))

    def plain(mode: str) -> Callable[[Images], Images]:
        def resize(image: Images) -> Images:
            planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)[None], dtype=np.float32))
            small = torch.nn.functional.interpolate(planes, size=size, mode=mode, align_corners=False)
            return np.moveaxis(small[0].round().clamp(0, 255).to(torch.uint8).numpy(), 0, -1)

        return resize

    kinds = (("nearest", "NEAREST"), ("area", "BOX"), ("bilinear", "BILINEAR"), ("bicubic", "BICUBIC"))
    filters = {f"{name} (PIL)": pil(Image.Resampling[kind]) for name, kind in (*kinds, ("lanczos", "LANCZOS"))}
    return filters | {f"{mode} without antialiasing (OpenCV)": plain(mode) for mode in ("bilinear", "bicubic")}
