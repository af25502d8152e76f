"""One task of real LIBERO, with lazy rendering.

Non-obvious:
- ``observe()`` returns, bit for bit, what ``OffScreenRenderEnv.step`` would have returned at that step, although
  nothing is rendered before it is called (see observed_moment.py); rendering does not change the dynamics.
- The flat state does not hold the whole scene: fixtures without joints are placed anew at every ``reset()`` from
  numpy's GLOBAL generator. So every episode is seeded, and the caller's generator is put back afterwards.
- LIBERO's own reset neither repeats itself nor lets errors out; see scene_reset.py.
- ``step``'s ``done`` is the goal predicate, not the end of time; robosuite's own step limit is switched off.
- robosuite's ``quat2axisangle`` clips its argument in place; see camera_geometry.axis_angle.
- An EGL context does not survive a fork: the simulator is made in the process that first resets it.
- ``mj_saveLastXML`` (``model_xml``) writes the XML compiled last in this process, so it is read right after reset.
"""

import atexit
import gc
import os
import sys
import traceback
import weakref
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import ACTION_DIM, CameraContract, Contract
from geomcache.cache_schemas.errors import InputError, UnknownName
from geomcache.pipeline.camera_geometry import axis_angle, inverse_pose, metric_depth, pose
from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.pipeline.orientation import to_upright
from geomcache.pipeline.sim import choice, suites
from geomcache.pipeline.sim.camera_orbit import turn_agentview
from geomcache.pipeline.sim.observed_moment import ObservedMoment
from geomcache.pipeline.sim.scene_reset import callers_random_state, reset_inner
from geomcache.pipeline.sim.system import missing_part_named, quiet_simulator, require_simulator

# Stand still with the gripper open; the settling action of OpenVLA, openpi and LeRobot.
SETTLE_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
SETTLE_ACTION.setflags(write=False)

_open_environments: "weakref.WeakSet[LiberoEnv]" = weakref.WeakSet()


@dataclass(frozen=True)
class RawCamera:
    """One view as the simulator gives it; rows run BOTTOM-UP, matrices are for the upright image."""

    rgb_HWC: NDArray[np.uint8]  # [H, W, 3]
    zbuffer_HW: NDArray[np.float32]  # [H, W] in 0..1
    intrinsics_33: NDArray[np.float64]  # pixels
    extrinsics_world_44: NDArray[np.float64]  # camera-to-world, metres, OpenCV axes


@dataclass(frozen=True)
class Proprioception:
    """The robot's own sensors at the observed moment, float64."""

    ee_pos_3: NDArray[np.float64]  # metres, world
    ee_quat_xyzw: NDArray[np.float64]  # [4]
    gripper_qpos_2: NDArray[np.float64]  # metres, one per finger
    joint_pos_7: NDArray[np.float64]  # radians

    @property
    def ee_axis_angle_3(self) -> NDArray[np.float64]:
        """Radians."""
        return axis_angle(self.ee_quat_xyzw)

    @property
    def state_S(self) -> NDArray[np.float32]:
        """[8] in the layout of Contract.state_layout."""
        return np.concatenate([self.ee_pos_3, self.ee_axis_angle_3, self.gripper_qpos_2]).astype(np.float32)


