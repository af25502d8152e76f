"""A scripted expert for pick-and-place tasks, given privileged state; nothing is rendered.

It is made for goals of one object ``in`` a container or ``on`` a support, with an object that fits between the
fingers or has a rim (libero_object, libero_spatial). Whether a task succeeded is LIBERO's own predicate's word.

Non-obvious:
- Full scale of an action is 0.05 m and 0.5 rad; the servo's gains are in action units per metre and radian.
- The hand's nominal orientation is diag(1, -1, -1) in the world; its fingers close along the world's y.
- ``On`` needs contact and the two bodies' origins within 3 cm, so the object, not the hand, is centred.
- Objects can move by themselves after settling: the bowl that libero_spatial places on a ramekin tips off it.
- Demonstrations of this expert are narrow (one style, short paths): they are not LIBERO's own demonstrations.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.sim import expert_plan, scene_geometry
from geomcache.pipeline.sim.expert_plan import Grasp
from geomcache.pipeline.sim.libero_env import LiberoEnv

Action = NDArray[np.float64]  # [7]

OPEN, CLOSE = -1.0, 1.0
POSITION_GAIN, POSITION_CLIP = 12.0, 0.6
ROTATION_GAIN, ROTATION_CLIP = 1.5, 0.4

_HOVER_TOLERANCE, _DESCEND_TOLERANCE = 0.02, 0.004
_CARRY_TOLERANCE, _LOWER_TOLERANCE = 0.015, 0.01
_HOVER_STEPS, _DESCEND_STEPS, _LIFT_STEPS, _CARRY_STEPS, _LOWER_STEPS = 60, 30, 40, 80, 40
_CLOSE_STEPS, _RIM_CLOSE_STEPS, _REOPEN_STEPS, _RELEASE_STEPS, _RETREAT_STEPS = 10, 14, 4, 15, 15
_ALIGN_TOLERANCE = 0.08  # radians of the hand before it descends
_LIFTED = 0.03  # metres that prove a grasp
_DROPPED = 0.01  # metres that prove a release
_RETREAT = 0.08
_STALL_DISTANCE, _INTEGRAL_GAIN = 0.03, 0.1  # near its target the arm sticks (joint friction): push on
_MOST_TRIES = 3
_MOST_PLANS = 3  # for one try
_MOVED = 0.01  # metres of any point of the object


@dataclass(frozen=True)
class Goal:
    """What must end up where."""

    object_name: str
    target_name: str  # the object or fixture that receives it
    site_name: str | None  # the region of it, if the goal names one
    into: bool


def read_goal(env: LiberoEnv) -> Goal:
    """The task's goal, if the expert understands it; otherwise ``InputError``."""
    simulator = env.simulator
    goals = simulator.parsed_problem["goal_state"]
    usable = len(goals) == 1 and len(goals[0]) == 3 and goals[0][0] in ("in", "on")
    if usable and goals[0][1] in simulator.objects_dict:
        relation, moved, target = goals[0]
        site = simulator.object_sites_dict.get(target)
        parent = target if site is None else site.parent_name
        if parent in simulator.obj_body_id:
            return Goal(moved, parent, None if site is None else target, into=relation == "in")
    raise InputError(
        f"the scripted expert cannot do {env.task.suite} task {env.task.index} ({env.instruction})",
        expected="one goal: an object in a container or on a support",
        found=str(goals),
        fix="record libero_object or libero_spatial, or use LIBERO's own demonstrations",
    )


