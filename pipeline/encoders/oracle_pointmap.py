"""Metric XYZ from the simulator's own depth and cameras: no weights, true geometry, the upper bound.

One token per grid cell: the surface point behind the pixel nearest the cell's centre, in metres in the robot
base frame. A pixel is picked, never averaged, so a token lies on a real surface also at depth edges.

Formula (pixel centres at u + 0.5; the camera looks along +z, x right, y down):
    p_camera = ((u + 0.5 - cx) / fx * d, (v + 0.5 - cy) / fy * d, d)
    p_base = E[:3, :3] @ p_camera + E[:3, 3]
with E camera-to-robot-base. A skew K[0, 1] is taken along.
"""

from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.encoders._common import check_batch, frame_size, require_upright
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.interfaces import Need

# bf16 would round a point at 2 m by up to 8 mm.
DEFAULT_CODEC = "fp32"

Cells = Annotated[int, Field(ge=1)]


class Config(Schema):
    """Settings of the oracle."""

    grid: tuple[Cells, Cells] = (16, 16)  # token rows, token columns per view
    batch_size: int = Field(8, ge=1)  # time steps per call


def cell_pixels(cells: int, pixels: int) -> NDArray[np.int64]:
    """The pixel nearest each cell's centre along one axis, [cells].

    Cell i spans [i, i + 1) * pixels / cells and pixel u spans [u, u + 1); where a centre lies between two
    pixels, the one further right or down is taken.
    """
    return (2 * np.arange(cells, dtype=np.int64) + 1) * pixels // (2 * cells)


def unproject(
    depth_BVG: NDArray[np.float64],
    pixels_G2: NDArray[np.int64],
    intrinsics_BV33: NDArray[np.float64],
    extrinsics_BV44: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Depth along the optical axis at pixels (column u, row v) -> points [B, V, G, 3] in the base frame."""
    K = intrinsics_BV33[:, :, None]  # [B, V, 1, 3, 3]
    y_over_z = (pixels_G2[:, 1] + 0.5 - K[..., 1, 2]) / K[..., 1, 1]
    x_over_z = (pixels_G2[:, 0] + 0.5 - K[..., 0, 2] - K[..., 0, 1] * y_over_z) / K[..., 0, 0]
    points = np.stack([x_over_z * depth_BVG, y_over_z * depth_BVG, depth_BVG], axis=-1)
    rotation = extrinsics_BV44[:, :, None, :3, :3]  # [B, V, 1, 3, 3]
    # Products summed in a fixed order instead of a matrix product, whose order may change with the batch.
    turned = (
        rotation[..., 0] * points[..., 0:1] + rotation[..., 1] * points[..., 1:2] + rotation[..., 2] * points[..., 2:3]
    )
    return np.asarray(turned + extrinsics_BV44[:, :, None, :3, 3], dtype=np.float64)


class Encoder:
    """Frames with depth and cameras -> XYZ tokens [B, V, G, 3]."""

    version = 1
    needs: frozenset[Need] = frozenset({"depth", "cameras"})
    license = "none (no weights)"
    default_codec = DEFAULT_CODEC

    def __init__(self, config: Config, contract: Contract) -> None:
        """Raise ``InputError`` for no depth, views of differing size, or fewer pixels than cells."""
        require_upright(contract, "oracle_pointmap")
        if not contract.has_depth:
            raise InputError(
                "encoder oracle_pointmap needs metric depth and camera matrices",
                expected="frames with depth and cameras (has_depth: true)",
                found="a contract without depth (has_depth: false)",
                fix="official HDF5: `geomcache demos --replay SOURCE --out DIR` adds them; or record with "
                "`geomcache demos`, or choose an encoder that needs images only",
            )
        self._frame_hw = frame_size(contract, "oracle_pointmap")
        if config.grid[0] > self._frame_hw[0] or config.grid[1] > self._frame_hw[1]:
            raise InputError(
                "the grid of encoder oracle_pointmap is finer than the image",
                expected=f"at most {self._frame_hw[0]}x{self._frame_hw[1]} cells",
                found=f"grid {config.grid[0]}x{config.grid[1]}",
                fix="choose a coarser `grid`",
            )
        self.config = config
        rows, columns = (cell_pixels(n, size) for n, size in zip(config.grid, self._frame_hw, strict=True))
        self._pixels_G2 = np.stack([np.tile(columns, len(rows)), np.repeat(rows, len(columns))], axis=-1)
        self.spec = TokenSpec(
            encoder="oracle_pointmap",
            tap="xyz",
            cameras=contract.camera_names,
            grid=config.grid,
            dim=3,
            image_size=self._frame_hw,
            encoder_batch_size=config.batch_size,
            codec=DEFAULT_CODEC,
        )

    @property
    def description(self) -> str:
        """One line for tables."""
        return "metric XYZ unprojected from the simulator's depth; no weights"

    def weights_digest(self) -> str:
        """There are no weights."""
        return "none"

    def load(self, device: str) -> None:
        """Nothing to load; it computes with numpy, whatever the device."""

    def encode(self, frames: FrameBatch) -> torch.Tensor:
        """[B, V, G, 3] float32 metres in the robot base frame, on the CPU; computed in float64.

        Raises:
            InputError: a depth that is not a positive finite number at a sampled pixel (no surface to point
            at).
        """
        check_batch(frames, self.spec, self._frame_hw)
        assert frames.depth_BVHW is not None, "the contract promises depth"
        assert frames.intrinsics_BV33 is not None, "the contract promises intrinsics"
        assert frames.extrinsics_BV44 is not None, "the contract promises extrinsics"
        depth_BVG = frames.depth_BVHW[:, :, self._pixels_G2[:, 1], self._pixels_G2[:, 0]].astype(np.float64)
        self._require_surface(depth_BVG)
        points = unproject(
            depth_BVG,
            self._pixels_G2,
            frames.intrinsics_BV33.astype(np.float64),
            frames.extrinsics_BV44.astype(np.float64),
        )
        return torch.from_numpy(points.astype(np.float32))

    def _require_surface(self, depth_BVG: NDArray[np.float64]) -> None:
        bad = np.argwhere(~(np.isfinite(depth_BVG) & (depth_BVG > 0)))
        if len(bad):
            row, view, token = (int(i) for i in bad[0])
            u, v = self._pixels_G2[token]
            raise InputError(
                f"no depth at batch row {row}, camera {self.spec.cameras[view]}, pixel ({u}, {v})",
                expected="metres along the optical axis, finite and > 0",
                found=f"{depth_BVG[row, view, token]} ({len(bad)} such pixels in this batch)",
                fix="record the episode again, or leave its frames out of the pack",
            )
