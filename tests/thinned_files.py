"""Recordings of every k-th step, and of pushed demonstrations, written with plain h5py."""

from pathlib import Path

import h5py
import numpy as np

from tests.conftest import write_demo_file

STEPS = 14  # recorded actions of a demonstration; 13 control steps


def thinned(path: Path, every: int, *pushed: list[int] | None, lengths: tuple[int, ...] = (STEPS,)) -> Path:
    """A recording as ``geomcache demos --every`` lays it out; ``pushed``: of each demonstration, by recorded step."""
    write_demo_file(path, lengths=lengths)
    with h5py.File(path, "a") as file:
        for number, (length, steps) in enumerate(zip(lengths, pushed or (None,) * len(lengths), strict=True)):
            demo = file[f"data/demo_{number}"]
            demo["actions"][0, 6] = -1.0  # so that a short one's gripper does not look like 0 to 1
            for key in list(demo["obs"]):
                values = demo["obs"][key][:]
                del demo["obs"][key]
                demo["obs"][key] = values[::every]
            if every > 1:
                demo.attrs["observe_every"] = every
            if steps is not None:
                demo["perturbed"] = np.isin(np.arange(length), steps).astype(np.uint8)
    return path
