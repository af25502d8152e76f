"""Suites with spread: LIBERO's own scenes with objects at other places, listed in files that are shipped.

A placement is one of the task's 50 shipped initial states with x and y of some objects shifted in the flat state:
``[shipped state, dx, dy of the first group, dx, dy of the second, ...]`` in tenths of a millimetre. The first numbers
are for evaluation, the others for demonstrations. How they were drawn and checked: docs/spread.md.

Non-obvious:
- On most shipped states of libero_object the target stands at one place (0.0 cm of spread in six of ten tasks), so a
  policy without eyes succeeds; that is why these suites exist.
- Only free objects stand in the flat state; fixtures are placed by the seed, here as in the shipped suites.
- Column c of the flat state is x and c + 1 is y of an object; time is column 0, so c = 1 + its joint's qpos address.
"""

import functools
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError, SourceDamaged, UnknownName
from geomcache.cache_schemas.fingerprint import digest_json
from geomcache.pipeline.sim import choice

# Suite with spread -> the public suite whose scenes and instructions it has.
BASES = {
    "libero_object_spread": "libero_object",
    "libero_spatial_spread": "libero_spatial",
    choice.SUITE: "libero_object",  # lists scenes instead of tasks
}
# Of the content of placements/<suite>.json; another list is another suite.
DIGESTS = {
    "libero_object_spread": "d100e24e7f225eb599c4c7defaf169d45e77684bb10b8d2db358919e2d7b69b2",
    choice.SUITE: "3402403330bae9f6e207d7b1eb460b853a8a33800a1d4fd92628062af76cb3ae",
    "libero_spatial_spread": "dc702e04759edbad403154eb882c043b2389e4bb04c0d452d2343711b85df2c2",
}
VERSION = 1
UNITS_PER_METRE = 10_000
# Placements for evaluation that a task (of the choice suite: a scene) has.
EVALUATION_STATES = {"libero_object_spread": 50, "libero_spatial_spread": 50, choice.SUITE: 4}

Placement = tuple[int, ...]


class Move(Schema):
    """Objects that are shifted together."""

    objects: tuple[str, ...]  # the simulator's names
    columns: tuple[int, ...]  # of each object's x in the flat state
    x: tuple[int, int]  # tenths of a millimetre: from, to; drawn uniformly
    y: tuple[int, int]
    apart: int  # least distance of centres to objects that stay where they are shipped
    why: str


class TaskSpread(Schema):
    """The placements of one task, or of one scene of the choice suite."""

    task: int  # whose shipped states and scene they are made from
    name: str  # LIBERO's name of the task
    moves: tuple[Move, ...]
    moves_apart: int  # least distance of centres between objects of different moves, tenths of a millimetre
    evaluation: tuple[Placement, ...]
    demonstrations: tuple[Placement, ...]

    def placement(self, number: int) -> Placement:
        """Of a state that evaluation (the first numbers) or demonstrations (the others) use."""
        return (*self.evaluation, *self.demonstrations)[number]

    def state(self, number: int, shipped_ND: NDArray[np.float64]) -> NDArray[np.float64]:
        """Flat state [D] of a placement, from the task's shipped states [N, D]."""
        return moved_state(shipped_ND, self.moves, self.placement(number))


class SpreadList(Schema):
    """What placements/<suite>.json holds."""

    version: int
    suite: str
    base: str
    unit: str
    distribution: str  # in words
    tasks: tuple[TaskSpread, ...]


def moved_state(shipped_ND: NDArray[np.float64], moves: tuple[Move, ...], placement: Placement) -> NDArray[np.float64]:
    """Flat state [D]: the shipped one of the placement with its objects shifted."""
    state = np.array(shipped_ND[placement[0]], dtype=np.float64)
    shifts_M2 = np.reshape(placement[1:], (len(moves), 2)) / UNITS_PER_METRE
    for move, shift_2 in zip(moves, shifts_M2, strict=True):
        for column in move.columns:
            state[column : column + 2] += shift_2
    return state


@functools.cache
def task_spread(suite: str, index: int) -> TaskSpread:
    """The placements of task ``index`` of a suite with spread; ``UnknownName`` while none are listed."""
    for task in _read(suite).tasks:
        if task.task == index:
            return task
    raise UnknownName(
        f"no placements are listed for {suite} task {index}",
        expected=f"a task that {_file(suite)} lists",
        found="tasks " + (", ".join(str(task.task) for task in _read(suite).tasks) or "none"),
        fix=f"choose one of these; in a clone, draw them: python -m geomcache.pipeline.sim.spread_draw --suite {suite} "
        f"--tasks {index} --out FOLDER, then the same with --join (docs/spread.md)",
    )


def digest_for(suite: str, index: int) -> str:
    """SHA-256 of the placements of a task; in the choice suite, whose tasks are in several scenes, of all."""
    if suite == choice.SUITE:
        return DIGESTS[suite]
    return digest_json(task_spread(suite, index).model_dump(mode="json"))


@functools.cache
def _read(suite: str) -> SpreadList:
    text = resources.files("geomcache.pipeline.sim").joinpath(_file(suite)).read_text(encoding="utf-8")
    return parse(suite, text, DIGESTS[suite])


def parse(suite: str, text: str, wanted_digest: str) -> SpreadList:
    """Read a list of placements and check that it is the one that is known by its digest.

    Raises:
        SourceDamaged: it is no list of placements, or not that of ``suite``.
        InputError: it was changed.
    """
    found = SpreadList.parse(text, _file(suite), SourceDamaged)
    if (found.suite, found.version) != (suite, VERSION):
        raise SourceDamaged(
            f"{_file(suite)} is another list",
            expected=f"{suite}, version {VERSION}",
            found=f"{found.suite}, version {found.version}",
            fix="install geomcache again",
        )
    digest = digest_of(found)
    if digest != wanted_digest:
        raise InputError(
            f"the placements in {_file(suite)} were changed, so results on them could not be compared with others",
            expected=f"digest {wanted_digest}",
            found=f"digest {digest}",
            fix="install geomcache again; a list of your own needs its digest in pipeline/sim/spread.py",
        )
    return found


def digest_of(spread_list: SpreadList) -> str:
    """SHA-256 of the content, whatever the file's layout."""
    return digest_json(spread_list.model_dump(mode="json"))


def _file(suite: str) -> str:
    return f"placements/{suite}.json"
