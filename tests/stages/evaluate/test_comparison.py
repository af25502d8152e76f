"""Runs against each other: pairs by key, counts by hand, plain answers, and what must not be paired."""

from pathlib import Path
from typing import Any

import pytest

from geomcache.cache_schemas.errors import GeomcacheError, InputError, SchemaTooNew
from geomcache.stages.evaluate.corruption import Corruption
from geomcache.stages.evaluate.report.comparison import Comparison, compare, compare_training_seeds, name_episodes
from geomcache.stages.evaluate.report.inputs import Evaluation, PolicyKind, open_evaluation, open_evaluations
from geomcache.stages.evaluate.report.table import compare_folders, make_report, markdown, tables
from tests.stages.evaluate.evaluation_folders import episode, keys, make_results, write_folder


def made(name: str, wins: set[tuple[int, int]], kind: PolicyKind | None = None, **changes: Any) -> Evaluation:
    """Twenty episodes of two tasks; ``wins``: (task, initial state) of the successes, with every seed."""
    found = changes.pop("found", keys(states=range(10)))
    episodes = [episode(key, (key[1], key[2]) in wins) for key in found]
    return Evaluation(name, Path(name), make_results(episodes, **changes), None, kind)


def only(*evaluations: Evaluation) -> Comparison:
    (found,) = compare(evaluations)
    return found


ALL = {(task, state) for task in (0, 1) for state in range(10)}
FIRST_EIGHT = {(0, state) for state in range(8)}


def test_pairs_are_counted_and_a_clear_difference_is_resolved() -> None:
    """A wins 8 of task 0; B wins all of both tasks: 8 both, 12 only B. p = 2 / 2^12."""
    found = only(made("a", FIRST_EIGHT), made("b", ALL))
    pairs = found.pairs
    assert (pairs.both, pairs.only_a, pairs.only_b, pairs.neither) == (8, 0, 12, 0)
    assert found.difference == 0.6
    assert found.p == found.p_holm == 2 / 2**12
    assert found.low < 0.6 < found.high
    assert [(task.task, task.both, task.only_b, task.difference) for task in found.tasks] == [
        (0, 8, 2, 0.2),
        (1, 0, 10, 1.0),
    ]
    assert found.verdict == "resolved"
    assert found.sentence.startswith(
        "resolved: b succeeds more often than a (+60.0 pp for b, 95 % [+10, +100], p = 0.00049"
    )
    worse = only(made("b", ALL), made("a", FIRST_EIGHT))
    assert worse.sentence.startswith("resolved: b succeeds more often than a (-60.0 pp for a, 95 % [-100, -10]")


def test_a_difference_on_one_task_alone_is_not_called_general() -> None:
    """Task 0: B wins 10, A none; task 1: nobody. 10 discordant pairs are significant, two such tasks are not."""
    found = only(made("a", set()), made("b", {(0, state) for state in range(10)}))
    assert found.p == 2 / 2**10
    assert found.low == 0.0
    assert found.verdict == "resolved on these tasks"
    assert "tasks differ so much that on others it may be nothing" in found.sentence


def test_too_few_pairs_say_what_they_could_have_shown() -> None:
    """3 only A, 5 only B of 20: p = 0.73; share 0.4.

    d = 0.373: (1.96 * 0.4^0.5 + 0.842 * (0.4 - d^2)^0.5)^2 / d^2 = 20; with d itself as the share d = 0.35.
    """
    a = {(0, state) for state in range(5)}
    b = {(0, state) for state in range(3, 10)}
    found = only(made("a", a), made("b", b))
    assert (found.pairs.only_a, found.pairs.only_b) == (3, 5)
    assert found.verdict == "not resolved"
    assert "not resolved: +10.0 pp for b" in found.sentence
    assert "p = 0.73, 20 pairs" in found.sentence
    assert "With these 20 pairs a difference below about 37 pp cannot be seen" in found.sentence
    assert "about 312 pairs would be needed for this one" in found.sentence
    same = only(made("a", a), made("b", a))
    assert "below about 35 pp cannot be seen (only 0 ended differently; p < 0.05 takes 6)" in same.sentence
    assert "would be needed" not in same.sentence
    assert (same.low, same.high) == pytest.approx((-0.1260, 0.1260), abs=1e-4)  # 1.96 * (2 / 22 / 22)^0.5: not nothing
    few = only(made("a", set(), found=keys(states=(0, 1))), made("b", ALL, found=keys(states=(0, 1))))
    assert few.sentence.endswith("So few pairs resolve nothing: the least p they could give is 0.12")


def test_the_order_of_episodes_does_not_matter_and_unpaired_ones_are_named() -> None:
    a = made("a", FIRST_EIGHT, found=keys(tasks=(0, 1, 2), states=range(10)))
    b = made("b", ALL, found=list(reversed(keys(tasks=(0, 1), states=(*range(2, 8), 9, 10)))))
    found = only(a, b)
    assert found.pairs.count == 14
    assert found.pairs.both == 6
    assert (found.only_in_a, found.only_in_b) == (16, 2)
    assert found.unpaired == (
        "only in a: libero_object tasks 0-1: initial states 0-1, 8, seed 7",
        "only in a: libero_object tasks 2: initial states 0-9, seed 7",
        "only in b: libero_object tasks 0-1: initial states 10, seed 7",
    )
    assert name_episodes([]) == []


