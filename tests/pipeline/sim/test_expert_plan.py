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


def test_a_thin_box_is_grasped_across_its_narrow_side() -> None:
    grasp = expert_plan.plan_grasp(box_points((0.04, 0.12, 0.10), (0.1, 0.2, 0.05)), NOTHING, BASE)
    assert not grasp.is_rim
    assert abs(np.rad2deg(abs(grasp.yaw)) - 90.0) <= 15.0  # the fingers close along x
    np.testing.assert_allclose(grasp.point_3, [0.1, 0.2, 0.065], atol=0.003)
    assert grasp.over_bottom == pytest.approx(0.065)


def test_a_flat_box_is_not_grasped_in_the_floor() -> None:
    grasp = expert_plan.plan_grasp(box_points((0.08, 0.04, 0.02), (0.0, 0.0, 0.01)), NOTHING, BASE)
    assert grasp.point_3[2] == pytest.approx(expert_plan.GRASP_OVER_BOTTOM)


def test_a_neighbour_turns_the_hand() -> None:
    cube = box_points((0.05, 0.05, 0.1), (0.0, 0.0, 0.05))
    free = expert_plan.plan_grasp(cube, NOTHING, BASE)
    wall = box_points((0.03, 0.02, 0.1), (0.0, 0.045, 0.05))  # where a finger would go
    beside = expert_plan.plan_grasp(cube, wall, BASE)
    assert free.yaw == pytest.approx(0.0)
    assert abs(beside.yaw) > np.deg2rad(30)


def test_a_bowl_is_grasped_by_its_rim_with_radial_fingers() -> None:
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    rings = [(0.03 + 0.5 * z, z) for z in np.linspace(0, 0.05, 26)]
    bowl = np.array([[r * np.cos(a), r * np.sin(a), z] for r, z in rings for a in angles])
    grasp = expert_plan.plan_grasp(bowl, NOTHING, BASE)
    assert grasp.is_rim
    radius = np.linalg.norm(grasp.point_3[:2])
    assert 0.04 < radius < 0.055
    radial = grasp.point_3[:2] / radius
    assert abs(radial @ expert_plan.closing_axis(grasp.yaw)) == pytest.approx(1.0)
    assert grasp.point_3[2] == pytest.approx(0.05 - expert_plan.RIM_GRASP_UNDER_TOP)


def test_heights_clear_the_target() -> None:
    grasp = expert_plan.plan_grasp(box_points((0.04, 0.04, 0.1), (0.0, 0.0, 0.05)), NOTHING, BASE)
    assert expert_plan.release_height(grasp, 0.14, into=True) == pytest.approx(0.14 + 0.065 - 0.01)
    assert expert_plan.release_height(grasp, 0.02, into=False) == pytest.approx(0.02 + 0.065 + 0.002)
    assert expert_plan.carry_height(grasp, 0.14) >= 0.14 + grasp.over_bottom + 0.05
