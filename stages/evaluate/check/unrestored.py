"""What can be told of a packed episode whose scene cannot be restored: orientation, gripper, and how actions move it.

Weaker than a replay: only what the robot's track and the cameras' places say.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.cache_schemas.errors import GeomcacheError
from geomcache.pipeline.orientation_track import (
    LARGEST_ERROR,
    Track,
    gripper_sign_agrees,
    static_camera_errors,
    wrist_camera_errors,
)
from geomcache.pipeline.sim.agentview_camera import AGENTVIEW, WRIST, scene_cameras
from geomcache.pipeline.sim.orientation_finding import decide
from geomcache.stages.evaluate.check.actions import is_absolute
from geomcache.stages.evaluate.check.finding import (
    ABSOLUTE,
    GRIPPER_SIGN,
    QUATERNION,
    STATE_OMITTED,
    Finding,
    failed,
    impossible,
    passed,
)
from geomcache.stages.evaluate.check.frames import fault_of
from geomcache.stages.evaluate.check.opened import StoredEpisode

_EVERY = 4  # control steps between the pictures that a track is told by
_ERRORS: dict[str, Callable[[Sequence[Track]], Mapping[ImageOrientation, float]]] = {
    AGENTVIEW: static_camera_errors,
    WRIST: wrist_camera_errors,
}


def check_unrestored(episode: StoredEpisode) -> list[Finding]:
    """Findings from the pack alone."""
    return [*_orientation(episode), _gripper(episode), _actions(episode), _states(episode)]


def _orientation(episode: StoredEpisode) -> list[Finding]:
    steps = list(range(0, len(episode), max(1, _EVERY // episode.pack.info.steps_per_row)))
    images, names = episode.frames(steps).images_BVHWC, episode.pack.info.contract.camera_names
    findings = []
    for view, name in enumerate(names):
        compared = f"{name}: the hand's track with what moves in the pictures"
        if name not in _ERRORS:
            continue
        try:
            track = scene_cameras(episode.record.instruction).track(name, images[:, view], episode.states_TS[steps])
        except GeomcacheError as problem:
            findings.append(impossible("frames", compared, problem.what, problem.fix))
            continue
        told = decide(_ERRORS[name]([track]), name, largest_error=LARGEST_ERROR)
        if told.decided and told.best == "upright":
            findings.append(passed("frames", compared, str(told), "upright"))
        elif told.decided:
            findings.append(failed("frames", compared, "upright", str(told), fault_of(told.best)))
        else:
            fix = "geomcache pack check SOURCE, which looks at more episodes"
            findings.append(impossible("frames", compared, f"undecided: {told}", fix))
    return findings


def _gripper(episode: StoredEpisode) -> Finding:
    compared = "gripper commands with the fingers' motion"
    agreement = gripper_sign_agrees(episode.actions_TA, episode.states_TS)
    found = f"{agreement.switches} switches, agreement {agreement.score:+.2f} (of -1 to 1)"
    if not agreement.switches:
        return impossible("actions", compared, "the gripper is never switched", "look at more episodes: --episodes N")
    if agreement.score > 0.0:
        return passed("actions", compared, found, "fingers close after the higher command")
    return failed("actions", compared, "fingers close after the higher command", found, GRIPPER_SIGN)


def _actions(episode: StoredEpisode) -> Finding:
    compared = "motion commands with the hand's places"
    if is_absolute(episode.actions_TA, episode.states_TS):
        return failed("actions", compared, "deltas", "numbers that go where the hand goes", ABSOLUTE)
    return passed("actions", compared, "numbers that are no places of the hand", "deltas")


def _states(episode: StoredEpisode) -> Finding:
    compared = "states with what a moving robot's are"
    states = episode.states_TS
    if not np.ptp(states, axis=0).any():
        return failed("states", compared, "numbers that change", "the same in every row", STATE_OMITTED)
    length = np.linalg.norm(states[:, 3:7], axis=1)
    if np.abs(length - 1.0).max() < 1e-3:
        return failed("states", compared, "axis-angle", "four numbers of length 1", QUATERNION)
    opposite = np.abs(states[:, 6] + states[:, 7]).max()
    found = f"fingers mirror each other within {opposite:.2g} m"
    return passed("states", compared, found, "axis-angle, two fingers")
