"""The whole chain in the real simulator at its smallest: record, pack, extract, train, resume, evaluate, report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import CacheStale, ConfigError, ContractMismatch, InputError, UnknownName
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.recorder import Config as DemosConfig
from geomcache.pipeline.sim.recorder import record
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.stages.evaluate import run as evaluation
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.live_policy import LivePolicy, build_live_tokens
from geomcache.stages.evaluate.policy_worker import PolicyWorker
from geomcache.stages.evaluate.report.page import write_report
from geomcache.stages.evaluate.results import PARQUET_NAME, EvalResults, filmstrip_name, read_results, video_name
from geomcache.stages.evaluate.simulator import Scene, Simulator, Turn
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.run import run as train
from tests.conftest import build_pack_at, extract_without_ray, nothing

pytestmark = [pytest.mark.sim, pytest.mark.slow]
SIDE = 56  # pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demos/, pack/, caches/, train/ of one recorded episode; the policy took two steps, stopped, and took two more."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("chain")
    config = DemosConfig(suite="libero_object", tasks=(0,), episodes=1, height=SIDE, width=SIDE)
    assert record(config, folder / "demos").succeeded == 1
    pack = build_pack_at(folder / "demos", folder / "pack", rows_per_shard=64)
    for encoder in ("oracle_pointmap", "depth_anything3"):
        extract_without_ray(pack, encoder, folder / "caches" / encoder)

    class Stopped(Exception):
        pass

    def stop(done: int, *_: Any) -> None:
        if done == 3:
            raise Stopped

    for encoder in ("oracle_pointmap", "depth_anything3"):
        with pytest.raises(Stopped):
            train(_train_config(folder, encoder), stop)
        result, stood = train(_train_config(folder, encoder), nothing)
        assert (result.steps, stood) == (4, False)
    return folder


def _train_config(folder: Path, encoder: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "out": folder / "train" / encoder,
            "data": [{"pack": folder / "pack", "cache": folder / "caches" / encoder}],
            "policy": {
                "geom_dit_tokens": 4,
                "dit": {"width": 32, "blocks": 2, "heads": 2},
                "backbone": {"config": {"image_size": 28}},
            },
            "steps": 4,
            "save_every": 2,
            "batch_size": 4,
            "open_loop_rows": 8,
            "device": "cpu",
        }
    )


def _eval_config(folder: Path, name: str = "oracle_pointmap", **changes: Any) -> EvalConfig:
    return EvalConfig(
        **{
            "run": folder / "train" / name,
            "out": folder / "eval" / name,
            "suites": ("libero_object",),
            "tasks": (0,),
            "episodes": 2,
            "horizon": 9,
            "device": "cpu",
            "workers": 0,
            **changes,
        }
    )


def test_a_live_observation_is_the_recorded_row_bit_for_bit(folder: Path) -> None:
    """Image, depth, camera matrices, state and instruction; and the tokens made from them."""
    with PackReader(folder / "pack") as pack, LiberoEnv("libero_object", 0, height=SIDE, width=SIDE) as env:
        row = pack.frames([0])
        metadata = json.loads(pack.episodes[0].metadata)
        env.reset(int(metadata["seed"]), int(metadata["init_state_index"]))
        seen = env.observe()
        np.testing.assert_array_equal(seen.frame.images_BVHWC, row.images_BVHWC)
        np.testing.assert_array_equal(seen.frame.depth_BVHW, row.depth_BVHW)  # type: ignore[arg-type]
        np.testing.assert_array_equal(seen.frame.intrinsics_BV33, row.intrinsics_BV33)  # type: ignore[arg-type]
        np.testing.assert_array_equal(seen.frame.extrinsics_BV44, row.extrinsics_BV44)  # type: ignore[arg-type]
        np.testing.assert_array_equal(seen.state_S, pack.states_NS[0])
        assert seen.instruction == pack.instruction(0)
        assert env.contract == pack.info.contract
        for encoder in ("oracle_pointmap", "depth_anything3"):
            with CachedTokens(folder / "caches" / encoder) as cache:
                live = build_live_tokens(cache.recipe, env.contract, "cpu")
                assert torch.equal(live.tokens(seen.frame), cache.tokens([0]))


def _played(results: EvalResults) -> list[dict[str, Any]]:
    """Everything about the episodes but the time they took and what broke over them."""
    return [one.model_dump(exclude={"seconds", "restarts"}) for one in results.episodes]


def test_evaluation_continues_and_repeats_bit_for_bit(folder: Path) -> None:
    config = _eval_config(folder, out=folder / "elsewhere")
    whole, stood = evaluation.run(config, nothing)
    assert not stood
    assert [episode.init_state for episode in whole.episodes] == [0, 1]
    assert (whole.episodes[0].steps, whole.episodes[0].queries) == (9, 2)
    assert (config.out / filmstrip_name("libero_object", 0)).stat().st_size > 1000
    assert pq.read_table(config.out / PARQUET_NAME)["init_state"].to_pylist() == [0, 1]
    assert evaluation.run(config, nothing)[1]

    def stop(done: int, *_: Any) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does

    again = _eval_config(folder)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(again, stop)
    assert not read_results(again.out).finished
    assert [one.init_state for one in read_results(again.out).episodes] == [0]
    continued, _ = evaluation.run(again, nothing)
    assert _played(continued) == _played(whole)
    more, stood = evaluation.run(_eval_config(folder, episodes=3), nothing)
    assert not stood
    assert _played(more)[:2] == _played(whole)
    with pytest.raises(InputError, match="and 1 episodes more"):
        evaluation.run(again, nothing)
    page = write_report(folder, folder / "report.html", "chain")
    assert page.read_text().count("data:image/png;base64,") >= 4
    assert "http" not in page.read_text()


def test_a_policy_acts_alike_in_any_company(folder: Path) -> None:
    """Its chunk depends on its own observation and noise, not on who else is in the batch."""
    policy = LivePolicy(folder / "train" / "depth_anything3", "cpu")
    with LiberoEnv("libero_object", 0, height=SIDE, width=SIDE, depth=False) as env:
        env.reset(7, 0)
        first = env.observe()
        for _ in range(5):
            env.step(np.array([0.5, 0, -0.5, 0, 0, 0, 1.0]))
        second = env.observe()
    alone = policy.act([first], [11])
    both = policy.act([second, first], [12, 11])
    np.testing.assert_allclose(both[1], alone[0], atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-4
    assert set(np.unique(alone[..., -1])) <= {-1.0, 1.0}
    assert np.abs(alone).max() <= 1.0


def test_a_policy_acts_without_its_geometry(folder: Path) -> None:
    """The encoder is not built, depth is not asked for, and what the policy says is what masked tokens give."""
    run = folder / "train" / "oracle_pointmap"
    blind = LivePolicy(run, "cpu", without_geometry=True)
    assert not blind.needs_depth
    with LiberoEnv("libero_object", 0, height=SIDE, width=SIDE, depth=False) as env:
        blind.require_contract(env.contract)
        env.reset(7, 0)
        seen = env.observe()
    found = blind.act([seen], [11])
    with LiberoEnv("libero_object", 0, height=SIDE, width=SIDE, depth=True) as env:
        env.reset(7, 0)
        whole = LivePolicy(run, "cpu").act([env.observe()], [11])
    assert found.shape == whole.shape
    assert np.abs(found[..., :6] - whole[..., :6]).max() > 1e-5


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"encoder": "depth_anything3"}, ContractMismatch, "another encoder"),
        ({"cameras": ("robot0_eye_in_hand", "agentview")}, ContractMismatch, "another cameras"),
        ({"image_orientation": "rot180"}, ContractMismatch, "another image_orientation"),
        ({"encoder_config": {"grid": [8, 8]}}, CacheStale, "grid"),
        ({"encoder_config": {"gird": [8, 8]}}, ConfigError, "did you mean 'grid'"),
        ({"suites": ("libero_objects",)}, UnknownName, "libero_object"),
        ({"tasks": (11,)}, UnknownName, "11"),
        ({"episodes": 51}, InputError, "--episodes 50"),
        ({"execute_steps": 99}, InputError, "execute_steps"),
        ({"run": Path("/nowhere")}, InputError, "geomcache train"),
    ],
)
def test_what_does_not_match_is_refused_by_name_before_the_first_episode(
    folder: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as caught:
        evaluation.run(_eval_config(folder, **{"out": tmp_path / "eval", **changes}), nothing)
    assert said in str(caught.value)
    assert not (tmp_path / "eval").exists()


def test_other_weights_and_another_simulator_are_refused(folder: Path, tmp_path: Path) -> None:
    config = _eval_config(folder, "depth_anything3", out=tmp_path / "eval", encoder_config={"seed": 5})
    with pytest.raises(CacheStale, match="weights"):
        evaluation.run(config, nothing)
    policy = LivePolicy(folder / "train" / "oracle_pointmap", "cpu")
    for changes, said in (
        ({"cameras": ("robot0_eye_in_hand", "agentview")}, "cameras"),
        ({"height": 64, "width": 64}, "cameras"),
        ({"depth": False}, "has_depth: True != False"),
    ):
        env = LiberoEnv("libero_object", 0, **{"height": SIDE, "width": SIDE, **changes})  # type: ignore[arg-type]
        with pytest.raises(ContractMismatch, match=said):
            policy.require_contract(env.contract)


def test_results_of_another_evaluation_are_not_mixed(folder: Path) -> None:
    out = folder / "elsewhere"
    evaluation.run(_eval_config(folder, out=out), nothing)
    with pytest.raises(InputError, match="horizon: 9 != 12"):
        evaluation.run(_eval_config(folder, out=out, horizon=12), nothing)
    with pytest.raises(InputError, match="checkpoint_weights"):
        evaluation.run(_eval_config(folder, "depth_anything3", out=out), nothing)


class _Faulty(Simulator):
    """Dies or hangs in the middle of chosen episodes, once each."""

    def __init__(self, scene: Scene, marks: Path) -> None:
        super().__init__(scene)
        self._marks = marks

    def advance(self, chunk_TA: NDArray[np.float32]) -> Turn:
        assert self._episode is not None
        mark = self._marks / str(self._episode.init_state)
        if self._steps > 0 and self._episode.init_state < 2 and not mark.exists():
            mark.touch()
            if self._episode.init_state == 0:
                os.kill(os.getpid(), signal.SIGSEGV)  # as a graphics driver does
            time.sleep(600)
        return super().advance(chunk_TA)


def test_simulators_that_die_or_hang_are_replaced_and_change_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray with two workers, against one simulator in this process: the same episodes, each counted once."""
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(evaluation, "Simulator", partial(_Faulty, marks=marks))
    changes = {"episodes": 3, "execute_steps": 4, "video_fps": 10}
    found, _ = evaluation.run(
        _eval_config(folder, out=tmp_path / "ray", workers=2, hang_seconds=15, **changes), nothing
    )
    monkeypatch.undo()
    alone, _ = evaluation.run(_eval_config(folder, out=tmp_path / "alone", **changes), nothing)
    assert _played(found) == _played(alone)
    assert [one.restarts for one in found.episodes] == [1, 1, 0]
    assert (found.finished, found.overall.episodes) == (True, 3)
    assert sorted(path.name for path in marks.iterdir()) == ["0", "1"]
    for one in found.episodes:
        assert one.seconds.physics > 0
        assert one.seconds.encoder > 0
        assert one.seconds.head > 0
        assert one.seconds.total > one.seconds.physics + one.seconds.rendering
    assert (tmp_path / "ray" / video_name("libero_object", 0)).read_bytes() == (
        tmp_path / "alone" / video_name("libero_object", 0)
    ).read_bytes()


