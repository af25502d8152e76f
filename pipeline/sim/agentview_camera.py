"""Where LIBERO's two cameras are, for data sets that do not say: measured once a scene in the real simulator.

Non-obvious:
- ``agentview`` stands elsewhere in each kind of scene (the BDDL file's problem: floor, tabletop, living room, study).
- A task's instruction alone decides: only "turn on the stove" belongs to two kinds of scene (tabletop and kitchen),
  and their cameras and table tops are the same.
- LIBERO's ``workspace_offset`` is not the visible surface (-0.035 m for a floor at 0, 0.867 m for a desk at 0.880 m),
  so the height is read from the wrist camera's depth.
- The hand's frame is the published state's: position between the fingertips (grip site), rotation of the hand's body.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import UnknownName
from geomcache.pipeline.camera_geometry import intrinsic_matrix, inverse_pose, unproject
from geomcache.pipeline.orientation_track import Track, hand_poses
from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.libero_env import LiberoEnv

AGENTVIEW, WRIST = "agentview", "robot0_eye_in_hand"

_SIDE = 64  # pixels of the picture that the surface's height is read from
_SAME_SURFACE = 0.01  # metres


@dataclass(frozen=True)
class SceneCameras:
    """LIBERO's cameras in one kind of scene; by the simulator's camera names. OpenCV axes, metres."""

    fovy_degrees: Mapping[str, float]
    agentview_to_world_44: NDArray[np.float64]  # [4, 4]
    wrist_to_hand_44: NDArray[np.float64]  # [4, 4]; the hand's pose in the world is the state's first six numbers
    surface_height: float  # world z of the table or floor

    def intrinsics(self, camera: str, height: int, width: int) -> NDArray[np.float64]:
        """[3, 3] pixels, of the upright image."""
        return intrinsic_matrix(self.fovy_degrees[camera], height, width)

    def track(self, camera: str, images_THWC: NDArray[np.uint8], states_TS: NDArray[np.floating[Any]]) -> Track:
        """One episode of ``camera``, images [T, H, W, 3] as stored, as orientation_track.py compares it."""
        height, width = images_THWC.shape[1:3]
        camera_44 = {AGENTVIEW: self.agentview_to_world_44, WRIST: self.wrist_to_hand_44}[camera]
        return Track(images_THWC, states_TS, self.intrinsics(camera, height, width), camera_44, self.surface_height)


def scene_cameras(instruction: str) -> SceneCameras:
    """The cameras of the scene that ``instruction`` is about; a simulator is started for each new kind of scene.

    Raises:
        UnknownName: no task of LIBERO's suites is called so.
    """
    kinds = _kinds_of_scene()
    wanted = " ".join(instruction.lower().split())
    if wanted not in kinds:
        raise UnknownName(
            f"no LIBERO task has the instruction {instruction!r}, so its cameras are not known",
            expected="the instruction of a task of " + ", ".join(suites.PUBLIC_SUITES),
            found=repr(instruction),
            fix="look at a picture and say how images are stored: --set source.image_orientation=rot180",
        )
    return _measured(kinds[wanted])


@functools.cache
def _kinds_of_scene() -> dict[str, str]:
    """Instruction in lower case -> kind of scene, of the first task that has the instruction."""
    kinds: dict[str, str] = {}
    for task in _tasks():
        kinds.setdefault(task.instruction.lower(), _kind_of_scene(task))
    return kinds


def _tasks() -> list[suites.TaskInfo]:
    return [suites.task_info(suite, i) for suite in suites.PUBLIC_SUITES for i in range(suites.task_count(suite))]


def _kind_of_scene(task: suites.TaskInfo) -> str:
    """The BDDL file's problem, which names the class of LIBERO that places table, robot and cameras."""
    problem = re.search(r"\(problem\s+(\w+)\)", task.bddl_path.read_text(encoding="utf-8"))
    assert problem is not None, f"{task.bddl_path} names no problem"
    return problem[1].lower()


@functools.cache
def _measured(kind: str) -> SceneCameras:
    task = next(task for task in _tasks() if _kind_of_scene(task) == kind)
    with LiberoEnv(task.suite, task.index, cameras=(AGENTVIEW, WRIST), height=_SIDE, width=_SIDE) as env:
        env.reset(0, 0, settle_steps=0)
        observed = env.observe()
        frame = observed.frame
        assert frame.depth_BVHW is not None
        assert frame.intrinsics_BV33 is not None
        agentview_44, wrist_44 = (env.raw_camera(name).extrinsics_world_44 for name in (AGENTVIEW, WRIST))
        model = env.simulator.sim.model
        fovy = {name: float(model.cam_fovy[model.camera_name2id(name)]) for name in (AGENTVIEW, WRIST)}
        heights = unproject(frame.depth_BVHW[0, 1], frame.intrinsics_BV33[0, 1], wrist_44)[..., 2]
        (world_to_hand_44,) = inverse_pose(hand_poses(observed.state_S[None]))
    return SceneCameras(fovy, agentview_44, world_to_hand_44 @ wrist_44, _commonest(heights))


def _commonest(heights_HW: NDArray[np.float64]) -> float:
    """The height that most pixels show, metres."""
    edges = np.arange(heights_HW.min(), heights_HW.max() + _SAME_SURFACE, _SAME_SURFACE / 2.0)
    counts, _ = np.histogram(heights_HW, bins=edges)
    near = np.abs(heights_HW - edges[counts.argmax()]) < _SAME_SURFACE
    return float(np.median(heights_HW[near]))
