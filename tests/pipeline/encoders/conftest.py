"""Synthetic frames and contracts, by formula: golden files must not hang on a random generator."""

from collections.abc import Callable

import numpy as np
import pytest

from geomcache.cache_schemas.contract import CameraContract, Contract
from geomcache.pipeline.frames import FrameBatch


def make_contract(cameras: tuple[str, ...] = ("agentview", "wrist"), size: int = 64, depth: bool = True) -> Contract:
    return Contract(
        image_orientation="upright",
        cameras=tuple(CameraContract(name=name, height=size, width=size) for name in cameras),
        has_depth=depth,
    )


def make_frames(rows: int, views: int = 2, size: int = 64, start: int = 0) -> FrameBatch:
    """Row i of ``make_frames(n, start=s)`` equals row 0 of ``make_frames(1, start=s + i)``."""
    row = (np.arange(rows) + start)[:, None, None, None, None]
    view = np.arange(views)[None, :, None, None, None]
    v = np.arange(size)[None, None, :, None, None]
    u = np.arange(size)[None, None, None, :, None]
    c = np.arange(3)[None, None, None, None, :]
    images = (u * (3 + c) + v * (5 + view) + row * 37 + (u * v) // (7 + view + row % 3)) % 256
    depth = 0.5 + 0.01 * u[..., 0] + 0.02 * v[..., 0] + 0.1 * (row + view)[..., 0]
    intrinsics = np.tile(
        np.array([[1.2 * size, 0, size / 2], [0, 1.1 * size, size / 2], [0, 0, 1.0]]), (rows, views, 1, 1)
    )
    extrinsics = np.tile(np.eye(4), (rows, views, 1, 1))
    angle = 0.1 * (np.arange(rows)[:, None] + start + np.arange(views)[None])
    extrinsics[..., 0, 0], extrinsics[..., 0, 1] = np.cos(angle), -np.sin(angle)
    extrinsics[..., 1, 0], extrinsics[..., 1, 1] = np.sin(angle), np.cos(angle)
    extrinsics[..., :3, 3] = [0.6, -0.1, 1.6]
    return FrameBatch(images.astype(np.uint8), depth.astype(np.float32), intrinsics, extrinsics)


@pytest.fixture
def contract() -> Callable[..., Contract]:
    return make_contract


@pytest.fixture
def frames() -> Callable[..., FrameBatch]:
    return make_frames