def test_a_renderer_that_cannot_start_is_named(folder: Path, tmp_path: Path) -> None:
    """At once, with exit 2; what was played before stays valid, and says how to continue."""
    shutil.copytree(folder / "elsewhere", tmp_path / "eval")
    command = [sys.executable, "-m", "geomcache.stages.cli.app", "eval", "--resume", "--out", str(tmp_path / "eval")]
    ended = subprocess.run(
        [*command, "--episodes", "4"],
        env={**os.environ, "MUJOCO_EGL_DEVICE_ID": "7"},  # a GPU that is not there
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "error: the simulator cannot render" in ended.stderr
    assert "MUJOCO_EGL_DEVICE_ID" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert read_results(tmp_path / "eval").overall.episodes == 2


@pytest.mark.parametrize("fixed", [1, 3])
def test_reproducible_answers_do_not_depend_on_who_waits(folder: Path, fixed: int) -> None:
    """Bit for bit: any company, any slot, a longer instruction beside it."""
    config = _eval_config(folder, "depth_anything3")
    with LiberoEnv("libero_object", 0, height=SIDE, width=SIDE, depth=False) as env:
        env.reset(7, 0)
        first = env.observe()
        env.step(np.array([0.5, 0, -0.5, 0, 0, 0, 1.0]))
        second = env.observe()
    other = replace(second, instruction="put the wine bottle on top of the cabinet and close the drawer")
    worker = PolicyWorker(config, "cpu", fixed, (first.instruction, other.instruction))
    alone = worker.act([first], [11]).chunks_BTA[0]
    company = [([first, other, second], [11, 12, 13]), ([other, first], [12, 11]), ([second, other, first], [5, 6, 11])]
    for observations, seeds in company if fixed > 1 else ():
        found = worker.act(observations, seeds).chunks_BTA[seeds.index(11)]
        np.testing.assert_array_equal(found, alone)
    answer = worker.act([first], [11])
    np.testing.assert_array_equal(answer.chunks_BTA, alone[None])
    assert set(answer.seconds) == {"encoder", "vlm", "head"}
