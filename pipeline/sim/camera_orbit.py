"""Turning the agent-view camera about the workspace: a view that no training picture shows.

The camera goes round the vertical line through the middle of LIBERO's workspace (``workspace_offset``: the centre of
the table or floor) and keeps its height, its distance and its tilt, as if the table were turned under it. 10 degrees
move it by 11 cm (tabletop) to 16 cm (floor).

Non-obvious:
- It looks at a point about 0.2 m in front of that line, on the robot's side, so the picture's middle moves a little.
- MuJoCo's quaternions are w x y z. A hard reset compiles a new model, so the turn lasts one episode.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

CAMERA = "agentview"


def turned_pose(
    position_3: NDArray[np.float64], quaternion_wxyz: NDArray[np.float64], degrees: float, middle_2: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(position [3], quaternion [4]) of a camera turned by ``degrees`` about the vertical line at ``middle_2``.

    Metres in the world; counter-clockwise as seen from above is positive.
    """
    angle = np.deg2rad(degrees)
    c, s = np.cos(angle), np.sin(angle)
    xy = middle_2 + np.array([[c, -s], [s, c]]) @ (position_3[:2] - middle_2)
    # Hamilton product of the rotation about z (its quaternion is (h, 0, 0, k)) with the camera's own
    h, k = np.cos(angle / 2.0), np.sin(angle / 2.0)
    w, x, y, z = quaternion_wxyz
    return np.array([*xy, position_3[2]]), np.array([h * w - k * z, h * x - k * y, h * y + k * x, h * z + k * w])


def turn_agentview(inner: Any, degrees: float) -> None:
    """Turn the camera in the model of robosuite's environment; the next ``forward`` of the simulation shows it."""
    model = inner.sim.model
    camera = model.camera_name2id(CAMERA)
    assert model.cam_bodyid[camera] == 0, "the agent-view camera is not fixed to the world"
    middle = np.asarray(inner.workspace_offset, dtype=np.float64)[:2]
    model.cam_pos[camera], model.cam_quat[camera] = turned_pose(
        np.array(model.cam_pos[camera]), np.array(model.cam_quat[camera]), degrees, middle
    )
