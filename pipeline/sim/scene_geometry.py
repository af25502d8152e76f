"""Privileged geometry of a running scene: where every object's surface is, in world metres.

Non-obvious:
- Collision shapes of LIBERO objects are coarse boxes (group 0); the meshes one sees are group 1 with no contact.
  So what to hold is read from meshes, what to keep clear of from boxes: a flat wall's mesh has only its corners.
- A cabinet's drawers are bodies of their own; everything below one root body belongs to the object.
- Scanned meshes have up to 200,000 vertices; every n-th is plenty for planning.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_VERTICES = 6000  # per object
_VISUAL_GROUP = 1
_SPACING = 0.008  # metres between points of a collision box


@dataclass(frozen=True)
class Box:
    """Axis-aligned bounds in metres."""

    low_3: NDArray[np.float64]
    high_3: NDArray[np.float64]

    @property
    def center_3(self) -> NDArray[np.float64]:
        """The middle of the box."""
        return (self.low_3 + self.high_3) / 2.0


def bounds(vertices_N3: NDArray[np.float64]) -> Box:
    """The smallest axis-aligned box around points [N, 3]."""
    return Box(vertices_N3.min(axis=0), vertices_N3.max(axis=0))


def object_names(simulator: Any) -> list[str]:
    """Movable objects, then fixtures that have a body of their own."""
    return [name for name in (*simulator.objects_dict, *simulator.fixtures_dict) if name in simulator.obj_body_id]


def visual_geoms(simulator: Any, name: str) -> list[int]:
    """Ids of the mesh geoms one sees of an object."""
    import mujoco

    model = simulator.sim.model._model
    root = model.body_rootid[simulator.obj_body_id[name]]
    return [
        geom
        for geom in range(model.ngeom)
        if model.body_rootid[model.geom_bodyid[geom]] == root
        and model.geom_type[geom] == int(mujoco.mjtGeom.mjGEOM_MESH)
        and model.geom_group[geom] == _VISUAL_GROUP
    ]


def mesh_vertices(simulator: Any, geom: int) -> NDArray[np.float64]:
    """[N, 3] vertices of a mesh geom in the geom's own frame, metres."""
    model = simulator.sim.model._model
    mesh = model.geom_dataid[geom]
    first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    return np.array(model.mesh_vert[first : first + count], dtype=np.float64)


def object_vertices(simulator: Any, name: str) -> NDArray[np.float64]:
    """[N, 3] surface points of an object in the world, thinned; empty if it has no mesh."""
    data = simulator.sim.data
    parts = []
    for geom in visual_geoms(simulator, name):
        local = mesh_vertices(simulator, geom)
        local = local[:: max(1, len(local) // _MOST_VERTICES)]
        parts.append(local @ np.asarray(data.geom_xmat[geom]).reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(parts) if parts else np.zeros((0, 3))


def solid_points(simulator: Any, name: str) -> NDArray[np.float64]:
    """[N, 3] points that fill an object's collision boxes in the world: what a hand would run into."""
    model, data = simulator.sim.model._model, simulator.sim.data
    root = model.body_rootid[simulator.obj_body_id[name]]
    parts = []
    for geom in range(model.ngeom):
        if model.body_rootid[model.geom_bodyid[geom]] == root and model.geom_contype[geom]:
            steps = [np.linspace(-half, half, 2 + int(2.0 * half / _SPACING)) for half in model.geom_size[geom]]
            local = np.stack(np.meshgrid(*steps), axis=-1).reshape(-1, 3)
            parts.append(local @ np.asarray(data.geom_xmat[geom]).reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(parts) if parts else np.zeros((0, 3))


def object_position(simulator: Any, name: str) -> NDArray[np.float64]:
    """[3] origin of an object's body in the world."""
    return np.array(simulator.sim.data.body_xpos[simulator.obj_body_id[name]], dtype=np.float64)
