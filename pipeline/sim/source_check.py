"""Is a data set what it is declared to be? Its image orientation and gripper sign, found out with the simulator.

Two ways: where simulator states are stored (HDF5), moments of episodes are rendered again and compared with the stored
pictures; where they are not (LeRobot), the hand's track, projected into the cameras, must explain what moves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.interfaces import FrameSource
from geomcache.pipeline.open_source import SourceRequest, open_source, resolve
from geomcache.pipeline.orientation_track import (
    LARGEST_ERROR,
    GripperAgreement,
    Track,
    gripper_sign_agrees,
    static_camera_errors,
    wrist_camera_errors,
)
from geomcache.pipeline.sim.agentview_camera import AGENTVIEW, WRIST, scene_cameras
from geomcache.pipeline.sim.observation_time import observation_time
from geomcache.pipeline.sim.orientation_by_replay import find_orientation
from geomcache.pipeline.sim.orientation_finding import OrientationFinding, agreed_orientation, decide
from geomcache.pipeline.sources import libero_hdf5

_EVERY = 4  # rows between the frames that a track is told by
_ROWS_AT_ONCE = 64
_ERRORS_BY_TRACK: dict[str, Callable[[Sequence[Track]], Mapping[ImageOrientation, float]]] = {
    AGENTVIEW: static_camera_errors,
    WRIST: wrist_camera_errors,
}


@dataclass(frozen=True)
class SourceCheck:
    """What was found; ``agrees`` says whether the declaration holds."""

    location: str
    way: str
    declared: ImageOrientation
    found: ImageOrientation
    findings: tuple[tuple[str, OrientationFinding], ...]  # (episodes, finding)
    gripper: GripperAgreement
    observations: tuple[tuple[str, str, str | None], ...] = ()  # HDF5: (episode, obs[j] to actions[j] declared, found)

    @property
    def observation_agrees(self) -> bool:
        """Whether rows pair each observation with the action that answers it, as far as the joints tell."""
        return all(found in (None, declared) for _, declared, found in self.observations)

    @property
    def agrees(self) -> bool:
        """Whether nothing contradicts the declaration."""
        return self.orientation_agrees and self.gripper_agrees and self.observation_agrees

    @property
    def orientation_agrees(self) -> bool:
        """Whether images are stored as declared."""
        return self.declared == self.found

    @property
    def gripper_agrees(self) -> bool:
        """Whether the fingers close when they are told to; true too where they were never told anything new."""
        return self.gripper.switches == 0 or self.gripper.score > 0.0


def check_source(request: SourceRequest, episodes: int, progress: Callable[[int, int], None]) -> SourceCheck:
    """Look at ``episodes`` episodes spread over the data set.

    Raises:
        InputError: nothing can be told, or no camera is one of LIBERO's two.
        ContractMismatch: the cameras differ among themselves.
        SourceDamaged: see the source.
    """
    resolved = resolve(request)
    declared = open_source(resolved).details["image_orientation"]
    as_stored = open_source(
        SourceRequest(
            path=resolved.path, kind=resolved.kind, settings={**resolved.settings, "image_orientation": "upright"}
        )
    )
    chosen = np.unique(np.linspace(0, as_stored.episode_count - 1, episodes).round().astype(int)).tolist()
    if isinstance(as_stored, libero_hdf5.Source) and as_stored.has_simulator_states:
        way, findings = "rendered again from simulator states", _by_replay(as_stored, chosen, progress)
    else:
        way, findings = "the hand's track against what moves", _by_track(as_stored, chosen, progress)
    return SourceCheck(
        location=as_stored.location,
        way=way,
        declared=declared,  # type: ignore[arg-type]
        found=agreed_orientation([finding for _, finding in findings], where=as_stored.location),
        findings=tuple(findings),
        gripper=_gripper(as_stored, chosen),
        observations=_observations(as_stored, chosen),
    )


def _by_replay(
    source: libero_hdf5.Source, episodes: Sequence[int], progress: Callable[[int, int], None]
) -> list[tuple[str, OrientationFinding]]:
    findings = []
    for done, episode in enumerate(episodes):
        progress(done, len(episodes))
        path, name = source.demonstration(episode)
        where = source.head(episode).where
        findings += [(where, f) for f in find_orientation(path, source.contract.camera_names, demo=name)]
    return findings


def _by_track(
    source: FrameSource, episodes: Sequence[int], progress: Callable[[int, int], None]
) -> list[tuple[str, OrientationFinding]]:
    tracks: dict[str, list[Track]] = {name: [] for name in source.contract.camera_names if name in _ERRORS_BY_TRACK}
    if not tracks:
        raise InputError(
            f"{source.location}: the orientation of its cameras cannot be found out",
            expected=f"{AGENTVIEW} or {WRIST}",
            found=", ".join(source.contract.camera_names),
            fix="look at a picture (geomcache pack show) and declare it: --set source.image_orientation=...",
        )
    for done, episode in enumerate(episodes):
        progress(done, len(episodes))
        images_TVHWC, states_TS = _some_rows(source, episode)
        scene = scene_cameras(source.head(episode).instruction)
        for name, known in tracks.items():
            view = source.contract.camera_names.index(name)
            known.append(scene.track(name, images_TVHWC[:, view], states_TS))
    return [
        (f"{len(episodes)} episodes", decide(_ERRORS_BY_TRACK[name](known), name, largest_error=LARGEST_ERROR))
        for name, known in tracks.items()
    ]


def _some_rows(source: FrameSource, episode: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(images [T, V, H, W, 3], states [T, 8]) of every few rows."""
    rows, images, states = len(source.head(episode)), [], []
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = source.read(episode, start, min(start + _ROWS_AT_ONCE, rows))
        images.append(part.frames.images_BVHWC[::_EVERY].copy())
        states.append(part.states_TS[::_EVERY])
    return np.concatenate(images), np.concatenate(states)


def _gripper(source: FrameSource, episodes: Sequence[int]) -> GripperAgreement:
    """Over the episodes' switches of the gripper, each counting once."""
    found = []
    for episode in episodes:
        head = source.head(episode)
        actions_TA = head.actions_TA[:: head.steps_per_row]  # of each row
        starts = range(0, len(head), _ROWS_AT_ONCE)
        parts = [source.read(episode, start, min(start + _ROWS_AT_ONCE, len(head))).states_TS for start in starts]
        found.append(gripper_sign_agrees(actions_TA, np.concatenate(parts)))
    switches = sum(one.switches for one in found)
    score = sum(one.score * one.switches for one in found) / switches if switches else 0.0
    return GripperAgreement(score, switches)


def _observations(source: FrameSource, episodes: Sequence[int]) -> tuple[tuple[str, str, str | None], ...]:
    """(where, declared, found) of HDF5 demonstrations."""
    if not isinstance(source, libero_hdf5.Source):
        return ()
    return tuple(
        (source.where(episode), source.observation(episode), observation_time(*source.demonstration(episode)))
        for episode in episodes
    )
