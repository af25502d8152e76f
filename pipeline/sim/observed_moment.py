"""The moment of a control step that LIBERO's own observation shows, kept so that it can be rendered later.

Non-obvious:
- A control step is 25 physics steps, and robosuite samples its observables inside it (the phase depends on the
  forced updates after a reset), so rendering after ``env.step`` shows a LATER moment than the returned frames.
- MuJoCo's derived quantities (body, geom, camera poses) lag qpos by one physics step at that moment; copying the
  whole MjData keeps exactly what the official frame was drawn from. The copy costs 0.04 ms.
- LIBERO changes ``model.site_rgba`` AFTER the sample (a stove's glow), so the colours are kept as well.
- ``sim.render`` does not make its GL context current: with two environments in one process, frames would be drawn
  in the wrong one.
- Every hard reset builds a new model; a kept copy of another model must not be reused.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.pipeline.camera_geometry import camera_pose, intrinsic_matrix

OBSERVABLE_NAME = "geomcache_observed_moment"


class ObservedMoment:
    """Copies MjData whenever robosuite samples observables, and renders from that copy on demand.

    Args:
        inner: the robosuite environment (not LIBERO's wrapper), made with ``use_camera_obs=False``.
    """

    def __init__(self, inner: Any) -> None:
        from robosuite.utils.observables import Observable, sensor

        self._inner = inner
        self._model: Any = None
        self._data: Any = None
        self._site_rgba: NDArray[np.float32] | None = None

        def keep(obs_cache: dict[str, Any]) -> float:  # noqa: ARG001 - robosuite's sensor signature
            self._keep()
            return 0.0

        # Same rate as the camera observables, so it is sampled in the same physics step; inactive = not returned.
        inner.add_observable(
            Observable(
                name=OBSERVABLE_NAME,
                sensor=sensor(modality="geomcache")(keep),
                sampling_rate=inner.control_freq,
                active=False,
            )
        )

    def _keep(self) -> None:
        import mujoco

        sim = self._inner.sim
        model = sim.model._model
        if model is not self._model:
            self._model, self._data = model, mujoco.MjData(model)
        mujoco.mj_copyData(self._data, model, sim.data._data)
        self._site_rgba = model.site_rgba.copy()

    def forget(self) -> None:
        """Drop the copies, before the model they belong to is freed."""
        self._model = self._data = self._site_rgba = None

    def render(self, camera: str, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """(RGB [H, W, 3], z-buffer [H, W] in 0..1), both raw: BOTTOM-UP."""
        image, zbuffer = self._render(camera, height, width, depth=True)
        return image, zbuffer

    def segment(self, camera: str, height: int, width: int) -> NDArray[np.int32]:
        """[H, W] geom id of every pixel, -1 where there is none; raw: BOTTOM-UP."""
        import mujoco

        kind_and_id: NDArray[np.int32] = self._render(camera, height, width, segmentation=True)
        is_geom = kind_and_id[..., 0] == int(mujoco.mjtObj.mjOBJ_GEOM)
        return np.where(is_geom, kind_and_id[..., 1], -1).astype(np.int32)

    def _render(self, camera: str, height: int, width: int, **options: bool) -> Any:
        sim = self._inner.sim
        context = sim._render_context_offscreen
        assert self._model is sim.model._model, "nothing was observed since the last reset"
        now, colours_now = context.data, self._model.site_rgba.copy()
        context.gl_ctx.make_current()
        context.data = SimpleNamespace(_data=self._data)
        self._model.site_rgba[:] = self._site_rgba
        try:
            return sim.render(camera_name=camera, height=height, width=width, **options)
        finally:
            context.data = now
            self._model.site_rgba[:] = colours_now

    def intrinsics(self, camera: str, height: int, width: int) -> NDArray[np.float64]:
        """[3, 3] pixels, for the upright image."""
        return intrinsic_matrix(float(self._model.cam_fovy[self._camera_id(camera)]), height, width)

    def extrinsics_world(self, camera: str) -> NDArray[np.float64]:
        """[4, 4] camera-to-world, OpenCV axes, of the observed moment."""
        camera_id = self._camera_id(camera)
        return camera_pose(self._data.cam_xpos[camera_id], self._data.cam_xmat[camera_id])

    def geom_pose(self, geom_id: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(position [3], rotation [3, 3]) of a geom in the world, of the observed moment."""
        return self._data.geom_xpos[geom_id].copy(), self._data.geom_xmat[geom_id].reshape(3, 3).copy()

    def _camera_id(self, camera: str) -> int:
        return int(self._inner.sim.model.camera_name2id(camera))