class LiberoEnv:
    """One task in the real simulator; ``step`` moves, ``observe`` renders."""

    _env: Any = None  # set here too, so that a constructor that raised can be closed

    def __init__(
        self,
        suite: str,
        task_index: int,
        *,
        cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand"),
        height: int = 128,
        width: int = 128,
        depth: bool = True,
    ) -> None:
        require_simulator()
        self._task = suites.task_info(suite, task_index)
        if not cameras or len(set(cameras)) != len(cameras) or height < 1 or width < 1:
            raise InputError(
                "the cameras of the simulator cannot be used",
                expected="at least one camera, none twice, with a positive height and width",
                found=f"cameras {cameras}, {height} x {width}",
                fix="name different cameras, for example agentview robot0_eye_in_hand",
            )
        self._depth = depth
        self._contract = Contract(
            image_orientation="upright",
            cameras=tuple(CameraContract(name=name, height=height, width=width) for name in cameras),
            has_depth=depth,
        )
        self._env: Any = None
        self._scene_bddl: str | None = None
        self._moment: ObservedMoment | None = None
        self._process = -1
        self._is_reset = False
        self._is_nominal = False  # a reset built the model, and no camera was turned since

    @property
    def contract(self) -> Contract:
        """The conventions of what ``observe`` returns."""
        return self._contract

    @property
    def task(self) -> suites.TaskInfo:
        """Suite, index, name, instruction and files of the task."""
        return self._task

    @property
    def instruction(self) -> str:
        """What the policy is told."""
        return self._task.instruction

    @property
    def scene_bddl(self) -> str | None:
        """BDDL text of this episode's scene where it is not the task's own file (libero_object_choice)."""
        return self._scene_bddl

    @property
    def horizon(self) -> int:
        """The most control steps of an evaluation episode, settling not counted."""
        return suites.horizon(self._task.suite)

    def reset(
        self,
        seed: int,
        init_state: int | NDArray[np.float64],
        settle_steps: int = 10,
        *,
        agentview_orbit: float = 0.0,
        rebuild: bool = True,
    ) -> None:
        """Start an episode: place the fixtures by ``seed``, set the flat state, let the scene settle.

        Args:
            seed: of the fixtures' placement; the caller's numpy generator is left as it was.
            init_state: the number of an initial state of the suite, or a flat state [1 + nq + nv] of the task's scene.
            settle_steps: how many SETTLE_ACTIONs to execute.
            agentview_orbit: degrees by which the agent-view camera is turned about the workspace (camera_orbit.py) in
                this episode; pictures, depth and matrices agree. The wrist camera is untouched.
            rebuild: compile the model anew, as LIBERO does. Without it the states are the same and 1.4 s are saved, but
                only a plan that is not rendered may do so (scene_reset.py).
        """
        if isinstance(init_state, (int, np.integer)):
            state = suites.init_state(self._task.suite, self._task.index, int(init_state))
            scene = suites.scene_bddl(self._task.suite, self._task.index, int(init_state))
        else:
            state, scene = np.asarray(init_state, dtype=np.float64), None
        with callers_random_state():
            env = self._made(scene)
            assert self._moment is not None
            numbers = env.get_sim_state().size
            if state.shape != (numbers,):
                raise InputError(
                    f"the initial state does not fit {self._task.suite} task {self._task.index}",
                    expected=f"{numbers} numbers (time, positions, velocities)",
                    found=f"shape {state.shape}",
                    fix="use a state recorded from this task",
                )
            rebuild = rebuild or not self._is_nominal
            self._is_reset = self._is_nominal = False
            self._moment.forget()
            # The old simulation is freed inside reset, in whichever GL context is current.
            env.sim._render_context_offscreen.gl_ctx.make_current()
            env.seed(seed)
            with quiet_simulator():
                reset_inner(env.env, rebuild=rebuild)
            if agentview_orbit != 0.0:
                turn_agentview(env.env, agentview_orbit)
            self._is_nominal = agentview_orbit == 0.0
            env.set_init_state(state)
            self._is_reset = True
            for _ in range(settle_steps):
                self.step(SETTLE_ACTION)

    def step(self, action_A: NDArray[np.floating]) -> bool:
        """Execute one action [7] (see Contract.action_layout) without rendering; True when the goal holds."""
        env = self._running()
        action = np.asarray(action_A, dtype=np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise InputError(
                "the action cannot be executed",
                expected=f"{ACTION_DIM} finite numbers",
                found=f"shape {action.shape}, {action}",
                fix="give xyz, axis-angle and gripper in [-1, 1]",
            )
        _, _, success, _ = env.step(action)
        return bool(success)

    def success(self) -> bool:
        """LIBERO's own goal predicate, now."""
        return bool(self._running().check_success())

    def observe(self) -> Observation:
        """Render what LIBERO's own observation of the latest step (or reset) shows; B = 1, upright.

        Images [1, V, H, W, 3] uint8; with depth also metres [1, V, H, W], intrinsics [1, V, 3, 3] and
        camera-to-robot-base extrinsics [1, V, 4, 4].
        """
        views = [self.raw_camera(name) for name in self._contract.camera_names]
        images = np.stack([to_upright(view.rgb_HWC, "bottom_up", row_axis=0) for view in views])[None]
        frame = FrameBatch(images)
        if self._depth:
            near, far = self.depth_range()
            depth = [metric_depth(to_upright(v.zbuffer_HW, "bottom_up", row_axis=0), near, far) for v in views]
            base_from_world = inverse_pose(self.robot_base_pose())
            frame = FrameBatch(
                images,
                np.stack(depth)[None],
                np.stack([view.intrinsics_33 for view in views])[None],
                np.stack([base_from_world @ view.extrinsics_world_44 for view in views])[None],
            )
        return Observation(frame, self.proprioception().state_S, self.instruction)

    def raw_camera(self, camera: str, size: tuple[int, int] | None = None) -> RawCamera:
        """Render one view of the contract, as the simulator gives it; ``size`` (H, W) instead of the contract's."""
        self._running()
        assert self._moment is not None
        height, width = size or self._size(camera)
        rgb, zbuffer = self._moment.render(camera, height, width)
        return RawCamera(
            rgb,
            zbuffer,
            self._moment.intrinsics(camera, height, width),
            self._moment.extrinsics_world(camera),
        )

    def segment(self, camera: str) -> NDArray[np.int32]:
        """[H, W] geom id of every pixel of one view, -1 for none; upright."""
        self._running()
        assert self._moment is not None
        return to_upright(self._moment.segment(camera, *self._size(camera)), "bottom_up", row_axis=0)

    def observed_geom_pose(self, geom_id: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(position [3], rotation [3, 3]) of a geom in the world at the observed moment."""
        self._running()
        assert self._moment is not None
        return self._moment.geom_pose(geom_id)

    def proprioception(self) -> Proprioception:
        """The robot's sensors, as LIBERO's own observation holds them."""
        observables = self._running().env._observables

        def read(name: str) -> NDArray[np.float64]:
            return np.array(observables[f"robot0_{name}"].obs, dtype=np.float64)

        return Proprioception(read("eef_pos"), read("eef_quat"), read("gripper_qpos"), read("joint_pos"))

    def flat_state(self) -> NDArray[np.float64]:
        """MuJoCo's flat state [1 + nq + nv] now (time, positions, velocities)."""
        return np.array(self._running().get_sim_state(), dtype=np.float64)

    def depth_range(self) -> tuple[float, float]:
        """(near, far) clipping planes in metres; what the z-buffer is measured between."""
        model = self._running().sim.model
        extent = float(model.stat.extent)
        return float(model.vis.map.znear) * extent, float(model.vis.map.zfar) * extent

    def robot_base_pose(self) -> NDArray[np.float64]:
        """[4, 4] robot-base-to-world; the base does not move."""
        data = self._running().sim.data
        return pose(data.get_body_xpos("robot0_base"), data.get_body_xmat("robot0_base"))

    def model_xml(self) -> str:
        """The MJCF of this episode's scene, with the fixtures where they were placed."""
        env = self._running()
        with quiet_simulator():  # robosuite leaves the temporary file to the garbage collector
            return str(env.sim.model.get_xml())

    @property
    def simulator(self) -> Any:
        """The inner robosuite environment (privileged); stale after every reset, so never keep its parts."""
        return self._running().env

    def close(self) -> None:
        """Free the simulator; a later ``reset`` makes a new one."""
        env, self._env, self._is_reset = self._env, None, False
        if env is None or self._process != os.getpid():
            return
        if self._moment is not None:
            self._moment.forget()
            self._moment = None
        context = getattr(env.sim, "_render_context_offscreen", None)  # none when Ctrl-C came while it was being made
        if context is not None:
            context.gl_ctx.make_current()
            env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Freed by the garbage collector alone, the renderer would be freed in another's GL context.
        self.close()

    def _size(self, camera: str) -> tuple[int, int]:
        for known in self._contract.cameras:
            if known.name == camera:
                return known.height, known.width
        raise UnknownName(
            f"this simulator was not given a camera {camera!r}",
            expected=f"one of {', '.join(self._contract.camera_names)}",
            found=repr(camera),
            fix="name it in LiberoEnv(cameras=...)",
        )

    def _running(self) -> Any:
        assert self._is_reset, "call reset() first"
        assert self._process == os.getpid(), "a simulator cannot be used after a fork; make it in the child"
        return self._env

    def _made(self, scene_bddl: str | None) -> Any:
        """The environment of a scene; another one's is closed. LIBERO reads the file while it is made only."""
        if self._env is not None:
            assert self._process == os.getpid(), "a simulator cannot be used after a fork; make it in the child"
            if self._scene_bddl == scene_bddl:
                return self._env
            self.close()
        with missing_part_named(), quiet_simulator(), choice.bddl_file(self._task.bddl_path, scene_bddl) as path:
            from libero.libero.envs.env_wrapper import ControlEnv

            try:
                env = ControlEnv(
                    bddl_file_name=str(path),
                    use_camera_obs=False,
                    has_offscreen_renderer=True,
                    ignore_done=True,
                )
            except RuntimeError as problem:  # of the GL context; the scene itself raises other errors
                said = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
                _free_quietly(problem)
                raise InputError(
                    "the simulator cannot render",
                    expected="a GL context on this machine",
                    found=said,
                    fix="unset MUJOCO_EGL_DEVICE_ID, or try MUJOCO_GL=osmesa (slower, needs no driver)",
                ) from None
        try:
            self._require_cameras(env)
        except UnknownName:
            env.close()
            raise
        self._env, self._moment, self._process, self._is_nominal = env, ObservedMoment(env.env), os.getpid(), False
        self._scene_bddl = scene_bddl
        if not _open_environments:
            # Registered after robosuite's own exit hook and so run before it: freeing later is an EGLError.
            atexit.unregister(_close_all)
            atexit.register(_close_all)
        _open_environments.add(self)
        return env

    def _require_cameras(self, env: Any) -> None:
        model = env.sim.model
        known = [model.camera_id2name(i) for i in range(model.ncam)]
        for camera in self._contract.camera_names:
            if camera not in known:
                raise UnknownName(
                    f"the scene has no camera {camera!r}",
                    expected=f"one of {', '.join(known)}",
                    found=repr(camera),
                    fix="choose one of these names",
                )


def _close_all() -> None:
    for env in list(_open_environments):
        env.close()


def _free_quietly(problem: Exception) -> None:
    """Free what was half made; robosuite's finalisers complain about it with tracebacks that say nothing new."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(problem.__traceback__)
        gc.collect()
    finally:
        sys.unraisablehook = hook
