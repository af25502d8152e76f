"""Where to grasp and where to let go: pure geometry on surface points, no simulator.

Heights are world z in metres; yaw is the turn of the hand about the vertical, 0 = nominal, and the fingers close
along the world's y axis turned by yaw.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomcache.pipeline.sim.scene_geometry import bounds

# The open hand, measured on its collision shapes from the point between the fingertips
MOST_WIDTH = 0.075  # metres between the open fingers, less a little
FINGER_INNER, FINGER_OUTER = 0.038, 0.066  # metres along the closing axis
FINGER_HALF_BREADTH = 0.012  # metres across it
TIPS_BELOW = 0.010  # metres of the fingers under the point
PALM_HALF_LENGTH, PALM_HALF_BREADTH = 0.104, 0.032  # metres of the hand's body along the closing axis and across it
PALM_ABOVE = 0.031  # metres of the hand's body over the point
MARGIN = 0.006  # metres wanted between the hand and everything else
# How deep to grasp
GRASP_UNDER_TOP = 0.035
TALL, TALL_GRASP_UNDER_TOP = 0.12, 0.041  # deeper, the palm meets the ridge of a carton
ROOF_OVER_GRASP = 0.020  # metres over the point from which on a tall object is its roof
GRASP_OVER_BOTTOM = 0.012
RIM_GRASP_UNDER_TOP = 0.027
RIM_GRASP_LEAST = 0.015  # where something around keeps the palm higher: a drawer's walls
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
# A carton held by its gables hangs on one finger by its roof when the hand opens; so a tall object is held, at its
# narrowest (times _SQUARE), where its roof is narrower (by _TAPER metres).
_HOOK_COST, _SQUARE, _TAPER = 2.0, 1.1, 0.012
_OBSTACLE_COST = 0.6  # times log(1 + points of obstacles where the hand would be)
_RIM_SECTOR = np.deg2rad(12.0)  # half width of the part of a rim that a grasp sees
_FEWEST_RIM_POINTS = 12
_REACH_COST = 1.0  # per metre, rim grasps
_INWARD = (0.0, 0.005, 0.010, 0.015)  # metres from a rim towards the middle, where the hand may come down
_INWARD_COST = 10.0  # per metre
_SHALLOW_COST = 20.0  # per metre


@dataclass(frozen=True)
class Grasp:
    """One way to hold an object."""

    point_3: NDArray[np.float64]  # between the fingertips when they close, metres, world
    entry_3: NDArray[np.float64]  # where the open hand comes down: point_3, or further from a wall beside it
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
        obstacles_M3: points of everything else that a hand would run into.
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
    is_tall = top - bottom > TALL
    height = max(top - (TALL_GRASP_UNDER_TOP if is_tall else GRASP_UNDER_TOP), bottom + GRASP_OVER_BOTTOM)
    band = object_N3[np.abs(object_N3[:, 2] - height) < _BAND]
    band = band if len(band) >= 8 else object_N3
    roof = object_N3[object_N3[:, 2] > height + ROOF_OVER_GRASP]
    narrowest = min(_width(band, closing_axis(yaw)) for yaw in _YAWS)
    best: tuple[float, Grasp] | None = None
    for yaw in _YAWS:
        closing = closing_axis(yaw)
        along = np.array([closing[1], -closing[0]])
        c, a = band[:, :2] @ closing, band[:, :2] @ along
        width = float(c.max() - c.min())
        if width > MOST_WIDTH:
            continue
        xy = closing * (c.max() + c.min()) / 2.0 + along * (a.max() + a.min()) / 2.0
        hooks = is_tall and (width > _SQUARE * narrowest or _width(roof, closing) > width - _TAPER)
        # Width in units of the opening: a millimetre of width must not outweigh a big turn of the wrist.
        cost = width / MOST_WIDTH + abs(yaw) + _HOOK_COST * hooks + _obstacle_cost(obstacles_M3, xy, closing, height)
        if best is None or cost < best[0]:
            point = np.array([*xy, height])
            best = cost, Grasp(point, point, float(yaw), height - bottom, top, is_rim=False)
    return None if best is None else best[1]


def _width(points_N3: NDArray[np.float64], closing: NDArray[np.float64]) -> float:
    along = points_N3[:, :2] @ closing
    return float(along.max() - along.min())


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
        # The fingers close radially; the hand is symmetric, so turns beyond 90 degrees are the same grasp.
        yaw = float(angle % np.pi - np.pi / 2.0)
        closing = closing_axis(yaw)
        at_rim = float(np.quantile(r[z > rim - 0.006], 0.9))
        deepest = max(rim - RIM_GRASP_UNDER_TOP, bottom + GRASP_OVER_BOTTOM)
        for inward in _INWARD:
            beneath = _top_under_palm(obstacles_M3, center_2 + (at_rim - inward) * outward, closing)
            height = max(deepest, min(beneath + MARGIN - PALM_ABOVE, rim - RIM_GRASP_LEAST))
            low_band = r[np.abs(z - height) < 0.004]
            at_height = float(np.quantile(low_band, 0.9)) if len(low_band) else at_rim
            radius = (at_rim + at_height) / 2.0
            point = np.array([*(center_2 + radius * outward), height])
            entry = np.array([*(center_2 + (radius - inward) * outward), height])
            cost = (
                abs(yaw)
                + _REACH_COST * float(np.linalg.norm(point[:2] - base_2))
                + _INWARD_COST * inward
                + _SHALLOW_COST * (height - deepest)
                + _obstacle_cost(obstacles_M3, entry[:2], closing, height)
                + _OBSTACLE_COST * np.log1p(_under_fingertips(object_N3, entry[:2], closing, height))
            )
            if best is None or cost < best[0]:
                best = cost, Grasp(point, entry, yaw, height - bottom, top, is_rim=True)
    assert best is not None, "the object has no surface points"
    return best[1]


def _obstacle_cost(
    obstacles_M3: NDArray[np.float64], xy: NDArray[np.float64], closing: NDArray[np.float64], height: float
) -> float:
    """Points of other objects where the open fingers or the hand's body would be, or too near."""
    c, a = _in_hand(obstacles_M3, xy, closing)
    z = obstacles_M3[:, 2] - height
    fingers = (z > -TIPS_BELOW - MARGIN) & (c < FINGER_OUTER + MARGIN) & (a < FINGER_HALF_BREADTH + MARGIN)
    palm = (z > PALM_ABOVE - MARGIN) & _under_palm(c, a)
    return float(_OBSTACLE_COST * np.log1p(int((fingers | palm).sum())))


