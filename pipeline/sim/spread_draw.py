"""Drawing the placements of the suites with spread in the real simulator; they are shipped, so users need not.

    python -m geomcache.pipeline.sim.spread_draw --suite libero_object_spread --tasks 0 1 --out FOLDER
    python -m geomcache.pipeline.sim.spread_draw --suite libero_object_spread --out FOLDER --join

The first draws what is still missing (one file a task in FOLDER, one line a placement; stop it at any time), the
second joins finished tasks into placements/SUITE.json and says which digest belongs into spread.py.

A candidate is kept when
- it settles as the shipped state that it was made from does, only elsewhere: after 10 settling steps every object
  stands where the shipped one stands plus the drawn shift, within 5 mm, and leans as that one within 5 degrees. So
  nothing collided, fell or tipped; a bowl that tips in the shipped state (libero_spatial task 5) still may. Where the
  scene has fixtures this must hold for the fixtures of five seeds.
- the scripted expert solves it without noise: LIBERO's predicate holds while the gripper is told to open, within the
  suite's horizon. In the choice suite it must do so for each of the six objects, and that is asked of evaluation
  states alone: the recorder keeps only what was solved anyway.

For the choice suite a "task" is a scene, and a state a layout of it.
"""

import argparse
import functools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.files import write_atomic
from geomcache.pipeline.sim import choice, scene_geometry, spread, spread_distribution, suites
from geomcache.pipeline.sim.expert import ScriptedExpert, read_goal
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.spread import Move, Placement, SpreadList, TaskSpread
from geomcache.pipeline.sim.spread_distribution import TaskRules, units

log = logging.getLogger(__name__)

DEMONSTRATIONS = {"libero_object_spread": 150, "libero_spatial_spread": 50, choice.SUITE: 20}
_MOST_MOVED = 0.005  # metres from where the shipped state's object would stand
_LEAST_COSINE = np.cos(np.deg2rad(5.0))  # of the angle between the two vertical axes
_FIXTURE_SEEDS = 4  # more seeds under which a scene with fixtures must settle


@dataclass(frozen=True)
class Settled:
    """Free objects after settling."""

    position_N3: NDArray[np.float64]  # metres, world
    up_N3: NDArray[np.float64]  # each body's own z axis in the world


class PlacementJudge:
    """Tries placements of one task; ``base`` is the public suite."""

    def __init__(self, suite: str, index: int) -> None:
        self._suite, self._index = suite, index
        base = spread.BASES[suite]
        self._env = LiberoEnv(base, index, cameras=("agentview",), height=16, width=16)
        self._env.reset(0, 0)
        simulator = self._env.simulator
        self.names = tuple(simulator.objects_dict)
        model = simulator.sim.model
        self.columns = tuple(
            1 + int(model.get_joint_qpos_addr(simulator.objects_dict[name].joints[-1])[0]) for name in self.names
        )
        self._has_fixtures = any(name in simulator.obj_body_id for name in simulator.fixtures_dict)
        self.shipped_ND = np.stack(
            [suites.init_state(base, index, i) for i in range(suites.task_info(base, index).n_init_states)]
        )
        self._target = read_goal(self._env).object_name
        rules: TaskRules = spread_distribution.task_rules(suite, index, self._target, self.names)
        self.moves = tuple(
            Move(
                objects=rule.objects,
                columns=tuple(self.columns[self.names.index(name)] for name in rule.objects),
                x=(units(rule.x[0]), units(rule.x[1])),
                y=(units(rule.y[0]), units(rule.y[1])),
                apart=units(rule.apart),
                why=rule.why,
            )
            for rule in rules.rules
        )
        self.moves_apart = units(rules.moves_apart)
        self._choosable = tuple(name for name in self.names if name != spread_distribution.BASKET)
        self._settled = functools.cache(self._settle_shipped)

    def draw(self, number: int) -> tuple[Placement, dict[str, int]]:
        """The first candidate for state ``number`` that is kept, and how many were refused for what."""
        refused = {"settling": 0, "expert": 0}
        for placement in spread_distribution.candidates(
            self._suite, self._index, number, self.moves, self.moves_apart, self.shipped_ND, self.columns
        ):
            if not self.settles(placement, number):
                refused["settling"] += 1
            elif not all(self.solved(placement, number, target) for target in self._targets(number)):
                refused["expert"] += 1
            else:
                return placement, refused
        raise AssertionError("candidates never end")

    def settles(self, placement: Placement, seed: int) -> bool:
        """Whether it settles as the shipped state does, under this seed's fixtures and some others'."""
        shifts_N3 = np.zeros((len(self.names), 3))
        for number, move in enumerate(self.moves):
            for name in move.objects:
                dx_dy = placement[1 + 2 * number : 3 + 2 * number]
                shifts_N3[self.names.index(name), :2] = np.array(dx_dy) / spread.UNITS_PER_METRE
        state = spread.moved_state(self.shipped_ND, self.moves, placement)
        for k in range(1 + _FIXTURE_SEEDS * self._has_fixtures):
            # without fixtures the seed changes nothing, so each shipped state is settled once
            fixtures = seed + 1000 * k if self._has_fixtures else 0
            shipped, own = self._settled(placement[0], fixtures), self._settle(state, fixtures)
            moved_N = np.linalg.norm(own.position_N3 - shipped.position_N3 - shifts_N3, axis=1)
            cosine_N = (own.up_N3 * shipped.up_N3).sum(axis=1)
            if moved_N.max() > _MOST_MOVED or cosine_N.min() < _LEAST_COSINE:
                return False
        return True

    def _targets(self, number: int) -> tuple[str, ...]:
        """The objects that the expert must be able to bring, each by itself."""
        if self._suite != choice.SUITE:
            return (self._target,)
        return self._choosable if number < spread.EVALUATION_STATES[self._suite] else ()

    def solved(self, placement: Placement, seed: int, target: str) -> bool:
        """Whether the scripted expert brings ``target`` where the task wants it, within the suite's horizon."""
        env = self._env
        env.reset(seed, spread.moved_state(self.shipped_ND, self.moves, placement), rebuild=False)
        relation, _, goal = env.simulator.parsed_problem["goal_state"][0]
        env.simulator.parsed_problem["goal_state"] = [[relation, target, goal]]  # what expert and predicate read
        for step, action in enumerate(ScriptedExpert(env).actions()):
            if step == env.horizon:
                return False
            if env.step(action) and action[-1] < 0.0:
                return True
        return False

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()

    def _settle_shipped(self, shipped: int, seed: int) -> Settled:
        return self._settle(self.shipped_ND[shipped], seed)

    def _settle(self, state_D: NDArray[np.float64], seed: int) -> Settled:
        self._env.reset(seed, state_D, rebuild=False)
        simulator = self._env.simulator
        rotations = [simulator.sim.data.body_xmat[simulator.obj_body_id[name]] for name in self.names]
        return Settled(
            np.stack([scene_geometry.object_position(simulator, name) for name in self.names]),
            np.reshape(rotations, (-1, 3, 3))[:, :, 2],
        )


