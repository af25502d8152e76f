"""What the simulator knows of every surface: metric XYZ, normals, visibility, confidence. No weights: the upper bound.

It reads the simulator's own depth and cameras, which no real robot has: a policy on these tokens says how far true
geometry would carry, never what a geometry model reaches.

One token per grid cell: the surface point behind the pixel nearest the cell's centre. A pixel is picked, never
averaged, so a token lies on a real surface also at depth edges. ``channels`` chooses what is told of that point:

- ``xyz`` (3): metres in the robot base frame.
- ``normals`` (3): the unit vector of the surface there, in the base frame, towards the camera; (0, 0, 0) where no
  neighbour has a depth. Cross product of the steps to a neighbour along each image axis. Of the two neighbours on an
  axis the one on the same surface is taken: the side on which pixel, neighbour and next neighbour deviate less from a
  plane, i.e. with the smaller |1/d0 - 2/d1 + 1/d2| (inverse depth is linear over a plane's image). This holds at
  depth edges and at creases alike, and is exact on planes.
- ``visibility`` (1): share of the other views that see this surface point; 0 when there is no other view.
- ``confidence`` (1): share of the cell's pixels that lie on the surface of the picked one; low at edges.

A pixel lies on a point's surface when its depth is within ``SURFACE_TOLERANCE`` of the depth that the point's tangent
plane has at that very pixel, and the plane faces the camera: a slanted table is one surface, a step is two. A view sees
a point when the pixel it falls on lies on the point's surface.

Formula (pixel centres at u + 0.5; the camera looks along +z, x right, y down):
    p_camera = ((u + 0.5 - cx) / fx * d, (v + 0.5 - cy) / fy * d, d)
    p_base = E[:3, :3] @ p_camera + E[:3, 3]
with E camera-to-robot-base. A skew K[0, 1] is taken along. Sums of three stand in a fixed order instead of a matrix
product, whose order may change with the batch.
"""

from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.fingerprint import IN_FINGERPRINT_UNLESS_DEFAULT
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.encoders._common import Checkpoint, check_batch, frame_size, require_upright
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.interfaces import Need

CHECKPOINTS: tuple[Checkpoint, ...] = ()  # there are no weights
PACKAGES: tuple[str, ...] = ()  # nothing beyond geomcache itself
INSTALL = ""

# bf16 would round a point at 2 m by up to 8 mm.
DEFAULT_CODEC = "fp32"
SURFACE_TOLERANCE = 0.01  # metres of depth; thinner things are one surface with what they lie on
WIDTHS = {"xyz": 3, "normals": 3, "visibility": 1, "confidence": 1}  # of the channels, in the order of a token
_NORMAL_PIXELS = 4  # per image side: fewer, and a pixel may have no two neighbours on either side

Cells = Annotated[int, Field(ge=1)]
Array = NDArray[np.float64]


