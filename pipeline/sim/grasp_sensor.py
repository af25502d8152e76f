"""What the gripper holds, read from a running scene after each control step (privileged; nothing is rendered).

Non-obvious:
- "Held" is robosuite's own rule, ``_check_grasp`` with the two WHOLE fingers as its groups: both touch the object.
  Its default, the finger pads alone, misses real grasps: a bowl's rim is often carried by one pad and the other
  finger's side (libero_spatial 5, initial state 0: lifted, carried and placed without both pads ever touching).
- ``_check_grasp`` looks up names contact by contact, 1 to 2 ms for the objects of a scene; here ids are looked up
  once an episode and all objects are answered together. The test compares the two at every step.
- A hard reset builds a new model, so ids hold for one episode: make a sensor after each ``reset``. It keeps no part
  of the simulation, which would stay in memory beside the next one.
- Contacts and poses are those of the last physics step, as LIBERO's own predicates read them at this moment.
- Fingers keep touching for some six control steps after the command to open: they take eight from end to end.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from geomcache.pipeline.sim.libero_env import LiberoEnv

_MOVES_AN_OBJECT = ("in", "on")  # goal predicates; the others are about drawers, doors and knobs
_FARTHEST = 1.0  # metres; nothing is looked for beyond


def task_targets(goal_state: Sequence[Sequence[str]], movable: Collection[str], instruction: str) -> tuple[str, ...]:
    """The movable objects that a task wants picked up and put somewhere, in the goal's order; may be none.

    They are what the goal's ``in`` and ``on`` predicates say of a movable object. A task that is done by pushing
    (libero_goal 5 alone among the public 130) has none, for its object need not be grasped.

    Args:
        goal_state: ``parsed_problem["goal_state"]`` of the simulator, such as ``[["on", "bowl_1", "plate_1"]]``.
        movable: names of the movable objects (the simulator's ``objects_dict``).
        instruction: the task in words.
    """
    if instruction.startswith("push "):
        return ()
    moved = [goal[1] for goal in goal_state if goal[0] in _MOVES_AN_OBJECT and goal[1] in movable]
    return tuple(dict.fromkeys(moved))


def goal_holds(env: LiberoEnv, goal_state: Sequence[Sequence[str]]) -> bool | None:
    """Whether another task's goal (suites.goal_state) holds now, by LIBERO's predicates; 0.1 to 0.5 ms a predicate.

    None where the scene has not everything that the goal is about.
    """
    simulator = env.simulator
    if not all(name in simulator.object_states_dict for _, *names in goal_state for name in names):
        return None
    return all(bool(simulator._eval_predicate(goal)) for goal in goal_state)


class GraspSensor:
    """Reads the scene of one episode; a later ``reset`` makes it invalid.

    Args:
        env: reset and settled.
    """

    def __init__(self, env: LiberoEnv) -> None:
        simulator = env.simulator
        self._simulator = simulator
        self.objects: tuple[str, ...] = tuple(simulator.objects_dict)  # N movable ones
        goals = simulator.parsed_problem["goal_state"]
        self.targets = task_targets(goals, self.objects, env.instruction)
        self.target_numbers = tuple(self.objects.index(name) for name in self.targets)
        self._goals = {name: [goal for goal in goals if goal[1] == name] for name in self.targets}
        self._bodies = [simulator.obj_body_id[name] for name in self.objects]
        geoms = simulator.sim.model._model.ngeom
        self._object_of_geom, self._side_of_geom = np.full(geoms, -1), np.full(geoms, -1)
        for number, name in enumerate(self.objects):
            self._object_of_geom[self._ids(simulator.objects_dict[name].contact_geoms)] = number
        parts = simulator.robots[0].gripper.important_geoms
        for side, finger in enumerate(("left_finger", "right_finger")):
            self._side_of_geom[self._ids(parts[finger])] = side
        self._pads = self._ids([*parts["left_fingerpad"], *parts["right_fingerpad"]])

    def held(self) -> NDArray[np.bool_]:
        """[N] whether both fingers touch the object, now."""
        pairs_C2 = self._simulator.sim.data._data.contact.geom
        side_C2, object_C2 = self._side_of_geom[pairs_C2], self._object_of_geom[pairs_C2][:, ::-1]
        is_touch_C2 = (side_C2 >= 0) & (object_C2 >= 0)
        touched_2N = np.zeros((2, len(self.objects)), dtype=bool)
        touched_2N[side_C2[is_touch_C2], object_C2[is_touch_C2]] = True
        return np.asarray(touched_2N.all(axis=0))

    def heights(self) -> NDArray[np.float64]:
        """[N] metres, world z of the objects' origins."""
        return np.array(self._simulator.sim.data._data.xpos[self._bodies, 2], dtype=np.float64)

    def at_goal(self, target: str) -> bool:
        """Whether LIBERO's own goal predicates about ``target`` hold; 0.1 to 0.5 ms."""
        return all(bool(self._simulator._eval_predicate(goal)) for goal in self._goals[target])

    def distance(self) -> float:
        """Metres from a finger pad to the surface of the nearest movable object, at most 1; negative inside; 0.2 ms."""
        import mujoco

        solid = np.flatnonzero(self._object_of_geom >= 0).tolist()
        model, data = self._simulator.sim.model._model, self._simulator.sim.data._data
        return min(
            float(mujoco.mj_geomDistance(model, data, pad, geom, _FARTHEST, None))
            for pad in self._pads
            for geom in solid
        )

    def _ids(self, names: Sequence[str]) -> list[int]:
        return [int(self._simulator.sim.model.geom_name2id(name)) for name in names]
