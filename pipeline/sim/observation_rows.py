"""What a demonstration file holds of one observation: field names and units, taken from a running environment.

obs/ee_states, ee_pos, ee_ori, gripper_states, joint_states    float64, world metres, radians
robot_states                                                    finger positions, hand position, xyzw quaternion
obs/<cam>_rgb, <cam>_depth                                      raw, rows BOTTOM-UP; depth is a z-buffer [H, W, 1]
obs/<cam>_intrinsics [3, 3], <cam>_extrinsics [4, 4]            for the upright image; camera-to-WORLD
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.pipeline.official_layout import file_camera_name
from geomcache.pipeline.sim.libero_env import LiberoEnv

_IMAGE_FILTER: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


class ObservationRows:
    """The observations of one demonstration, in order: after its actions 0, ``every``, 2 ``every``, ..."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self._executed = 0  # actions
        self._columns: dict[str, list[NDArray[Any]]] = {}

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), []))

    def take(self, env: LiberoEnv) -> bool:
        """Append what ``env`` shows after an action; False, and nothing done, when this action is not observed."""
        self._executed += 1
        if (self._executed - 1) % self.every:
            return False
        robot = env.proprioception()
        turn = robot.ee_axis_angle_3
        row: dict[str, NDArray[Any]] = {
            "obs/ee_states": np.concatenate([robot.ee_pos_3, turn]),
            "obs/ee_pos": robot.ee_pos_3,
            "obs/ee_ori": turn,
            "obs/gripper_states": robot.gripper_qpos_2,
            "obs/joint_states": robot.joint_pos_7,
            "robot_states": np.concatenate([robot.gripper_qpos_2, robot.ee_pos_3, robot.ee_quat_xyzw]),
        }
        for camera in env.contract.camera_names:
            view, name = env.raw_camera(camera), file_camera_name(camera)
            row[f"obs/{name}_rgb"] = view.rgb_HWC
            row[f"obs/{name}_depth"] = view.zbuffer_HW[..., None]
            row[f"obs/{name}_intrinsics"] = view.intrinsics_33
            row[f"obs/{name}_extrinsics"] = view.extrinsics_world_44
        for key, value in row.items():
            self._columns.setdefault(key, []).append(value)
        return True

    def last(self, key: str) -> NDArray[Any]:
        """The field ``key`` of the observation taken last."""
        return self._columns[key][-1]

    def write(self, group: Any) -> None:
        """Write every field into a demonstration's HDF5 group."""
        for name, values in self._columns.items():
            stacked = np.stack(values)
            options = {**_IMAGE_FILTER, "chunks": (1, *stacked.shape[1:])} if stacked.ndim == 4 else {}
            group.create_dataset(name, data=stacked, **options)


def scene_attributes(env: LiberoEnv) -> dict[str, Any]:
    """The demonstration's attributes without which its depth and cameras mean nothing."""
    near, far = env.depth_range()
    return {"depth_near": near, "depth_far": far, "robot_base_pose": env.robot_base_pose().reshape(16)}
