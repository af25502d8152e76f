"""Pages and the command: what a reader sees of evaluations, real or damaged; nothing is loaded from elsewhere."""

import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import typer
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from geomcache.cache_schemas.errors import InputError
from geomcache.stages.cli import report
from geomcache.stages.evaluate.corruption import Corruption, Drawn
from geomcache.stages.evaluate.grasp import GraspMetrics
from geomcache.stages.evaluate.pictures import Mark, filmstrip, success_chart, video
from geomcache.stages.evaluate.report.evaluation import how_it_failed, per_query
from geomcache.stages.evaluate.report.inputs import open_evaluation
from geomcache.stages.evaluate.report.page import policy_rows, write_comparison, write_evaluation, write_report
from geomcache.stages.evaluate.results import (
    RESULTS_NAME,
    EpisodeKey,
    failure_name,
    filmstrip_name,
    video_name,
)
from geomcache.stages.train.checkpoint import latest_checkpoint, read_card, weights_digest
from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.run import run as train
from tests.conftest import nothing
from tests.stages.evaluate.evaluation_folders import episode, keys, make_results, write_folder

app = typer.Typer()
app.command("report")(report.report)
FRAMES = [np.full((2, 15, 21, 3), 5 * number, dtype=np.uint8) for number in range(12)]  # [V, H, W, 3], odd sizes


def failing_from(state: int) -> Callable[[EpisodeKey], bool]:
    """Initial states below ``state`` succeed."""
    return lambda key: key[2] < state


def text_of(page: Path) -> str:
    """What a reader sees, in one line."""
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(text))


def assert_self_contained(page: Path) -> None:
    text = page.read_text()
    assert "http" not in text
    assert "<script" not in text
    assert set(re.findall(r'(?:src|href)="(.{5})', text)) <= {"data:"}
    assert "url(" not in text


def test_the_page_of_an_evaluation(tmp_path: Path) -> None:
    """Three of five succeed in task 0, all in task 1; the first failure is initial state 3."""
    folder = write_folder(tmp_path / "eval", keys(), lambda key: key[1] == 1 or key[2] < 3, finished=False)
    filmstrip(FRAMES, folder / filmstrip_name("libero_object", 0))
    filmstrip(FRAMES, folder / failure_name("libero_object", 0))
    video(FRAMES, folder / video_name("libero_object", 0), 10)
    (folder / filmstrip_name("libero_object", 1)).write_bytes(b"no picture")
    page = tmp_path / "page.html"
    write_evaluation(folder, page, "a & b")
    assert_self_contained(page)
    raw, text = page.read_text(), text_of(page)
    assert "<h1>a &amp; b</h1>" in raw
    assert "Unfinished: 10 episodes so far" in text
    assert "8 of 10 episodes succeeded: 80 %, 95 % [49, 94]" in text  # R: binom.confint(8, 10) 0.490 0.943
    assert "0: put the <soup> 0 away 5 3 0.60 [0.23, 0.88]" in text  # 3 of 5: 0.231 0.882
    assert raw.count("data:image/webp;base64,") == 2
    assert raw.count("data:video/mp4;base64,") == 1
    assert "Its first failure: initial state 3, seed 7, 280 steps; 2 attempts to grasp, none lifted." in text
    assert "no picture: filmstrips/libero_object_01.png cannot be read" in text
    assert (
        "“put the <soup> 1 away”, 5/5 [0.57, 1.00]. First episode (initial state 0, seed 7): success after 120 steps"
        in text
    )
    assert "LDLJ, nearer to 0 is smoother -8.80 -8.00 -12.00" in text  # (8 * -8 + 2 * -12) / 10
    assert "target lifted, % 80 100 0" in text
    assert "placed once lifted, % 100 100 -" in text
    assert "scene reset and settling 2.00 22.2 %" in text
    assert "the rest 0.75 8.3 %" in text
    # 10 episodes of 0.5, 1.0, 0.25 s; 8 * 15 + 2 * 35 queries
    assert "(190 in all): encoder and codec 26 ms, VLM 53 ms, compressor and head 13 ms." in text
    assert "mujoco 3.17.0" in text
    assert "execute_steps 8" in text


def test_the_page_says_that_it_was_not_the_plain_test(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "camera_orbit": 10.0,
        "corruption": Corruption(depth_noise_m=0.01, shuffle_instructions=True),
    }
    folder = tmp_path / "eval"
    folder.mkdir()
    found = [episode(key, True, drawn=Drawn(camera_orbit=-3.25, told="put the milk away")) for key in keys(tasks=(0,))]
    (folder / RESULTS_NAME).write_text(make_results(found, **changes).model_dump_json())
    page = tmp_path / "page.html"
    evaluation = write_evaluation(folder, page, "x")
    text = text_of(page)
    named = "camera orbit ±10°, depth noise 0.01 m, shuffled instructions"
    assert f"Not the plain test: {named} (docs/evaluate.md)." in text
    assert "(initial state 0, seed 7, camera turned by -3.2°, told “put the milk away”): success" in text
    assert evaluation.arm == f"?, {named}"
    write_evaluation(write_folder(tmp_path / "plain", keys(), lambda _: True), page, "x")
    assert "plain test" not in text_of(page)