def test_several_comparisons_share_the_risk_of_chance() -> None:
    """Raw p = 0.0156 (0 against 7) three times: significant alone, not among three (0.047 is, by Holm's first: 3 p)."""
    seven = {(0, state) for state in range(7)}
    six = {(0, state) for state in range(6)}
    a = made("a", set())
    assert only(a, made("b", six)).p_holm == 2 / 64
    found = compare([a, made("b", six), made("c", six), made("d", seven)])
    assert [each.a for each in found] == ["a", "a", "a"]
    assert [each.p for each in found] == [2 / 64, 2 / 64, 2 / 128]
    assert [each.p_holm for each in found] == [4 / 64, 4 / 64, 6 / 128]
    assert [each.verdict == "not resolved" for each in found] == [True, True, False]
    assert "after Holm's correction for 3 comparisons" in found[0].sentence


def test_seeds_are_paired_and_three_of_them_have_an_interval() -> None:
    """Two seeds: none. Three seeds with the same outcomes: a mean without spread; seed 3 alone is unpaired."""
    two = only(made("a", set(), found=keys(seeds=(1, 2))), made("b", ALL, found=keys(seeds=(1, 2))))
    assert two.evaluation_seeds is None
    a = made("a", FIRST_EIGHT, found=keys(states=range(10), seeds=(1, 2, 3, 4)))
    b = made("b", ALL, found=keys(states=range(10), seeds=(1, 2, 4)))
    found = only(a, b)
    assert found.pairs.count == 60
    assert found.only_in_a == 20
    assert found.evaluation_seeds is not None
    assert found.evaluation_seeds.seeds == (1, 2, 4)
    assert found.evaluation_seeds.mean == pytest.approx(0.6)
    assert found.evaluation_seeds.high - found.evaluation_seeds.low == pytest.approx(0.0, abs=1e-9)


def test_arms_trained_with_three_seeds_are_compared_over_them() -> None:
    """Differences 0.5, 0.4, 0.3 of equal training seeds; an arm with two seeds has none."""
    wins = {0: 10, 1: 8, 2: 6}
    arms = [made(f"none{seed}", set(), PolicyKind("none", None, seed)) for seed in wins]
    arms += [
        made(f"pool{seed}", {(0, i) for i in range(count)}, PolicyKind("pool", "xfeat", seed))
        for seed, count in wins.items()
    ]
    arms += [made(f"gated{seed}", ALL, PolicyKind("gated", "xfeat", seed)) for seed in (0, 1)]
    (found,) = compare_training_seeds(arms)
    assert (found.a, found.b, found.seeds) == ("none", "pool of xfeat", (0, 1, 2))
    assert (found.mean, found.low, found.high) == pytest.approx((0.4, 0.4 - 0.2484, 0.4 + 0.2484), abs=1e-4)
    assert compare_training_seeds(arms[:1]) == ()
    longer = [made(f"longer{seed}", ALL, PolicyKind("pool", "xfeat", seed, "other steps")) for seed in wins]
    assert [(one.b, one.mean) for one in compare_training_seeds([*arms, *longer])] == [
        ("pool of xfeat as pool0", pytest.approx(0.4)),
        ("pool of xfeat as longer0", pytest.approx(1.0)),
    ]


def test_states_of_the_same_number_from_other_lists_are_not_paired() -> None:
    """Another release of LIBERO, or another list of placements; what an older geomcache wrote does not say."""

    def states(name: str, digest: str | None) -> Evaluation:
        own = [episode(key, True, init_state_digest=digest if key[2] == 3 else "same") for key in keys(states=range(5))]
        return Evaluation(name, Path(name), make_results(own), None, None)

    with pytest.raises(InputError) as caught:
        compare([states("a", "1"), states("b", "2")])
    assert "initial states of the same number are others" in str(caught.value)
    assert "libero_object tasks 0-1: initial states 3, seed 7" in str(caught.value)
    assert only(states("a", "1"), states("b", None)).pairs.both == 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"horizon": 300}, "horizon of libero_object: 280 in a, 300 in b"),
        ({"settle_steps": 0}, "settle_steps: 10 in a, 0 in b"),
        ({"found": keys(("libero_spatial",))}, "no episode in common"),
        ({"found": keys(states=range(20, 25))}, "initial states 20-24"),
        ({"found": keys(seeds=(8,))}, "seeds 8"),
        ({"found": [], "finished": False}, "b: no finished episode"),
    ],
)
def test_what_cannot_be_paired_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        compare([made("a", ALL), made("b", ALL, **changes)])
    assert said in str(caught.value)


