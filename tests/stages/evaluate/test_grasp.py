"""Grasp metrics: of records drawn by hand, and of a scripted arm in the real simulator.

A record is drawn with one character a row. Row 0 is before the first action; commands have no character for it.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.pipeline.sim import expert
from geomcache.pipeline.sim.expert import Goal, ScriptedExpert
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.stages.evaluate.grasp import (
    HELD_STEPS,
    LIFTED,
    SETTLE_AT_GOAL_STEPS,
    GraspMetrics,
    GraspRecord,
    grasp_metrics,
    grasp_rates,
    is_closed,
)
from geomcache.stages.evaluate.metrics import TrackRecorder

SOUP, MILK, BOWL = "soup", "milk", "bowl"
Action = NDArray[np.float64]


def on(drawing: str, letter: str) -> NDArray[np.bool_]:
    """Where ``drawing`` has ``letter``."""
    return np.array([character == letter for character in drawing], dtype=bool)


def draw(
    command: str,
    held: dict[str, str],
    centimetres: dict[str, str],
    at_goal: dict[str, str] | None = None,
    targets: tuple[str, ...] = (SOUP,),
    near: bool = True,
) -> GraspRecord:
    """Rows of ``command`` are C (close) or o; of ``held`` H or '.'; of ``at_goal`` G or '.'; heights are digits."""
    rows = len(command) + 1
    nothing = "." * rows
    goals, objects = at_goal or {}, (SOUP, MILK, BOWL)
    closed_T = on(command, "C")
    begins_T = closed_T & ~np.concatenate([[False], closed_T[:-1]])
    drawings = [*held.values(), *centimetres.values(), *goals.values()]
    assert {len(drawing) for drawing in drawings} <= {rows}, "a drawing has another length than the command"
    return GraspRecord(
        objects=objects,
        targets=targets,
        held_TN=np.stack([on(held.get(name, nothing), "H") for name in objects], axis=1),
        height_TN=np.array([[int(digit) / 100 for digit in centimetres.get(name, "0" * rows)] for name in objects]).T,
        at_goal_TK=np.stack([on(goals.get(name, nothing), "G") for name in targets], axis=1),
        closed_T=closed_T,
        near_T=begins_T & near,
    )


def metrics(record: GraspRecord, *, success: bool = False) -> GraspMetrics:
    """Metrics of a task that has targets."""
    found = grasp_metrics(record, success)
    assert found is not None
    return found


def test_a_clean_episode() -> None:
    found = metrics(
        draw(
            "oooCCCCCCCCCooo",
            {SOUP: "......HHHHHHHH.."},
            {SOUP: "0000000013578720"},
            {SOUP: "...............G"},
        ),
        success=True,
    )
    assert found == GraspMetrics(
        targets=(SOUP,),
        attempts=1,
        first_attempt_success=True,
        grasped=True,
        wrong_object=False,
        drops=0,
        lifted=(SOUP,),
    )


def test_closing_in_the_air_is_no_attempt() -> None:
    found = metrics(draw("ooCCCCCoooCCC", {}, {}, near=False))
    assert (found.attempts, found.first_attempt_success, found.grasped) == (0, None, False)


def test_closing_in_the_air_and_meeting_an_object_is_an_attempt() -> None:
    found = metrics(draw("ooCCCCCCCC", {SOUP: ".....HHHHHH"}, {SOUP: "00000001234"}, near=False))
    assert (found.attempts, found.first_attempt_success, found.drops) == (1, True, 0)


def test_the_second_attempt_succeeds() -> None:
    found = metrics(draw("oCCCCooCCCCCCC", {SOUP: ".........HHHHHH"}, {SOUP: "000000000000135"}))
    assert (found.attempts, found.first_attempt_success, found.grasped) == (2, False, True)


def test_a_glitch_of_the_command_is_no_attempt() -> None:
    assert metrics(draw("oooCCoooCooo", {}, {})).attempts == 0
    assert metrics(draw("oooCCCoooCoo", {}, {})).attempts == 1


def test_closing_again_around_what_is_held_is_no_attempt() -> None:
    found = metrics(draw("oCCCCCoCCCCC", {SOUP: "...HHHHHHHHHH"}, {SOUP: "0000123456789"}))
    assert (found.attempts, found.drops) == (1, 0)


@pytest.mark.parametrize(("centimetres", "grasped"), [("0000000111111", False), ("0000000111122", True)])
def test_holding_without_lifting_is_no_grasp(centimetres: str, grasped: bool) -> None:
    assert LIFTED == 0.02
    found = metrics(draw("oCCCCCCCCCCC", {SOUP: "...HHHHHHHHHH"}, {SOUP: centimetres}))
    assert (found.grasped, found.first_attempt_success, found.attempts) == (grasped, grasped, 1)


def test_a_lift_counts_from_the_episodes_start() -> None:
    fallen = metrics(draw("oCCCCCCCC", {SOUP: "..HHHHHHHH"}, {SOUP: "5550123456"}))
    assert not fallen.grasped
    assert metrics(draw("oCCCCCCCC", {SOUP: "..HHHHHHHH"}, {SOUP: "5550123457"})).grasped


def test_a_tossed_object_is_not_grasped() -> None:
    assert HELD_STEPS == 3
    tossed = metrics(draw("oCCCCCCCC", {SOUP: "...HH....."}, {SOUP: "0002468640"}))
    assert (tossed.grasped, tossed.drops) == (False, 0)
    assert metrics(draw("oCCCCCCCC", {SOUP: "...HHH...."}, {SOUP: "0002468640"})).grasped


def test_a_short_loss_of_contact_is_no_drop() -> None:
    heights = {SOUP: "000012345555555"}
    assert metrics(draw("oCCCCCCCCCCCCC", {SOUP: "..HHHHHH..HHHHH"}, heights)).drops == 0
    assert metrics(draw("oCCCCCCCCCCCCC", {SOUP: "..HHHHHH...HHHH"}, heights)).drops == 1


def test_the_wrong_object() -> None:
    found = metrics(
        draw(
            "oCCCCCCCooCCCCCCC",
            {MILK: "..HHHHHHH.........", SOUP: "............HHHHHH"},
            {MILK: "000123456000000000", SOUP: "000000000000012345"},
        )
    )
    assert (found.wrong_object, found.grasped, found.lifted) == (True, True, (MILK, SOUP))
    assert (found.attempts, found.first_attempt_success) == (2, False)
    assert found.drops == 0  # only targets are dropped
    touched = metrics(draw("oCCCCCCCC", {MILK: "..HHHHHHHH"}, {}))
    assert (touched.wrong_object, touched.lifted) == (False, ())


def test_a_target_that_slips_is_a_drop() -> None:
    slipped = draw("oCCCCCCCCCCCCC", {SOUP: "..HHHHHH......."}, {SOUP: "000012345200000"})
    assert metrics(slipped).drops == 1
    recovered = draw("oCCCCCCCoooCCCCCC", {SOUP: "..HHHH......HHHHHH"}, {SOUP: "000034500000012345"})
    assert metrics(recovered, success=True).drops == 1  # a success later does not undo it
    put_back = draw("oCCCCCCCooooo", {SOUP: "..HHHHHHHHH..."}, {SOUP: "00001234320000"})
    assert metrics(put_back).drops == 1
    never_lifted = draw("oCCCCCCCooooo", {SOUP: "..HHHHHHHHH..."}, {SOUP: "00001111100000"})
    assert metrics(never_lifted).drops == 0


@pytest.mark.parametrize(
    ("steps_until_goal", "drops"), [(1, 0), (SETTLE_AT_GOAL_STEPS, 0), (SETTLE_AT_GOAL_STEPS + 1, 1)]
)
def test_a_release_is_a_drop_unless_the_goal_follows(steps_until_goal: int, drops: int) -> None:
    after = SETTLE_AT_GOAL_STEPS + 4
    reached = "." * (steps_until_goal - 1) + "G" * (after - steps_until_goal + 1)
    record = draw(
        "oCCCCCCC" + "o" * after,
        {SOUP: "..HHHHHHH" + "." * after},
        {SOUP: "000012345" + "5" * after},
        {SOUP: "........." + reached},
    )
    assert metrics(record).drops == drops


def test_taking_it_again_before_the_goal_is_reached_makes_it_a_drop() -> None:
    record = draw(
        "oCCCCCCCooooCCCCCCooo",
        {SOUP: "..HHHHHHH.....HHHHHH.."},
        {SOUP: "0000123455550000345555"},
        {SOUP: "....................GG"},
    )
    assert (metrics(record).drops, metrics(record).attempts) == (1, 2)


def test_the_end_of_the_episode_decides_about_the_last_release() -> None:
    released = draw("oCCCCCCCCoo", {SOUP: "..HHHHHHHHH."}, {SOUP: "000012345555"})
    assert metrics(released, success=True).drops == 0
    assert metrics(released, success=False).drops == 1
    held = draw("oCCCCCCCCCC", {SOUP: "..HHHHHHHHHH"}, {SOUP: "000012345555"})
    assert (metrics(held).drops, metrics(held, success=True).drops) == (0, 0)


def test_each_of_two_targets_has_its_own_goal() -> None:
    record = draw(
        "oCCCCCCCoooCCCCCCCooo",
        {SOUP: "..HHHHHHH.............", BOWL: "............HHHHHHH..."},
        {SOUP: "0000123453000000000000", BOWL: "0000000000000123456666"},
        {SOUP: "..........GG..........", BOWL: "......................"},
        targets=(BOWL, SOUP),
    )
    found = metrics(record)
    assert (found.attempts, found.drops, found.lifted, found.wrong_object) == (2, 1, (SOUP, BOWL), False)
    assert (found.targets, found.first_attempt_success) == ((BOWL, SOUP), True)


def test_a_task_without_targets_has_no_grasp_metrics() -> None:
    record = replace(draw("oCCC", {}, {}), targets=(), at_goal_TK=np.zeros((5, 0), dtype=bool))
    assert grasp_metrics(record, success=True) is None


def test_an_episode_without_a_step() -> None:
    found = metrics(draw("", {}, {}))
    assert (found.attempts, found.grasped, found.drops, found.first_attempt_success) == (0, False, 0, None)


def test_the_gripper_keeps_its_command_at_zero() -> None:
    assert is_closed(0.001, before=False)
    assert not is_closed(-0.001, before=True)
    assert [is_closed(0.0, before=before) for before in (True, False)] == [True, False]


def test_rates_are_counts_over_the_right_episodes() -> None:
    def episode(attempts: int, first: bool | None, grasped: bool, wrong: bool, drops: int) -> GraspMetrics:
        return GraspMetrics(
            targets=(SOUP,),
            attempts=attempts,
            first_attempt_success=first,
            grasped=grasped,
            wrong_object=wrong,
            drops=drops,
        )

    rates = grasp_rates(
        [
            (episode(1, True, True, False, 0), True),
            (episode(3, False, True, True, 2), False),
            (episode(2, False, False, False, 0), False),
            (episode(0, None, False, False, 0), True),  # pushed there
            (None, True),  # a drawer
        ]
    )
    assert (rates.episodes, rates.tried, rates.grasped, rates.placed) == (4, 3, 2, 1)
    assert rates.attempts_per_episode == 6 / 4
    assert rates.first_attempt_rate == 1 / 3
    assert rates.grasp_rate == 2 / 4
    assert rates.wrong_object_rate == 1 / 4
    assert rates.drops_per_episode == 2 / 4
    assert rates.placed_given_grasped == 1 / 2
    nothing = grasp_rates([])
    assert nothing.episodes == 0
    assert (nothing.grasp_rate, nothing.first_attempt_rate, nothing.placed_given_grasped) == (None, None, None)


# The real simulator.


@pytest.fixture(scope="module")
def recorder() -> Iterator[tuple[LiberoEnv, TrackRecorder]]:
    """libero_object 0 ("pick up the alphabet soup and place it in the basket") and its recorder."""
    with LiberoEnv("libero_object", 0, depth=False) as env:
        yield env, TrackRecorder(env)


def expert_until(env: LiberoEnv, *, lifted: bool = False) -> Iterator[Action]:
    """The scripted expert's actions; ``lifted``: until its object is 10 cm up."""
    name = expert.read_goal(env).object_name
    body = env.simulator.obj_body_id[name]
    start = env.simulator.sim.data.body_xpos[body][2]
    for action in ScriptedExpert(env).actions():
        yield action
        if lifted and env.simulator.sim.data.body_xpos[body][2] - start > 0.1:
            return