def test_a_first_episode_that_fails_is_shown_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "eval", keys(tasks=(0,)), lambda _: False)
    for name in (filmstrip_name("libero_object", 0), failure_name("libero_object", 0)):
        filmstrip(FRAMES, folder / name)
    page = tmp_path / "page.html"
    write_evaluation(folder, page, "x")
    assert page.read_text().count("data:image/webp") == 1
    assert "It is the first failure: 2 attempts to grasp" in text_of(page)
    assert "Unfinished" not in text_of(page)


def test_an_evaluation_without_an_episode_has_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_evaluation(write_folder(tmp_path / "eval", [], failing_from(0), finished=False), page, "x")
    assert "No episode yet." in text_of(page)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grasped": True, "drops": 1}, "a target was lifted and lost"),
        ({"grasped": True}, "a target was lifted, not brought to its goal"),
        ({"wrong_object": True}, "another object was lifted"),
        ({"attempts": 0, "first_attempt_success": None}, "no attempt to grasp"),
    ],
)
def test_a_failure_is_told_in_words(changes: dict[str, Any], said: str) -> None:
    values = {"targets": ("a",), "attempts": 3, "first_attempt_success": False, "grasped": False, "wrong_object": False}
    grasp = GraspMetrics.model_validate({**values, "drops": 0, **changes})
    assert how_it_failed(episode(keys()[0], False, grasp=grasp)) == said
    assert how_it_failed(episode(keys()[0], False, grasp=None)) == "nothing to grasp in this task"


def test_latency_without_a_query_is_unknown() -> None:
    assert per_query([episode(keys()[0], False, queries=0)], "vlm") is None


def test_versions_that_changed_in_the_middle_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    write_folder(folder, keys(tasks=(0,)), failing_from(9))
    values = json.loads((folder / "results.json").read_text())
    values["episodes"][2]["versions"]["mujoco"] = "3.18.0"
    (folder / "results.json").write_text(json.dumps(values))
    page = tmp_path / "page.html"
    write_evaluation(folder, page, "x")
    assert "mujoco 3.17.0 (4 episodes), 3.18.0 (1 episodes)" in text_of(page)


def test_the_chart_draws_what_it_is_given() -> None:
    chart = success_chart([("suite <a>", [Mark("task & co", 3, 5, 0.6, 0.231, 0.882, 9)])])
    assert 'x1="23.10%" x2="88.20%"' in chart
    assert 'cx="60.00%"' in chart
    assert "var(--c1)" in chart  # the page has eight colours
    assert "suite &lt;a&gt;" in chart
    assert "task &amp; co: 3/5 [0.23, 0.88]" in chart
    height = int(re.search(r'height="(\d+)"', chart).group(1))  # type: ignore[union-attr]
    assert all(float(y) < height for y in re.findall(r'(?:cy|y2|y)="([\d.]+)"', chart))


def test_a_video_plays_every_frame_at_its_rate_with_the_views_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "videos/a.mp4"
    video(FRAMES, path, 10)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == 10
    assert len(frames) == len(FRAMES)
    assert frames[0].shape == (16, 42, 3)  # 15 x 42, made even
    assert abs(float(frames[-1].mean()) - 55) < 4
    assert [found.name for found in path.parent.iterdir()] == ["a.mp4"]


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    folders = [
        write_folder(tmp_path / "none", keys(states=range(10)), failing_from(4)),
        write_folder(tmp_path / "<pool>", keys(states=range(2, 12)), failing_from(12), checkpoint_weights="v" * 64),
    ]
    page = tmp_path / "page.html"
    found = write_comparison(folders, page, "x")
    assert_self_contained(page)
    text = text_of(page)
    assert found.comparisons[0].sentence in text
    assert "<pool> against none: resolved: <pool> succeeds more often than none (+75.0 pp" in text
    assert "8 episodes without a partner are left out (4 only in none, 4 only in <pool>)" in text
    assert "only in none: libero_object tasks 0-1: initial states 0-1, seed 7" in text
    assert "libero_object 1: put the <soup> 1 away 8 2 0 6 0 +75.0" in text
    assert "the lines are over different episodes" in text
    # 2/3 - 1.96 * (1/3 / 18)^0.5 = 0.40 with a pair of each kind added to 0 and 12 of 16
    assert "| <pool> | ? | 20 | 100 [84, 100] | +75.0 [+40, +94] |" in text