def _top_under_palm(obstacles_M3: NDArray[np.float64], xy: NDArray[np.float64], closing: NDArray[np.float64]) -> float:
    """z of the highest point of other objects that the hand's body would come down on; -inf if there is none."""
    return float(obstacles_M3[_under_palm(*_in_hand(obstacles_M3, xy, closing)), 2].max(initial=-np.inf))


def _under_fingertips(
    object_N3: NDArray[np.float64], xy: NDArray[np.float64], closing: NDArray[np.float64], height: float
) -> int:
    """How many points of the object itself an open finger would land on."""
    c, a = _in_hand(object_N3, xy, closing)
    tips = (c > FINGER_INNER) & (c < FINGER_OUTER) & (a < FINGER_HALF_BREADTH)
    return int((tips & (object_N3[:, 2] > height - TIPS_BELOW)).sum())


def _in_hand(
    points_N3: NDArray[np.float64], xy: NDArray[np.float64], closing: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """([N], [N]) horizontal distances from the hand's middle, along its closing axis and across it."""
    relative = points_N3[:, :2] - xy
    return np.abs(relative @ closing), np.abs(relative @ np.array([closing[1], -closing[0]]))


def _under_palm(c: NDArray[np.float64], a: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (c < PALM_HALF_LENGTH + MARGIN) & (a < PALM_HALF_BREADTH + MARGIN)