def execute(env: LiberoEnv, recorder: TrackRecorder, actions: Iterator[Action]) -> bool:
    """Until success or the end of ``actions``."""
    for action in actions:
        success = env.step(action)
        recorder.step(action)
        if success:
            return True
    return False


def stay(gripper: float, steps: int) -> Iterator[Action]:
    """Standing still."""
    yield from [np.array([0.0] * 6 + [gripper])] * steps


@pytest.mark.sim
def test_the_expert_grasps_and_places(recorder: tuple[LiberoEnv, TrackRecorder]) -> None:
    env, records = recorder
    env.reset(seed=0, init_state=0)
    start = env.proprioception().ee_pos_3
    records.begin()
    assert execute(env, records, expert_until(env))
    motion, grasp = records.metrics(success=True)
    assert grasp == GraspMetrics(
        targets=("alphabet_soup_1",),
        attempts=1,
        first_attempt_success=True,
        grasped=True,
        wrong_object=False,
        drops=0,
        lifted=("alphabet_soup_1",),
    )
    assert records.metrics(success=False)[1] == grasp  # the goal was seen to be reached after the release
    assert motion is not None
    assert motion.gripper_toggles == 2
    assert motion.path_efficiency is not None
    straight = float(np.linalg.norm(env.proprioception().ee_pos_3 - start))
    assert motion.path_length * motion.path_efficiency == pytest.approx(straight)


