"""What moves in each task of the suites with spread, how far, and the keyed draws: pure, no simulator.

The distribution is over candidates; spread_draw.py keeps those that settle as the shipped state does and that the
scripted expert solves.

Non-obvious:
- A sentence that says where the object is ("between the plate and the ramekin") must stay true. So what it relates
  moves as one, and what rests on a fixture moves only as far as it stays on it.
- In the choice suite a scene's objects are dealt out to the places where they are shipped, any object to any place, and
  then shifted by a little; heights and turns are each object's own, for all stand on one floor.
- A candidate is decided by (suite, task, number, how many were refused before it) alone, so any part of a list can be
  drawn by itself, in any order.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomcache.pipeline.sim import choice
from geomcache.pipeline.sim.spread import UNITS_PER_METRE, Move, Placement

BOWL, OTHER_BOWL = "akita_black_bowl_1", "akita_black_bowl_2"
COOKIES, RAMEKIN, PLATE, BASKET = "cookies_1", "glazed_rim_porcelain_ramekin_1", "plate_1", "basket_1"


@dataclass(frozen=True)
class Rule:
    """Objects that are shifted by one draw."""

    objects: tuple[str, ...]
    x: tuple[float, float]  # cm from, to; uniform
    y: tuple[float, float]
    apart: float  # cm between centres, to objects that stay
    why: str


@dataclass(frozen=True)
class TaskRules:
    """Of one task."""

    rules: tuple[Rule, ...]
    moves_apart: float  # cm between centres of objects of different rules


# Centres 13 cm apart: a bowl (11 cm across) and the plate (14 cm) just do not touch.
_SPATIAL_APART = 13.0


def _plate(x: tuple[float, float], y: tuple[float, float]) -> Rule:
    return Rule((PLATE,), x, y, _SPATIAL_APART, "the goal moves by itself: the sentence does not place it")


def _spatial(objects: tuple[str, ...], x: tuple[float, float], y: tuple[float, float], why: str) -> Rule:
    return Rule(objects, x, y, _SPATIAL_APART, why)


_SPATIAL: dict[int, tuple[Rule, ...]] = {
    0: (
        _spatial(
            (BOWL, OTHER_BOWL, COOKIES, RAMEKIN, PLATE),
            (-5.0, 5.0),
            (-7.0, 5.0),
            "the bowl stays between the plate and the ramekin; they fill the table, so everything on it moves as one",
        ),
    ),
    1: (
        _spatial((BOWL, RAMEKIN), (-5.0, 7.0), (-6.0, 3.0), "the bowl stays next to the ramekin"),
        _plate((-4.0, 4.0), (-6.0, 3.0)),
    ),
    2: (
        _spatial((BOWL,), (-4.0, 4.0), (-4.0, 5.0), "the bowl stays at the table's centre"),
        _plate((-5.0, 4.0), (-5.0, 5.0)),
    ),
    3: (
        _spatial((BOWL, COOKIES), (-7.0, 5.0), (-5.0, 4.0), "the bowl stays on the cookie box"),
        _plate((-6.0, 4.0), (-2.0, 8.0)),
    ),
    # the bowl stays where it was shipped in the drawer, which holds it on all sides
    4: (_plate((-8.0, 4.0), (-5.0, 8.0)),),
    5: (
        _spatial((BOWL, RAMEKIN), (-5.0, 6.0), (-6.0, 5.0), "the bowl stays on the ramekin"),
        _plate((-5.0, 4.0), (-5.0, 8.0)),
    ),
    6: (
        _spatial((BOWL, COOKIES), (-6.0, 3.0), (-1.0, 6.0), "the bowl stays next to the cookie box"),
        _plate((-6.0, 4.0), (0.0, 8.0)),
    ),
    7: (
        _spatial((BOWL,), (-2.0, 2.0), (-2.0, 2.0), "the bowl stays on the stove"),
        _plate((-8.0, 4.0), (-6.0, 8.0)),
    ),
    8: (_spatial((BOWL, PLATE), (-6.0, 5.0), (-7.0, 4.0), "the bowl stays next to the plate"),),
    9: (
        _spatial((BOWL,), (-4.0, 4.0), (-3.0, 3.0), "the bowl stays on the cabinet"),
        _plate((-8.0, 4.0), (-6.0, 8.0)),
    ),
}

IN_WORDS = {
    "libero_object_spread": (
        "one of the 50 shipped states, uniformly; the object to pick up shifted by up to 8 cm in x and 7 cm in y, the "
        "basket by up to 4 and 3 cm, uniformly; refused when centres are nearer than 10 cm (object to any other), "
        "15 cm (basket to any other) or 20 cm (object to basket), when the scene does not settle as the shipped state "
        "does (within 5 mm and 5 degrees), or when the scripted expert does not solve it within the horizon"
    ),
    "libero_spatial_spread": (
        "one of the 50 shipped states, uniformly; each group of `moves` shifted uniformly within its own limits; "
        "refused when centres of objects that move differently are nearer than 13 cm, when the scene does not settle "
        "as the shipped state does (within 5 mm and 5 degrees, with the fixtures of five seeds), or when the scripted "
        "expert does not solve it within the horizon"
    ),
    choice.SUITE: (
        "by scene: one of the 50 shipped states, uniformly; the six objects dealt out to their six places, any order "
        "alike, then each and the basket shifted by up to 2 cm in x and y, uniformly; refused when centres are nearer "
        "than 10 cm, when the scene does not settle as it was placed (within 5 mm and 5 degrees), or, for evaluation, "
        "when the scripted expert does not solve it within the horizon for each of the six objects"
    ),
}


def task_rules(suite: str, index: int, target: str, objects: Sequence[str]) -> TaskRules:
    """What moves in a task whose object to pick up is ``target``, in a scene of ``objects``."""
    if suite == "libero_spatial_spread":
        return TaskRules(_SPATIAL[index], _SPATIAL_APART)
    if suite == choice.SUITE:
        shift = (-2.0, 2.0)
        why = {name: "the goal" if name == BASKET else "beside another of the six places" for name in objects}
        return TaskRules(tuple(Rule((name,), shift, shift, 10.0, why[name]) for name in objects), 10.0)
    assert suite == "libero_object_spread", suite
    return TaskRules(
        (
            Rule((target,), (-8.0, 8.0), (-7.0, 7.0), 10.0, "the object to pick up"),
            Rule((BASKET,), (-4.0, 4.0), (-3.0, 3.0), 15.0, "the goal"),
        ),
        20.0,
    )


def units(cm: float) -> int:
    """Tenths of a millimetre."""
    return round(cm * UNITS_PER_METRE / 100)


def candidates(
    suite: str,
    index: int,
    number: int,
    moves: Sequence[Move],
    moves_apart: int,
    shipped_ND: NDArray[np.float64],
    columns: Sequence[int],
) -> Iterator[Placement]:
    """Placements for state ``number``, in the order in which they are to be tried; all keep their distances.

    Args:
        shipped_ND: the task's shipped states [N, D].
        columns: of x of every free object of the scene, in the flat state.
    """
    key = int(hashlib.sha256(suite.encode()).hexdigest()[:8], 16)
    generator = np.random.default_rng([key, index, number])
    low_M2 = np.array([(move.x[0], move.y[0]) for move in moves])
    high_M2 = np.array([(move.x[1], move.y[1]) for move in moves])
    while True:
        base = int(generator.integers(len(shipped_ND)))
        shifts_M2 = generator.integers(low_M2, high_M2, endpoint=True)
        if suite == choice.SUITE:
            shifts_M2 += _dealt_out(moves, shipped_ND[base], generator)
        placement = (base, *(int(shift) for shift in shifts_M2.ravel()))
        if keeps_distances(placement, moves, moves_apart, shipped_ND, columns):
            yield placement


def _dealt_out(
    moves: Sequence[Move], state_D: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Shifts [M, 2] that take every object but the basket to the place of another one, or of itself."""
    own_M2 = np.array([state_D[move.columns[0] : move.columns[0] + 2] for move in moves])
    order_M = np.arange(len(moves))
    dealt = [number for number, move in enumerate(moves) if move.objects != (BASKET,)]
    order_M[dealt] = generator.permutation(dealt)
    shifts_M2: NDArray[np.float64] = np.rint((own_M2[order_M] - own_M2) * UNITS_PER_METRE)
    return shifts_M2.astype(np.int64)


def keeps_distances(
    placement: Placement,
    moves: Sequence[Move],
    moves_apart: int,
    shipped_ND: NDArray[np.float64],
    columns: Sequence[int],
) -> bool:
    """Whether everything that moves differently is as far apart as its rule says; centres, seen from above."""
    group = {column: number for number, move in enumerate(moves) for column in move.columns}
    shifts_M2 = np.reshape(placement[1:], (len(moves), 2)) / UNITS_PER_METRE
    state = shipped_ND[placement[0]]
    at = {c: state[c : c + 2] + (shifts_M2[group[c]] if c in group else 0.0) for c in columns}
    for column, own in group.items():
        for other in columns:
            if group.get(other) == own:
                continue
            least = moves_apart if other in group else moves[own].apart
            if np.linalg.norm(at[column] - at[other]) < least / UNITS_PER_METRE:
                return False
    return True
