"""Where to grasp and where to let go: pure geometry on surface points, no simulator.

Heights are world z in metres; yaw is the turn of the hand about the vertical, 0 = nominal, and the fingers close
along the world's y axis turned by yaw.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomcache.pipeline.sim.scene_geometry import bounds

# The hand
MOST_WIDTH = 0.075  # metres between the open fingers, less a little
FINGER_HALF_LENGTH = 0.055  # metres of the open hand along the closing axis, from its middle
FINGER_HALF_BREADTH = 0.018  # metres across it
TIP_INNER = 0.03  # metres from the middle to where an open fingertip begins
PALM_HALF_LENGTH = 0.12  # metres of the hand's body along the closing axis
PALM_HALF_BREADTH = 0.06  # metres across it
PALM_OVER_TIPS = 0.05  # metres of the hand's body above the fingertips
# How deep to grasp
GRASP_UNDER_TOP = 0.035
TALL, TALL_GRASP_UNDER_TOP = 0.12, 0.045  # a carton's eaves hook a finger that closes on them
GRASP_OVER_BOTTOM = 0.012
RIM_GRASP_UNDER_TOP = 0.027
# How high to travel and where to let go
HOVER_OVER_TOP = 0.07
CARRY_OVER_TOP = 0.10
CARRY_OVER_BOTTOM = 0.16
CARRY_CLEARANCE = 0.05
DROP_INTO = -0.01  # the object's underside relative to the rim of a container
PUT_ON = 0.002  # the object's underside relative to the top of a support

_YAWS = np.deg2rad(np.arange(-90.0, 90.1, 7.5))
_RIM_ANGLES = np.deg2rad(np.arange(0.0, 360.0, 15.0))
_BAND = 0.012  # metres around the grasp height in which the object's width is measured
_OBSTACLE_COST = 0.6  # times log(1 + points of obstacles where the hand would be)
_RIM_SECTOR = np.deg2rad(12.0)  # half width of the part of a rim that a grasp sees
_FEWEST_RIM_POINTS = 12
_REACH_COST = 1.0  # per metre, rim grasps


@dataclass(frozen=True)
class Grasp:
    """One way to hold an object."""

    point_3: NDArray[np.float64]  # between the fingertips, metres, world
    yaw: float  # radians
    over_bottom: float  # metres of the point above the object's underside
    top: float  # z of the object's top
    is_rim: bool


def closing_axis(yaw: float) -> NDArray[np.float64]:
    """[2] horizontal direction in which the fingers close."""
    return np.array([-np.sin(yaw), np.cos(yaw)])


def plan_grasp(object_N3: NDArray[np.float64], obstacles_M3: NDArray[np.float64], base_2: NDArray[np.float64]) -> Grasp:
    """Choose where to hold an object: across its body if it fits between the fingers, else by its rim.

    Args:
        object_N3: surface points of the object, metres, world.
        obstacles_M3: surface points of everything else.
        base_2: the robot base's xy, from which reach is measured.
    """
    box = bounds(object_N3)
    across = _across(object_N3, obstacles_M3)
    return across if across is not None else _by_rim(object_N3, obstacles_M3, base_2, box.center_3[:2])


def release_height(grasp: Grasp, target_top: float, *, into: bool) -> float:
    """z of the fingertips at which to let go over a container (``into``) or a support."""
    return target_top + grasp.over_bottom + (DROP_INTO if into else PUT_ON)


def carry_height(grasp: Grasp, target_top: float) -> float:
    """z of the fingertips while travelling, clear of the object's surroundings and the target."""
    bottom = grasp.point_3[2] - grasp.over_bottom
    return max(
        grasp.top + CARRY_OVER_TOP,
        float(bottom) + CARRY_OVER_BOTTOM,
        target_top + grasp.over_bottom + CARRY_CLEARANCE,
    )


