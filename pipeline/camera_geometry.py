"""Pure maths of simulated cameras and poses; no simulator needed.

Axes are OpenCV's (x right, y down, z forward); pixel centres lie at (u + 0.5, v + 0.5) of the UPRIGHT image.
"""

import math

import numpy as np
from numpy.typing import NDArray

# MuJoCo's camera looks along -z with y up; OpenCV's along +z with y down.
_MUJOCO_TO_OPENCV = np.diag([1.0, -1.0, -1.0])


def metric_depth(
    zbuffer: NDArray[np.floating], near: float | NDArray[np.float64], far: float | NDArray[np.float64]
) -> NDArray[np.float32]:
    """Turn a z-buffer in [0, 1] into metres along the optical axis; any shape, orientation kept.

    ``near / (1 - z * (1 - near / far))``, robosuite's formula, in float64 because 1 - z cancels.
    """
    near64, far64 = np.asarray(near, dtype=np.float64), np.asarray(far, dtype=np.float64)
    depth = near64 / (1.0 - zbuffer.astype(np.float64) * (1.0 - near64 / far64))
    return depth.astype(np.float32)


def intrinsic_matrix(fovy_degrees: float, height: int, width: int) -> NDArray[np.float64]:
    """[3, 3] pixels, from MuJoCo's vertical field of view; square pixels, centred."""
    focal = 0.5 * height / math.tan(math.radians(fovy_degrees) / 2.0)
    return np.array([[focal, 0.0, width / 2.0], [0.0, focal, height / 2.0], [0.0, 0.0, 1.0]])


def camera_pose(position_3: NDArray[np.float64], rotation_33: NDArray[np.float64]) -> NDArray[np.float64]:
    """[4, 4] camera-to-world in OpenCV axes, from MuJoCo's camera position and rotation."""
    return pose(position_3, np.asarray(rotation_33).reshape(3, 3) @ _MUJOCO_TO_OPENCV)


def pose(position_3: NDArray[np.float64], rotation_33: NDArray[np.float64]) -> NDArray[np.float64]:
    """[4, 4] rigid transform."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.asarray(rotation_33).reshape(3, 3)
    matrix[:3, 3] = position_3
    return matrix


def inverse_pose(pose_44: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of a rigid transform [..., 4, 4]."""
    rotation, position = pose_44[..., :3, :3], pose_44[..., :3, 3]
    inverse = np.zeros_like(pose_44)
    inverse[..., :3, :3] = np.swapaxes(rotation, -1, -2)
    inverse[..., :3, 3] = -np.einsum("...ji,...j->...i", rotation, position)
    inverse[..., 3, 3] = 1.0
    return inverse


def axis_angle(quaternion_xyzw: NDArray[np.float64]) -> NDArray[np.float64]:
    """[3] axis times angle (rad, 0..2 pi) of a unit quaternion; w is clipped to [-1, 1] on a copy.

    The sign of the quaternion is NOT normalised: this is the convention of the published LIBERO data, and
    the nominal grasp (angle about pi) therefore stays continuous where the simulator's quaternion is.
    """
    x, y, z, w = (float(value) for value in quaternion_xyzw)
    w = min(1.0, max(-1.0, w))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.array([x, y, z]) * 2.0 * math.acos(w) / sine


def unproject(
    depth_HW: NDArray[np.floating], intrinsics_33: NDArray[np.float64], extrinsics_44: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[H, W, 3] points in the frame that ``extrinsics_44`` leads to, from upright metric depth."""
    height, width = depth_HW.shape
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x = (u - intrinsics_33[0, 2]) / intrinsics_33[0, 0] * depth_HW
    y = (v - intrinsics_33[1, 2]) / intrinsics_33[1, 1] * depth_HW
    camera_HW3 = np.stack([x, y, depth_HW], axis=-1)
    return camera_HW3 @ extrinsics_44[:3, :3].T + extrinsics_44[:3, 3]