class Config(Schema):
    """Settings of the oracle."""

    grid: tuple[Cells, Cells] = (16, 16)  # token rows, token columns per view
    batch_size: int = Field(8, ge=1)  # time steps per call
    # What a token holds, see above; the spec's tap is these names joined by ".".
    channels: tuple[Literal["xyz", "normals", "visibility", "confidence"], ...] = Field(
        ("xyz",), json_schema_extra=IN_FINGERPRINT_UNLESS_DEFAULT
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.channels[:1] != ("xyz",) or self.channels != tuple(name for name in WIDTHS if name in self.channels):
            raise ValueError(f"channels must begin with xyz and keep the order {', '.join(WIDTHS)}, each at most once")
        return self


def cell_pixels(cells: int, pixels: int) -> NDArray[np.int64]:
    """The pixel nearest each cell's centre along one axis, [cells].

    Cell i spans [i, i + 1) * pixels / cells and pixel u spans [u, u + 1); where a centre lies between two
    pixels, the one further right or down is taken.
    """
    return (2 * np.arange(cells, dtype=np.int64) + 1) * pixels // (2 * cells)


def rays(pixels_G2: NDArray[np.int64], intrinsics_33: Array) -> Array:
    """Directions with z = 1 through the centres of pixels (column u, row v), in camera axes.

    Args:
        pixels_G2: [..., G, 2]
        intrinsics_33: [..., 3, 3]

    Returns:
        [..., G, 3]
    """
    K = intrinsics_33[..., None, :, :]
    y = (pixels_G2[..., 1] + 0.5 - K[..., 1, 2]) / K[..., 1, 1]
    x = (pixels_G2[..., 0] + 0.5 - K[..., 0, 2] - K[..., 0, 1] * y) / K[..., 0, 0]
    return np.stack([x, y, np.ones_like(x)], axis=-1)


def turned(vectors_G3: Array, matrix_33: Array) -> Array:
    """``matrix @ vector`` of vectors [..., G, 3] and matrices [..., 3, 3], summed in a fixed order."""
    M = matrix_33[..., None, :, :]
    x, y, z = (M[..., axis] * vectors_G3[..., axis : axis + 1] for axis in range(3))
    return np.asarray(x + y + z, dtype=np.float64)


def surface_normals(depth_BVHW: Array, pixels_G2: NDArray[np.int64], intrinsics_BV33: Array) -> Array:
    """Unit normals [B, V, G, 3] in camera axes, towards the camera, by the rule above; NaN depth is no surface."""
    right, down = (_step(depth_BVHW, pixels_G2, intrinsics_BV33, axis) for axis in (0, 1))
    normals = np.cross(right, down)
    length = np.sqrt(_dot(normals, normals))
    towards = np.where(_dot(normals, rays(pixels_G2, intrinsics_BV33)) > 0, -1.0, 1.0)
    scale = np.divide(towards, length, out=np.zeros_like(length), where=length > 0)
    return np.asarray(normals * scale[..., None], dtype=np.float64)


def _step(depth_BVHW: Array, pixels_G2: NDArray[np.int64], intrinsics_BV33: Array, axis: int) -> Array:
    """From each pixel's point to its neighbour's on the same surface along an image axis; 0 where there is none."""
    size, here = np.array(depth_BVHW.shape[:1:-1]), pixels_G2  # (W, H)
    d0 = depth_BVHW[:, :, here[:, 1], here[:, 0]]
    p0 = rays(here, intrinsics_BV33) * d0[..., None]
    best, smallest = np.zeros_like(p0), np.full_like(d0, np.inf)
    for sign in (1, -1):
        offset = np.array([sign, 0] if axis == 0 else [0, sign])
        near, far = (np.clip(here + n * offset, 0, size - 1) for n in (1, 2))
        d1, d2 = (depth_BVHW[:, :, each[:, 1], each[:, 0]] for each in (near, far))
        bend = np.abs(1.0 / d0 - 2.0 / d1 + 1.0 / d2)
        inside = (far == here + 2 * offset).all(axis=-1)
        better = inside & (bend < smallest)  # not where a depth is NaN
        step = sign * (rays(near, intrinsics_BV33) * d1[..., None] - p0)
        best, smallest = np.where(better[..., None], step, best), np.where(better, bend, smallest)
    return best


def _dot(a: Array, b: Array) -> Array:
    """Of vectors [..., 3], summed in a fixed order."""
    return np.asarray(a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2], dtype=np.float64)


def same_surface(normals: Array, points: Array, pixel_rays: Array, depth: Array) -> NDArray[np.bool_]:
    """Whether a depth measured along a ray lies on a point's surface; all in one camera's axes, NaN never does."""
    facing = _dot(normals, pixel_rays)  # < 0: the plane faces the camera
    plane = np.divide(_dot(normals, points), facing, out=np.full_like(facing, np.nan), where=facing < 0)
    return np.asarray(np.abs(plane - depth) <= SURFACE_TOLERANCE, dtype=np.bool_)


def visibility(
    points_BVG3: Array, normals_BVG3: Array, depth_BVHW: Array, intrinsics_BV33: Array, extrinsics_BV44: Array
) -> Array:
    """Share of the other views that see each point, [B, V, G]; points and normals are in the base frame."""
    B, V, H, W = depth_BVHW.shape
    seen_BVG = np.zeros(points_BVG3.shape[:-1])
    for other in range(V):
        K, E = intrinsics_BV33[:, other, None], extrinsics_BV44[:, other, None]
        to_camera = np.swapaxes(E[..., :3, :3], -1, -2)
        points = turned(points_BVG3 - E[..., None, :3, 3], to_camera)
        z = np.where(points[..., 2] > 0, points[..., 2], np.nan)
        x, y = points[..., 0] / z, points[..., 1] / z
        u = K[..., 0, 0, None] * x + K[..., 0, 1, None] * y + K[..., 0, 2, None]
        v = K[..., 1, 1, None] * y + K[..., 1, 2, None]
        inside = (u >= 0) & (u < W) & (v >= 0) & (v < H)  # not where it is NaN: behind the camera
        pixels = np.where(inside[..., None], np.stack([u, v], axis=-1), 0.0).astype(np.int64)  # [B, V, G, 2]
        depth = depth_BVHW[np.arange(B)[:, None, None], other, pixels[..., 1], pixels[..., 0]]
        seen = inside & same_surface(turned(normals_BVG3, to_camera), points, rays(pixels, K), depth)
        seen[:, other] = False  # its own view
        seen_BVG += seen
    return np.asarray(seen_BVG / max(V - 1, 1), dtype=np.float64)