def _across(object_N3: NDArray[np.float64], obstacles_M3: NDArray[np.float64]) -> Grasp | None:
    box = bounds(object_N3)
    top, bottom = float(box.high_3[2]), float(box.low_3[2])
    under_top = TALL_GRASP_UNDER_TOP if top - bottom > TALL else GRASP_UNDER_TOP
    height = max(top - under_top, bottom + GRASP_OVER_BOTTOM)
    band = object_N3[np.abs(object_N3[:, 2] - height) < _BAND]
    band = band if len(band) >= 8 else object_N3
    best: tuple[float, Grasp] | None = None
    for yaw in _YAWS:
        closing = closing_axis(yaw)
        along = np.array([closing[1], -closing[0]])
        c, a = band[:, :2] @ closing, band[:, :2] @ along
        width = float(c.max() - c.min())
        if width > MOST_WIDTH:
            continue
        xy = closing * (c.max() + c.min()) / 2.0 + along * (a.max() + a.min()) / 2.0
        # Width in units of the opening: a millimetre of width must not outweigh a big turn of the wrist.
        cost = width / MOST_WIDTH + abs(yaw) + _obstacle_cost(obstacles_M3, xy, closing, height)
        if best is None or cost < best[0]:
            best = cost, Grasp(np.array([*xy, height]), float(yaw), height - bottom, top, is_rim=False)
    return None if best is None else best[1]


def _by_rim(
    object_N3: NDArray[np.float64],
    obstacles_M3: NDArray[np.float64],
    base_2: NDArray[np.float64],
    center_2: NDArray[np.float64],
) -> Grasp:
    box = bounds(object_N3)
    top, bottom = float(box.high_3[2]), float(box.low_3[2])
    relative = object_N3[:, :2] - center_2
    radii, bearings = np.linalg.norm(relative, axis=1), np.arctan2(relative[:, 1], relative[:, 0])
    best: tuple[float, Grasp] | None = None
    for angle in _RIM_ANGLES:
        outward = np.array([np.cos(angle), np.sin(angle)])
        # A bowl that leans has a lower rim on one side, so each side is measured by itself.
        off = np.abs((bearings - angle + np.pi) % (2.0 * np.pi) - np.pi)
        sector = (off < _RIM_SECTOR) & (radii > 0.5 * radii.max())
        if int(sector.sum()) < _FEWEST_RIM_POINTS:
            continue
        z, r = object_N3[sector, 2], radii[sector]
        rim = float(z.max())
        height = max(rim - RIM_GRASP_UNDER_TOP, bottom + GRASP_OVER_BOTTOM)
        at_rim = float(np.quantile(r[z > rim - 0.006], 0.9))
        low_band = r[np.abs(z - height) < 0.004]
        at_height = float(np.quantile(low_band, 0.9)) if len(low_band) else at_rim
        xy = center_2 + (at_rim + at_height) / 2.0 * outward
        # The fingers close radially; the hand is symmetric, so turns beyond 90 degrees are the same grasp.
        yaw = float(angle % np.pi - np.pi / 2.0)
        cost = (
            abs(yaw)
            + _REACH_COST * float(np.linalg.norm(xy - base_2))
            + _obstacle_cost(obstacles_M3, xy, closing_axis(yaw), height)
            + _OBSTACLE_COST * np.log1p(_under_fingertips(object_N3, xy, closing_axis(yaw), height))
        )
        if best is None or cost < best[0]:
            best = cost, Grasp(np.array([*xy, height]), yaw, height - bottom, top, is_rim=True)
    assert best is not None, "the object has no surface points"
    return best[1]


def _obstacle_cost(
    obstacles_M3: NDArray[np.float64], xy: NDArray[np.float64], closing: NDArray[np.float64], height: float
) -> float:
    """Points of other objects where the fingers or the hand's body would be."""
    relative = obstacles_M3[:, :2] - xy
    c, a = np.abs(relative @ closing), np.abs(relative @ np.array([closing[1], -closing[0]]))
    z = obstacles_M3[:, 2] - height
    fingers = (z > -0.008) & (c < FINGER_HALF_LENGTH) & (a < FINGER_HALF_BREADTH)
    palm = (z > PALM_OVER_TIPS) & (c < PALM_HALF_LENGTH) & (a < PALM_HALF_BREADTH)
    return float(_OBSTACLE_COST * np.log1p(int((fingers | palm).sum())))


def _under_fingertips(
    object_N3: NDArray[np.float64], xy: NDArray[np.float64], closing: NDArray[np.float64], height: float
) -> int:
    """How many points of the object itself an open finger would land on."""
    relative = object_N3[:, :2] - xy
    c, a = np.abs(relative @ closing), np.abs(relative @ np.array([closing[1], -closing[0]]))
    tips = (c > TIP_INNER) & (c < FINGER_HALF_LENGTH) & (a < FINGER_HALF_BREADTH)
    return int((tips & (object_N3[:, 2] > height - 0.003)).sum())