def test_what_differs_beside_the_policy_is_said() -> None:
    episodes = [
        episode(key, True, versions={"geomcache": "0.1.0", "mujoco": "3.18.0"}) for key in keys(states=range(10))
    ]
    other = make_results(episodes, execute_steps=4, mode="throughput", finished=False)
    found = only(made("a", ALL), Evaluation("b", Path("b"), other, None, None))
    assert found.notes == (
        "b is unfinished",
        "both acted with the same weights: what differs is the settings",
        "execute_steps: 8 in a, 4 in b",
        "mode: reproducible in a, throughput in b",
        "mujoco: 3.17.0 in a, 3.18.0 in b",
    )
    assert only(made("a", ALL), made("b", ALL, checkpoint_weights="v" * 64)).notes == ()


def test_camera_orbit_and_rulers_are_named_wherever_a_result_is() -> None:
    """They change what is seen, not the task: conditions can be compared, under their names."""
    kind = PolicyKind("pool", "oracle_pointmap", 1)
    plain, turned = made("plain", ALL, kind), made("turned", FIRST_EIGHT, kind, camera_orbit=10.0)
    told = made("told", ALL, kind, camera_orbit=10.0, corruption=Corruption(nominal_extrinsics=True))
    assert "under: nothing in plain, camera orbit ±10° in turned" in only(plain, turned).notes
    assert not any("under" in note for note in only(turned, made("again", ALL, kind, camera_orbit=10.0)).notes)
    assert [line.arm for line in make_report([plain, turned, told]).lines] == [
        "pool of oracle_pointmap",
        "pool of oracle_pointmap, camera orbit ±10°",
        "pool of oracle_pointmap, camera orbit ±10°, nominal extrinsics",
    ]
    rgb, blind = made("rgb", ALL, PolicyKind("none", None, 1)), made("b", ALL, PolicyKind("none", None, 1, None, False))
    assert [line.arm for line in make_report([rgb, blind]).lines] == ["blind", "none"]


def test_the_ablation_table_stands_in_the_plans_order() -> None:
    arms = [made(name, set(), PolicyKind(name, "xfeat", 0)) for name in ("none", "gated", "qformer", "pool")]
    arms.append(made("else", ALL, found=keys(("libero_object", "libero_spatial"), states=range(10))))
    success, motion = tables(make_report(arms))
    assert [row[0] for row in success.cells] == ["none", "pool", "qformer", "gated", "else"]
    assert success.columns[3:] == ["libero_object %", "libero_spatial %", "average %", "less none, pp", "p"]
    assert success.cells[0][2:] == ["20", "0 [0, 16]", "-", "0", "-", "-"]  # Wilson 0/20: 0.161
    assert success.cells[4][2:] == ["40", "100 [84, 100]", "100 [84, 100]", "100", "+100.0 [+74, +100]", "7.6e-06"]
    assert motion.cells[0] == ["none", "-12.0", "10.0", "1.50", "0.50", "0", "0", "-"]
    assert motion.cells[4] == ["else", "-8.0", "10.0", "1.50", "0.50", "100", "100", "100"]
    lines = markdown(success).splitlines()
    assert lines[1] == "| " + " | ".join(["---"] * 8) + " |"
    assert len(lines) == 7


def test_folders_are_named_so_that_they_can_be_told_apart(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / name / "eval", keys(), lambda _: True) for name in ("none", "pool")]
    assert [each.name for each in open_evaluations(folders)] == ["none", "pool"]
    folders.append(write_folder(tmp_path / "old/pool/eval", keys(), lambda _: True))
    assert [each.name for each in open_evaluations(folders)] == ["none/eval", "pool/eval", "old/pool/eval"]
    report = compare_folders(folders)
    assert len(report.comparisons) == 2
    assert any("none/eval: gone does not hold the checkpoint" in note for note in report.notes)


def test_rubbish_is_refused_by_name(tmp_path: Path) -> None:
    good = write_folder(tmp_path / "runs/a", keys(), lambda _: True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")

    def mistake(folder: Path, kind: type[GeomcacheError] = InputError) -> str:
        with pytest.raises(kind) as caught:
            open_evaluations([good, folder])
        return str(caught.value)

    assert "no such folder" in mistake(tmp_path / "none")
    assert "an empty folder" in mistake(tmp_path / "empty")
    assert "a file" in mistake(tmp_path / "file")
    assert f"geomcache report {good}" in mistake(tmp_path / "runs")
    assert "is given twice" in mistake(tmp_path / "runs/../runs/a")
    text = (good / "results.json").read_text()
    broken = tmp_path / "broken"
    broken.mkdir()
    for written, said, kind in (
        (text[: len(text) // 2], "cannot be read", InputError),
        ("", "cannot be read", InputError),
        ("[]", "cannot be read", InputError),
        ('{"schema_version": 1, "successes": 3}', "field", InputError),
        (text.replace('"schema_version": 1', '"schema_version": 99'), "newer geomcache", SchemaTooNew),
    ):
        (broken / "results.json").write_text(written)
        assert said in mistake(broken, kind)
    episodes = [episode(key, True) for key in keys()]
    (broken / "results.json").write_text(make_results([*episodes, episodes[3]]).model_dump_json())
    with pytest.raises(InputError, match="libero_object task 0, initial state 3, seed 7"):
        open_evaluation(broken)