class ScriptedExpert:
    """Closed-loop: every action is computed from the simulator's present state.

    Use it as ``for action in ScriptedExpert(env).actions(): env.step(action)``; whoever executes may add noise
    and stops at success. A run of ``actions`` ends by itself when the expert is done or gives up.
    """

    def __init__(self, env: LiberoEnv) -> None:
        self._env = env
        self._goal = read_goal(env)
        self._yaw = 0.0

    def actions(self) -> Iterator[Action]:
        """Yield clean actions [7]; each must be executed before the next is asked for."""
        for _ in range(_MOST_TRIES):
            grasp = yield from self._approach()
            start_z = self._object_position()[2]
            yield from self._pick(grasp)
            if self._object_position()[2] - start_z >= _LIFTED:
                yield from self._place(grasp)
                if self._env.success():
                    return
            yield from self._hold(OPEN, _REOPEN_STEPS)

    def _plan(self) -> Grasp:
        simulator = self._env.simulator
        goal = self._goal
        others = [name for name in scene_geometry.object_names(simulator) if name != goal.object_name]
        obstacles = [scene_geometry.solid_points(simulator, name) for name in others]
        return expert_plan.plan_grasp(
            scene_geometry.object_vertices(simulator, goal.object_name),
            np.concatenate(obstacles),
            self._env.robot_base_pose()[:2, 3],
        )

    def _approach(self) -> Generator[Action, None, Grasp]:
        """Plan and go over the object; one that has moved meanwhile (a bowl that tips over) is planned for again."""
        for _ in range(_MOST_PLANS):
            grasp, seen = self._plan(), self._vertices()
            yield from self._hover(grasp)
            if np.abs(self._vertices() - seen).max() < _MOVED:
                break
        return grasp

    def _hover(self, grasp: Grasp) -> Iterator[Action]:
        self._yaw = grasp.yaw
        above = np.array([*grasp.entry_3[:2], grasp.top + expert_plan.HOVER_OVER_TOP])
        yield from self._go(lambda: above, OPEN, _HOVER_TOLERANCE, _HOVER_STEPS, aligned=True)

    def _pick(self, grasp: Grasp) -> Iterator[Action]:
        yield from self._go(lambda: grasp.entry_3, OPEN, _DESCEND_TOLERANCE, _DESCEND_STEPS)
        for _ in range(_RIM_CLOSE_STEPS if grasp.is_rim else _CLOSE_STEPS):
            error = grasp.point_3 - self._hand()
            if not grasp.is_rim:
                error[:2] = 0.0  # a box between the fingers is free to choose the middle
            yield _action(error, self._turn_error(), CLOSE)
        lifted = grasp.point_3.copy()
        lifted[2] = expert_plan.carry_height(grasp, self._target_top())
        yield from self._go(lambda: lifted, CLOSE, _HOVER_TOLERANCE, _LIFT_STEPS)

    def _place(self, grasp: Grasp) -> Iterator[Action]:
        top = self._target_top()
        carry_z = expert_plan.carry_height(grasp, top)
        release_z = expert_plan.release_height(grasp, top, into=self._goal.into)
        yield from self._go(lambda: self._over_target(carry_z), CLOSE, _CARRY_TOLERANCE, _CARRY_STEPS)
        yield from self._go(lambda: self._over_target(release_z), CLOSE, _LOWER_TOLERANCE, _LOWER_STEPS)
        yield from self._release(grasp)
        up = self._hand() + np.array([0.0, 0.0, _RETREAT])
        yield from self._go(lambda: up, OPEN, _LOWER_TOLERANCE, _RETREAT_STEPS)

    def _release(self, grasp: Grasp) -> Iterator[Action]:
        """Open; a carton can stick to one finger, so the hand stays centred on it until it has dropped."""
        held_z = self._object_position()[2]
        offset, z = self._hand()[:2] - self._object_position()[:2], self._hand()[2]
        for _ in range(_RELEASE_STEPS):
            error = np.zeros(3)
            if not grasp.is_rim and held_z - self._object_position()[2] < _DROPPED:
                error = np.array([*(self._object_position()[:2] + offset), z]) - self._hand()
            yield _action(error, self._turn_error(), OPEN)

    def _over_target(self, z: float) -> NDArray[np.float64]:
        """Where the hand must be so that the held OBJECT is centred over the target."""
        offset = self._hand()[:2] - self._object_position()[:2]
        return np.array([*(self._target_xy() + offset), z])

    def _target_xy(self) -> NDArray[np.float64]:
        simulator = self._env.simulator
        if self._goal.site_name is not None:
            return np.array(simulator.sim.data.get_site_xpos(self._goal.site_name)[:2], dtype=np.float64)
        return scene_geometry.object_position(simulator, self._goal.target_name)[:2]

    def _target_top(self) -> float:
        simulator = self._env.simulator
        if self._goal.site_name is not None and not self._goal.into:
            return float(simulator.sim.data.get_site_xpos(self._goal.site_name)[2])
        vertices = scene_geometry.object_vertices(simulator, self._goal.target_name)
        return float(scene_geometry.bounds(vertices).high_3[2])

    def _vertices(self) -> NDArray[np.float64]:
        return scene_geometry.object_vertices(self._env.simulator, self._goal.object_name)

    def _object_position(self) -> NDArray[np.float64]:
        return scene_geometry.object_position(self._env.simulator, self._goal.object_name)

    def _hand(self) -> NDArray[np.float64]:
        return self._env.proprioception().ee_pos_3

    def _go(
        self,
        target: Callable[[], NDArray[np.float64]],
        gripper: float,
        tolerance: float,
        most_steps: int,
        *,
        aligned: bool = False,
    ) -> Iterator[Action]:
        pushed = np.zeros(3)
        for _ in range(most_steps):
            error = target() - self._hand()
            turn = self._turn_error()
            if np.linalg.norm(error) < tolerance and (not aligned or np.linalg.norm(turn) < _ALIGN_TOLERANCE):
                return
            if np.linalg.norm(error) < _STALL_DISTANCE:
                pushed = np.clip(pushed + _INTEGRAL_GAIN * error, -_STALL_DISTANCE, _STALL_DISTANCE)
            yield _action(error + pushed, turn, gripper)

    def _hold(self, gripper: float, steps: int) -> Iterator[Action]:
        for _ in range(steps):
            yield _action(np.zeros(3), self._turn_error(), gripper)

    def _turn_error(self) -> NDArray[np.float64]:
        """[3] axis-angle in the world that turns the hand to its wanted orientation."""
        c, s = np.cos(self._yaw), np.sin(self._yaw)
        wanted = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ np.diag([1.0, -1.0, -1.0])
        return rotation_vector(wanted @ rotation_matrix(self._env.proprioception().ee_quat_xyzw).T)


