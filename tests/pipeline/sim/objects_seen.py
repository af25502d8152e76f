"""Does a depth map, unprojected, put an object's pixels where the object is? Fails for mirrored or turned frames."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from geomcache.pipeline.camera_geometry import unproject
from geomcache.pipeline.sim import scene_geometry
from geomcache.pipeline.sim.libero_env import LiberoEnv

_MARGIN = 0.006  # metres around an object's mesh box


@dataclass(frozen=True)
class ObjectsSeen:
    """One upright view of a running scene."""

    env: LiberoEnv  # at the moment that the view shows
    depth_HW: NDArray[np.float32]
    segments_HW: NDArray[np.int32]  # geom ids
    intrinsics_33: NDArray[np.float64]
    camera_to_world_44: NDArray[np.float64]

    def mirrored(self) -> "ObjectsSeen":
        """What a data set in the community's orientation would show, under the true matrices."""
        return replace(self, depth_HW=self.depth_HW[:, ::-1], segments_HW=self.segments_HW[:, ::-1])

    def pixels(self, name: str) -> NDArray[np.bool_]:
        """[H, W] of an object, without its silhouette: the renderer's antialiasing mixes two depths there."""
        (geom,) = scene_geometry.visual_geoms(self.env.simulator, name)
        mine = self.segments_HW == geom
        inner = mine.copy()
        for axis, way in ((0, 1), (0, -1), (1, 1), (1, -1)):
            inner &= np.roll(mine, way, axis=axis)
        return inner

    def fraction_in_box(self, name: str) -> float:
        """Of an object's pixels, the share whose unprojected point lies in its mesh box +- 6 mm."""
        points = unproject(self.depth_HW, self.intrinsics_33, self.camera_to_world_44)[self.pixels(name)]
        assert len(points) > 20
        (geom,) = scene_geometry.visual_geoms(self.env.simulator, name)
        position, rotation = self.env.observed_geom_pose(geom)
        box = scene_geometry.bounds(scene_geometry.mesh_vertices(self.env.simulator, geom))
        local = (points - position) @ rotation
        inside = (local > box.low_3 - _MARGIN).all(axis=1) & (local < box.high_3 + _MARGIN).all(axis=1)
        return float(inside.mean())