@pytest.mark.sim
def test_closing_far_from_everything_is_no_attempt(recorder: tuple[LiberoEnv, TrackRecorder]) -> None:
    env, records = recorder
    env.reset(seed=0, init_state=0)
    records.begin()
    for start in (0.1, -0.1):  # two chunks of four steps, closing from the first on
        records.chunk()
        execute(env, records, iter([np.array([start + 0.01 * step] + [0.0] * 5 + [1.0]) for step in range(4)]))
    motion, grasp = records.metrics(success=False)
    assert grasp is not None
    assert (grasp.attempts, grasp.grasped, grasp.first_attempt_success) == (0, False, None)
    assert motion is not None
    assert motion.gripper_toggles == 1
    assert motion.seam_ratio == pytest.approx(23.0, rel=1e-4)  # from 0.13 to -0.1; 0.01 inside
    records.begin()
    assert records.metrics(success=False)[0] is None


@pytest.mark.sim
def test_another_object_is_the_wrong_one(
    recorder: tuple[LiberoEnv, TrackRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    env, records = recorder
    env.reset(seed=0, init_state=0)
    other = Goal("cream_cheese_1", "basket_1", "basket_1_contain_region", into=True)
    monkeypatch.setattr(expert, "read_goal", lambda _: other)
    records.begin()
    execute(env, records, expert_until(env, lifted=True))
    _, grasp = records.metrics(success=False)
    assert grasp is not None
    assert (grasp.wrong_object, grasp.grasped, grasp.lifted) == (True, False, ("cream_cheese_1",))
    assert (grasp.attempts, grasp.first_attempt_success, grasp.drops) == (1, False, 0)


@pytest.mark.sim
def test_opening_too_early_is_a_drop(recorder: tuple[LiberoEnv, TrackRecorder]) -> None:
    env, records = recorder
    env.reset(seed=0, init_state=0)
    records.begin()
    execute(env, records, expert_until(env, lifted=True))
    assert records.metrics(success=False)[1] == GraspMetrics(
        targets=("alphabet_soup_1",),
        attempts=1,
        first_attempt_success=True,
        grasped=True,
        wrong_object=False,
        drops=0,
        lifted=("alphabet_soup_1",),
    )
    execute(env, records, stay(-1.0, 20))
    _, grasp = records.metrics(success=False)
    assert grasp is not None
    assert (grasp.grasped, grasp.drops) == (True, 1)
