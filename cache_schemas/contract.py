"""The conventions a pack, a cache, a checkpoint and a simulator must share.

Each field is one of the silent faults that give 0 % success elsewhere. A contract is written once, where the
data enter, and is compared (never assumed) at every later border.
"""

from typing import Literal

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import ContractMismatch

# How a stored image S relates to the true upright picture U; all eight flips and turns have a name.
# "upright":      S = U: row 0 is up, columns run left to right as seen (text reads correctly)
# "bottom_up":    U flipped top-bottom: the simulator's raw buffer (robosuite IMAGE_CONVENTION "opengl")
# "rot180":       the RAW BUFFER turned by 180 degrees, which is U mirrored left-right; what the community stores
# "upside_down":  U turned by 180 degrees
# "rot90_left", "rot90_right": U turned by a quarter
# "transposed", "antitransposed": U mirrored at a diagonal
ImageOrientation = Literal[
    "upright", "bottom_up", "rot180", "upside_down", "rot90_left", "rot90_right", "transposed", "antitransposed"
]


class CameraContract(Schema):
    """One view; the order of views in ``Contract.cameras`` is the V axis everywhere."""

    name: str
    height: int  # pixels
    width: int  # pixels


class Contract(Schema):
    """The conventions of a set of frames."""

    image_orientation: ImageOrientation
    cameras: tuple[CameraContract, ...]
    has_depth: bool  # metric depth and camera matrices are present for every view
    # 8 numbers: end-effector position (m, world), axis-angle of the xyzw quaternion (rad), two finger positions (m)
    state_layout: Literal["eef_pos3+eef_axisangle3+gripper_qpos2"] = "eef_pos3+eef_axisangle3+gripper_qpos2"
    # 7 numbers in [-1, 1]: OSC_POSE deltas (1 = 0.05 m, 0.5 rad) and the gripper
    action_layout: Literal["osc_delta_pos3+osc_delta_axisangle3+gripper1"] = (
        "osc_delta_pos3+osc_delta_axisangle3+gripper1"
    )
    gripper_sign: Literal["minus_open_plus_close", "zero_close_one_open"] = "minus_open_plus_close"
    control_rate_hz: int = 20

    @property
    def camera_names(self) -> tuple[str, ...]:
        """The views in order."""
        return tuple(camera.name for camera in self.cameras)

    def require_same(self, found: "Contract", *, mine: str, theirs: str, fix: str) -> None:
        """Raise ``ContractMismatch`` naming every differing convention."""
        differences = self.describe_difference(found)
        if differences:
            raise ContractMismatch(
                f"{theirs} does not follow the conventions of {mine}",
                expected=f"the contract of {mine}",
                found="; ".join(differences),
                fix=fix,
            )


STATE_DIM = 8
ACTION_DIM = 7