def test_the_command_says_it_and_speaks_json(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a/eval", keys(states=range(10)), failing_from(4))
    b = write_folder(tmp_path / "b/eval", keys(states=range(10)), failing_from(10))
    said = _run(a, b)
    assert "b against a: resolved: b succeeds more often than a (+60.0 pp for b" in said
    assert "both acted with the same weights" in said
    page = tmp_path / "comparison.html"
    assert f"report: {page}" in said
    assert page.exists()
    values = json.loads(_run(a, b, "--json", "--out", tmp_path / "x.html"))
    assert values["report"] == str(tmp_path / "x.html")
    assert values["comparisons"][0]["pairs"] == {"both": 8, "only_a": 0, "only_b": 12, "neither": 0}
    assert values["comparisons"][0]["verdict"] == "resolved"
    one = json.loads(_run(a, "--json"))
    assert one["report"] == str(a / "report.html")
    assert one["overall"]["successes"] == 8
    assert "8/20 [0.22, 0.61]" in _run(a)
    before = page.read_bytes()
    mistake = CliRunner().invoke(app, [str(a), str(a)])
    assert isinstance(mistake.exception, InputError)
    assert page.read_bytes() == before


def _run(*arguments: object) -> str:
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture(scope="module")
def trained(pack_path: Path, caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/none and train/pool of one step each, training seeds 0 and 3."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in ((0, "none"), (3, "pool")):
        AcceleratorState._reset_state(reset_partial_state=True)
        policy = {
            "dit": {"width": 32, "blocks": 2, "heads": 2, "future_tokens": 2},
            "backbone": {"config": {"image_size": 28}},
            "geom_compression_type": name,
            "geom_inject_to_dit": name != "none",
        }
        config = TrainConfig(
            out=folder / "train" / name,
            data=(DataPair(pack=pack_path, cache=caches["oracle_pointmap"] if name == "pool" else None),),
            policy=PolicyConfig.model_validate(policy),
            steps=1,
            batch_size=2,
            open_loop_rows=4,
            seed=seed,
            trackers=(),
            device="cpu",
        )
        train(config, nothing)
    return folder


@pytest.fixture
def runs(trained: Path) -> Path:
    """``trained``, not yet evaluated."""
    shutil.rmtree(trained / "eval", ignore_errors=True)
    return trained


def _weights(runs: Path, name: str) -> str:
    return weights_digest(read_card(latest_checkpoint(runs / "train" / name)))


def test_a_folder_of_runs_has_their_evaluations_and_the_comparison(runs: Path, tmp_path: Path) -> None:
    page = write_report(runs, tmp_path / "page.html", "runs")
    assert "Closed loop" not in text_of(page).split("Training")[1]
    for name, state in (("none", 4), ("pool", 5)):
        out = runs / "eval" / name
        write_folder(out, keys(), failing_from(state), checkpoint_weights=_weights(runs, name))
    (runs / "train/pool/diagnosis.png").write_bytes(_picture(tmp_path))
    (runs / "train/pool/diagnosis.json").write_text("{}")
    rows = {row.name: row for row in policy_rows(runs)}
    assert (rows["none"].success, rows["none"].interval, rows["none"].geometry) == ("8/10", "[0.49, 0.94]", "none")
    assert (rows["pool"].success, rows["pool"].geometry) == ("10/10", "oracle_pointmap")
    write_report(runs, page, "runs")
    assert_self_contained(page)
    text = text_of(page)
    assert "pool against none: not resolved: +20.0 pp for pool" in text
    assert "Closed loop: pool" in text
    assert "Policy: pool of oracle_pointmap, step 500." in text
    assert "diagnosis.json beside this picture cannot be read" in text
    found = open_evaluation(runs / "eval/pool")
    assert found.run == runs / "train/pool"  # found beside the evaluation: what results.json names is gone
    assert found.policy is not None
    assert (found.policy.compressor, found.policy.encoder, found.policy.training_seed) == ("pool", "oracle_pointmap", 3)


def test_evaluations_that_cannot_be_paired_stand_side_by_side(runs: Path, tmp_path: Path) -> None:
    for name, suite in (("none", "libero_object"), ("pool", "libero_spatial")):
        write_folder(runs / "eval" / name, keys((suite,)), failing_from(3), checkpoint_weights=_weights(runs, name))
    text = text_of(write_report(runs, tmp_path / "page.html", "runs"))
    assert "Not compared: none and pool have no episode in common" in text
    assert "Closed loop: none" in text
    assert "Closed loop: pool" in text


def test_an_evaluation_of_an_older_training_is_not_the_runs_own(runs: Path) -> None:
    write_folder(runs / "eval/none", keys(), failing_from(3), checkpoint_weights="0" * 64)
    assert next(row.success for row in policy_rows(runs) if row.name == "none") == "-"


def test_an_evaluation_under_another_condition_is_not_the_runs_success(runs: Path) -> None:
    weights = _weights(runs, "none")
    for camera_orbit, shown in ((0.0, "6/10"), (10.0, "-")):
        write_folder(runs / "eval/none", keys(), failing_from(3), checkpoint_weights=weights, camera_orbit=camera_orbit)
        assert next(row.success for row in policy_rows(runs) if row.name == "none") == shown


def test_a_folder_with_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an empty folder"):
        write_report(tmp_path, tmp_path / "page.html", "x")
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "none", tmp_path / "page.html", "x")
    write_folder(tmp_path / "evals/a", keys(), failing_from(3))
    with pytest.raises(InputError, match=f"geomcache report {tmp_path}/evals/a"):
        write_report(tmp_path / "evals", tmp_path / "page.html", "x")
    assert not (tmp_path / "page.html").exists()


def _picture(folder: Path) -> bytes:
    filmstrip(FRAMES, folder / "any.png")
    return (folder / "any.png").read_bytes()
