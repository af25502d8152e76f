"""Camera and rotation formulas, computed by hand."""

import math

import numpy as np

from geomcache.pipeline.camera_geometry import (
    axis_angle,
    camera_pose,
    intrinsic_matrix,
    inverse_pose,
    metric_depth,
    pose,
    unproject,
)
from geomcache.pipeline.sim.expert import rotation_matrix, rotation_vector


def test_depth_runs_from_the_near_to_the_far_plane() -> None:
    depth = metric_depth(np.array([0.0, 1.0, 0.5], np.float32), 0.5, 2.0)
    np.testing.assert_allclose(depth, [0.5, 2.0, 0.8], rtol=1e-6)  # 0.5 / (1 - 0.5 * 0.75)
    assert depth.dtype == np.float32


def test_focal_length_from_the_vertical_field_of_view() -> None:
    matrix = intrinsic_matrix(90.0, 100, 200)
    np.testing.assert_allclose(matrix, [[50, 0, 100], [0, 50, 50], [0, 0, 1]], atol=1e-12)


def test_camera_looks_along_opencv_z() -> None:
    matrix = camera_pose(np.array([0.0, 0.0, 2.0]), np.eye(3))  # MuJoCo: looks down -z
    np.testing.assert_allclose(matrix[:3, 2], [0, 0, -1])
    np.testing.assert_allclose(matrix[:3, 1], [0, -1, 0])


def test_axis_angle_clips_a_copy_and_handles_no_turn() -> None:
    quaternion = np.array([0.0, 0.0, 0.0, 1.0 + 1e-9])
    np.testing.assert_array_equal(axis_angle(quaternion), np.zeros(3))
    assert quaternion[3] > 1.0
    half = np.array([0.0, 0.0, math.sin(0.3), math.cos(0.3)])
    np.testing.assert_allclose(axis_angle(half), [0, 0, 0.6])


def test_inverse_pose() -> None:
    matrix = pose(np.array([1.0, 2.0, 3.0]), rotation_matrix(np.array([0.5, 0.5, 0.5, 0.5])))
    np.testing.assert_allclose(inverse_pose(matrix) @ matrix, np.eye(4), atol=1e-15)


def test_unproject_the_middle_pixel_and_a_corner() -> None:
    points = unproject(np.full((2, 2), 4.0), intrinsic_matrix(90.0, 2, 2), np.eye(4))
    np.testing.assert_allclose(points[0, 0], [-2.0, -2.0, 4.0])  # pixel centre (0.5, 0.5), focal 1, centre 1


def test_rotation_vector_inverts_rotation_matrix() -> None:
    quaternion = np.array([0.1, -0.2, 0.3, 0.9])
    quaternion /= np.linalg.norm(quaternion)
    np.testing.assert_allclose(rotation_vector(rotation_matrix(quaternion)), axis_angle(quaternion), atol=1e-12)
    np.testing.assert_array_equal(rotation_vector(np.eye(3)), np.zeros(3))