def draw_task(suite: str, index: int, numbers: Sequence[int], out: Path) -> None:
    """Draw the placements among ``numbers`` that the task's file in ``out`` does not hold yet."""
    path = _part(out, suite, index)
    missing = [number for number in numbers if number not in drawn(path)]
    if not missing:
        return
    out.mkdir(parents=True, exist_ok=True)
    judge = PlacementJudge(suite, index)
    try:
        if not path.exists():
            head = TaskSpread(
                task=index,
                name=suites.task_info(spread.BASES[suite], index).name,
                moves=judge.moves,
                moves_apart=judge.moves_apart,
                evaluation=(),
                demonstrations=(),
            )
            write_atomic(path, head.model_dump_json() + "\n")
        _cut_torn_line(path)
        for number in missing:
            started = time.perf_counter()
            placement, refused = judge.draw(number)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"number": number, "placement": placement, "refused": refused}) + "\n")
            log.info("%s task %d state %d: %s %.1f s", suite, index, number, refused, time.perf_counter() - started)
    finally:
        judge.close()


def _cut_torn_line(path: Path) -> None:
    """What a kill cut short must not become part of the next line."""
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        write_atomic(path, content[: content.rfind(b"\n") + 1])


def drawn(path: Path) -> dict[int, Placement]:
    """State number -> placement, of a task's file; a line that a kill cut short does not count."""
    placements = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if path.exists() else ():
        if line.endswith("}\n") and line.startswith("{"):
            entry = json.loads(line)
            placements[int(entry["number"])] = tuple(entry["placement"])
    return placements


def join(suite: str, out: Path) -> SpreadList:
    """Join every task whose evaluation placements are complete; demonstrations count up to the first gap."""
    tasks, first = [], spread.EVALUATION_STATES[suite]
    for path in sorted(out.glob(f"{suite}_*.jsonl")):
        placements = drawn(path)
        if not all(number in placements for number in range(first)):
            log.warning("%s: %d placements, left out", path.name, len(placements))
            continue
        last = first
        while last in placements:
            last += 1
        head = TaskSpread.parse(path.read_text(encoding="utf-8").splitlines()[0], str(path), InputError)
        tasks.append(
            head.model_copy(
                update={
                    "evaluation": tuple(placements[i] for i in range(first)),
                    "demonstrations": tuple(placements[i] for i in range(first, last)),
                }
            )
        )
    return SpreadList(
        version=spread.VERSION,
        suite=suite,
        base=spread.BASES[suite],
        unit="0.1 mm",
        distribution=spread_distribution.IN_WORDS[suite],
        tasks=tuple(tasks),
    )


def one_line_a_task(joined: SpreadList) -> str:
    """The JSON that is shipped."""
    head = joined.model_copy(update={"tasks": ()}).model_dump_json()
    assert head.endswith('"tasks":[]}')
    tasks = ",\n".join(task.model_dump_json() for task in joined.tasks)
    return f"{head[:-2]}\n{tasks}\n]}}\n"


def _part(out: Path, suite: str, index: int) -> Path:
    return out / f"{suite}_{index:02d}.jsonl"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", choices=list(spread.BASES), required=True)
    parser.add_argument("--tasks", type=int, nargs="+", help="all if left out")
    parser.add_argument("--out", type=Path, required=True, help="folder of drawn placements")
    parser.add_argument("--evaluation-only", action="store_true", help="no demonstrations yet")
    parser.add_argument("--join", action="store_true", help="write placements/SUITE.json from what is drawn")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.join:
        joined = join(options.suite, options.out)
        write_atomic(Path(__file__).parent / "placements" / f"{options.suite}.json", one_line_a_task(joined))
        log.info("tasks %s; digest: %s", [task.task for task in joined.tasks], spread.digest_of(joined))
        return
    last = spread.EVALUATION_STATES[options.suite] + (0 if options.evaluation_only else DEMONSTRATIONS[options.suite])
    for index in options.tasks if options.tasks is not None else range(suites.task_count(options.suite)):
        draw_task(options.suite, index, range(last), options.out)


if __name__ == "__main__":
    main()
