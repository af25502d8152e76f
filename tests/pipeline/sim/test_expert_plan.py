"""Grasps on simple shapes, with hand-made surface points."""

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.pipeline.sim import expert_plan

BASE = np.array([-0.6, 0.0])
NOTHING = np.zeros((0, 3))


def box_points(size: tuple[float, float, float], center: tuple[float, float, float]) -> NDArray[np.float64]:
    axes = [np.linspace(-s / 2, s / 2, 11) + c for s, c in zip(size, center, strict=True)]
    return np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 3)


def bowl_points() -> NDArray[np.float64]:
    """A bowl of libero_spatial's size: 5.5 cm of radius and 5.2 cm high."""
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    rings = [(0.03 + 0.48 * z, z) for z in np.linspace(0, 0.052, 27)]
    return np.array([[r * np.cos(a), r * np.sin(a), z] for r, z in rings for a in angles])


def turned(points_N3: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    c, s = np.cos(angle), np.sin(angle)
    return np.asarray(points_N3 @ np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]]), dtype=np.float64)


def drawer_points() -> NDArray[np.float64]:
    """Walls of an open drawer, 20 cm x 15 cm inside, 6 mm above the bowl's rim."""
    height = 0.058
    sides = [box_points((0.005, 0.16, height), (x, 0.0, height / 2)) for x in (-0.1025, 0.1025)]
    ends = [box_points((0.21, 0.005, height), (0.0, y, height / 2)) for y in (-0.0775, 0.0775)]
    return np.concatenate([*sides, *ends])


def test_a_thin_box_is_grasped_across_its_narrow_side() -> None:
    grasp = expert_plan.plan_grasp(box_points((0.04, 0.12, 0.10), (0.1, 0.2, 0.05)), NOTHING, BASE)
    assert not grasp.is_rim
    assert abs(np.rad2deg(abs(grasp.yaw)) - 90.0) <= 15.0  # the fingers close along x
    np.testing.assert_allclose(grasp.point_3, [0.1, 0.2, 0.065], atol=0.003)
    assert grasp.over_bottom == pytest.approx(0.065)


def test_a_flat_box_is_not_grasped_in_the_floor() -> None:
    grasp = expert_plan.plan_grasp(box_points((0.08, 0.04, 0.02), (0.0, 0.0, 0.01)), NOTHING, BASE)
    assert grasp.point_3[2] == pytest.approx(expert_plan.GRASP_OVER_BOTTOM)


@pytest.mark.parametrize("ridge", [0, 1])
def test_a_carton_is_held_under_its_slopes_not_by_its_gables(ridge: int) -> None:
    """Held by its gables it hangs on one finger by its roof when the hand opens."""
    body = box_points((0.053, 0.053, 0.11), (0.0, 0.0, 0.055))
    slices = [(0.053 * (1 - k / 16), 0.11 + 0.002 * k) for k in range(17)]
    roof = [box_points((width, 0.053, 0.001), (0.0, 0.0, z)) for width, z in slices]  # the ridge runs along y
    carton = np.concatenate([body, *roof])[:, [0, 1, 2] if ridge == 1 else [1, 0, 2]]
    grasp = expert_plan.plan_grasp(carton, NOTHING, BASE)
    assert abs(expert_plan.closing_axis(grasp.yaw)[ridge]) < np.sin(np.deg2rad(10.0))
    # The palm, 31 mm over the point, may touch the ridge of the mesh, of which the top centimetre is not solid.
    assert grasp.point_3[2] + 0.031 > 0.142 - 0.012


def test_a_neighbour_turns_the_hand() -> None:
    cube = box_points((0.05, 0.05, 0.1), (0.0, 0.0, 0.05))
    free = expert_plan.plan_grasp(cube, NOTHING, BASE)
    wall = box_points((0.03, 0.02, 0.1), (0.0, 0.045, 0.05))  # where a finger would go
    beside = expert_plan.plan_grasp(cube, wall, BASE)
    assert free.yaw == pytest.approx(0.0)
    assert abs(beside.yaw) > np.deg2rad(30)


def test_a_bowl_is_grasped_by_its_rim_with_radial_fingers() -> None:
    grasp = expert_plan.plan_grasp(bowl_points(), NOTHING, BASE)
    assert grasp.is_rim
    radius = np.linalg.norm(grasp.point_3[:2])
    assert 0.04 < radius < 0.056
    radial = grasp.point_3[:2] / radius
    assert abs(radial @ expert_plan.closing_axis(grasp.yaw)) == pytest.approx(1.0)
    assert grasp.point_3[2] == pytest.approx(0.052 - expert_plan.RIM_GRASP_UNDER_TOP)


def test_heights_clear_the_target() -> None:
    grasp = expert_plan.plan_grasp(box_points((0.04, 0.04, 0.1), (0.0, 0.0, 0.05)), NOTHING, BASE)
    assert expert_plan.release_height(grasp, 0.14, into=True) == pytest.approx(0.14 + 0.065 - 0.01)
    assert expert_plan.release_height(grasp, 0.02, into=False) == pytest.approx(0.02 + 0.065 + 0.002)
    assert expert_plan.carry_height(grasp, 0.14) >= 0.14 + grasp.over_bottom + 0.05


@pytest.mark.parametrize("degrees", [0, 24, 57, 90, 130])
def test_a_bowl_in_a_drawer_is_grasped_without_touching_the_walls(degrees: int) -> None:
    bowl, walls = bowl_points(), turned(drawer_points(), np.deg2rad(degrees))
    free = expert_plan.plan_grasp(bowl, NOTHING, BASE)
    np.testing.assert_array_equal(free.entry_3, free.point_3)
    grasp = expert_plan.plan_grasp(bowl, walls, BASE)
    # The Panda's open hand in robosuite, from its collision meshes: fingers end 66 mm from the middle and 10 mm below
    # the point, the palm is 208 mm x 64 mm and begins 31 mm above the point.
    x, y, z = turned(walls - grasp.entry_3, -grasp.yaw).T  # as the hand sees them: it closes along y
    x, y = np.abs(x), np.abs(y)
    assert not ((x < 0.012) & (y < 0.066) & (z > -0.010)).any(), "a finger comes down on a wall"
    assert not ((x < 0.032) & (y < 0.104) & (z > 0.031)).any(), "the palm comes down on a wall"
    # One finger comes down inside the bowl, the other outside.
    middles = [grasp.entry_3[:2] + side * 0.052 * expert_plan.closing_axis(grasp.yaw) for side in (-1, 1)]
    inside, outside = sorted(np.linalg.norm(middle) for middle in middles)
    assert inside < 0.035
    assert outside > 0.070
    # They close on the bowl's wall at least 15 mm under the rim.
    assert np.linalg.norm(bowl - grasp.point_3, axis=1).min() < 0.006
    assert 0.052 - grasp.point_3[2] >= 0.0149
