"""When an HDF5 file's observations were taken relative to its actions, told from the joints.

``obs/joint_states`` and columns 1 to 7 of the flat ``states`` are the same seven joints. ``states[j]`` is before action
j; observations that were taken after it agree with ``states[j + 1]``. One row off, a policy learns to act too late.
"""

from pathlib import Path

import h5py
import numpy as np

from geomcache.pipeline.sources._libero_files import ObservationTime

_ARM = slice(1, 8)  # of the flat state: time first, then positions, the robot's joints before all else
_CLEARLY = 0.5  # the right reading's error over the wrong one's; a physics step is a 25th of a control step


def observation_time(path: Path, demo: str) -> ObservationTime | None:
    """The reading that the joints agree with; None where they are not stored or do not tell."""
    with h5py.File(path, "r") as file:
        group = file[f"data/{demo}"]
        if "states" not in group or "joint_states" not in group.get("obs", {}):
            return None
        arm, seen = np.asarray(group["states"])[:, _ARM], np.asarray(group["obs/joint_states"])
        every = int(group.attrs.get("observe_every", 1))
    arm_before, arm_after = arm[::every], arm[1::every]
    if arm_before.shape != seen.shape or len(arm) < 2:
        return None
    after, before = np.abs(seen[: len(arm_after)] - arm_after).mean(), np.abs(seen - arm_before).mean()
    if min(after, before) > _CLEARLY * max(after, before):
        return None
    return "after_action" if after < before else "before_action"