def _action(error_3: NDArray[np.float64], turn_3: NDArray[np.float64], gripper: float) -> Action:
    move = np.clip(POSITION_GAIN * error_3, -POSITION_CLIP, POSITION_CLIP)
    turn = np.clip(ROTATION_GAIN * turn_3, -ROTATION_CLIP, ROTATION_CLIP)
    return np.concatenate([move, turn, [gripper]])


def rotation_matrix(quaternion_xyzw: NDArray[np.float64]) -> NDArray[np.float64]:
    """[3, 3] rotation of a unit quaternion."""
    x, y, z, w = quaternion_xyzw
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_vector(rotation_33: NDArray[np.float64]) -> NDArray[np.float64]:
    """[3] axis times angle (0..pi) of a rotation; exact enough for control, unstable only at exactly pi."""
    skew = np.array(
        [
            rotation_33[2, 1] - rotation_33[1, 2],
            rotation_33[0, 2] - rotation_33[2, 0],
            rotation_33[1, 0] - rotation_33[0, 1],
        ]
    )
    sine, cosine = np.linalg.norm(skew) / 2.0, (np.trace(rotation_33) - 1.0) / 2.0
    if sine < 1e-9:
        return np.zeros(3)
    return np.asarray(skew / (2.0 * sine) * np.arctan2(sine, cosine), dtype=np.float64)