def confidence(
    grid: tuple[int, int], points_BVG3: Array, normals_BVG3: Array, depth_BVHW: Array, intrinsics_BV33: Array
) -> Array:
    """Share of each cell's pixels on the surface of the picked one, [B, V, G]; points and normals in camera axes.

    A pixel belongs to the cell that its centre lies in.
    """
    B, V, *sides = depth_BVHW.shape
    rows, columns = ((2 * np.arange(n) + 1) * cells // (2 * n) for n, cells in zip(sides, grid, strict=True))
    cell_HW = rows[:, None] * grid[1] + columns
    pixels = np.stack(np.broadcast_arrays(np.arange(sides[1]), np.arange(sides[0])[:, None]), axis=-1)
    on_BVN = same_surface(
        normals_BVG3[:, :, cell_HW.ravel()],
        points_BVG3[:, :, cell_HW.ravel()],
        rays(pixels.reshape(-1, 2), intrinsics_BV33),
        depth_BVHW.reshape(B, V, -1),
    )
    starts = [np.searchsorted(cell, np.arange(cells)) for cell, cells in zip((rows, columns), grid, strict=True)]
    on_BVHW = on_BVN.reshape(depth_BVHW.shape).astype(np.int64)
    on_BVG = np.add.reduceat(np.add.reduceat(on_BVHW, starts[0], axis=2), starts[1], axis=3).reshape(B, V, -1)
    return np.asarray(on_BVG / np.bincount(cell_HW.ravel()), dtype=np.float64)


class Encoder:
    """Frames with depth and cameras -> what the simulator knows of the surface, [B, V, G, 3 to 8]."""

    version = 1
    needs: frozenset[Need] = frozenset({"depth", "cameras"})
    license = "none (no weights)"
    non_commercial = False
    default_codec = DEFAULT_CODEC

    def __init__(self, config: Config, contract: Contract) -> None:
        """Raise ``InputError`` for no depth, views of differing size, fewer pixels than cells or normals need."""
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
        self._only_points = config.channels == ("xyz",)
        if not self._only_points and min(self._frame_hw) < _NORMAL_PIXELS:
            raise InputError(
                "the images are too small for surface normals",
                expected=f"at least {_NORMAL_PIXELS}x{_NORMAL_PIXELS} pixels",
                found=f"{self._frame_hw[0]}x{self._frame_hw[1]}",
                fix="set `channels` to [xyz], or record larger images",
            )
        self.config = config
        rows, columns = (cell_pixels(n, size) for n, size in zip(config.grid, self._frame_hw, strict=True))
        self._pixels_G2 = np.stack([np.tile(columns, len(rows)), np.repeat(rows, len(columns))], axis=-1)
        self.spec = TokenSpec(
            encoder="oracle_pointmap",
            tap=".".join(config.channels),
            cameras=contract.camera_names,
            grid=config.grid,
            dim=sum(WIDTHS[name] for name in config.channels),
            image_size=self._frame_hw,
            encoder_batch_size=config.batch_size,
            codec=DEFAULT_CODEC,
        )

    @property
    def description(self) -> str:
        """One line for tables."""
        return (
            f"the simulator's own {', '.join(self.config.channels)}; no weights, an upper bound that no real robot has"
        )

    def weights_digest(self) -> str:
        """There are no weights."""
        return "none"

    def load(self, device: str) -> None:
        """Nothing to load; it computes with numpy, whatever the device."""

    def encode(self, frames: FrameBatch) -> torch.Tensor:
        """[B, V, G, D] float32 on the CPU, the config's channels side by side; computed in float64.

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
        K, E = frames.intrinsics_BV33.astype(np.float64), frames.extrinsics_BV44.astype(np.float64)
        camera_points = rays(self._pixels_G2, K) * depth_BVG[..., None]
        points = turned(camera_points, E[..., :3, :3]) + E[..., None, :3, 3]
        if self._only_points:
            return torch.from_numpy(points.astype(np.float32))
        depth = frames.depth_BVHW.astype(np.float64)
        depth[~(np.isfinite(depth) & (depth > 0))] = np.nan
        camera_normals = surface_normals(depth, self._pixels_G2, K)
        normals = turned(camera_normals, E[..., :3, :3])
        made = {
            "xyz": lambda: points,
            "normals": lambda: normals,
            "visibility": lambda: visibility(points, normals, depth, K, E)[..., None],
            "confidence": lambda: confidence(self.config.grid, camera_points, camera_normals, depth, K)[..., None],
        }
        tokens = np.concatenate([made[name]() for name in self.config.channels], axis=-1)
        return torch.from_numpy(tokens.astype(np.float32))

    def _require_surface(self, depth_BVG: Array) -> None:
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
