"""Closed-loop evaluation: what its parts cost beside doing the same by hand; ratios of speeds within one run.

    python benchmarks/evaluate.py [--json FILE] [--run RUN] [--smallest] [--strict] [--only KEY,...]

Keys (above 1: ours is faster):
  lazy_over_eager             control steps/s in one environment, recorded actions, no policy, chunks of 8: rendering
                              before each chunk, over LIBERO's own environment, which renders at every step
  two_workers_over_bare_pair  control steps/s, resets included, of two simulator workers and a policy that costs none,
                              over two bare processes that play the same; starting Ray or the processes is in neither
                              (Ray's agents are busy for a while after that: at the smallest size it is 0.8 to 0.9)
  batched_over_one_by_one     answers/s of the policy at 8 waiting observations, one batch over one by one
  other_share                 of an episode's time, what is not reset, physics, rendering, encoder, VLM or head;
                              one worker and the policy, each a process
  seconds                     of an episode, by part

Limits: 4, 0.9, none, 0.05; with --strict exit 1 when one is missed (machines are noisy).
Without --run a policy is made: one recorded demonstration, Depth-Anything-3 at tiny size, two steps of training.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import CameraContract, Contract
from geomcache.configs.load import load_config
from geomcache.pipeline.frames import Observation
from geomcache.pipeline.sim import recorder
from geomcache.pipeline.sim.libero_env import SETTLE_ACTION, LiberoEnv
from geomcache.pipeline.sim.system import quiet_simulator
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.crew import ray_crew
from geomcache.stages.evaluate.live_policy import LivePolicy
from geomcache.stages.evaluate.play import Play
from geomcache.stages.evaluate.policy_worker import Answer
from geomcache.stages.evaluate.run import run as evaluate
from geomcache.stages.evaluate.simulator import Episode, Scene, Simulator

SUITE, SIDE, CHUNK, SEED, SETTLE = "libero_object", 128, 8, 7, 10
CAMERAS = ("agentview", "robot0_eye_in_hand")
LEAST = {"lazy_over_eager": 4.0, "two_workers_over_bare_pair": 0.9}
MOST = {"other_share": 0.05}
SCENE = Scene(
    contract=Contract(
        image_orientation="upright",
        cameras=tuple(CameraContract(name=name, height=SIDE, width=SIDE) for name in CAMERAS),
        has_depth=False,
    ),
    depth=False,
    settle_steps=SETTLE,
    execute_steps=CHUNK,
)


def plan() -> tuple[NDArray[np.float64], int]:
    """(actions [T, 7], initial state) of the scripted expert on the first task."""
    with LiberoEnv(SUITE, 0, depth=False, height=SIDE, width=SIDE) as env:
        for state in range(5):
            planned = recorder.plan_episode(env, SEED, state, 0.0)
            if planned is not None:
                return np.asarray(planned.executed_TA), state
    raise SystemExit("the scripted expert failed five times")


def lazy_over_eager(steps: int) -> float:
    actions_TA, state = plan()
    actions_TA = actions_TA[: max(CHUNK, min(steps, len(actions_TA) - 1) // CHUNK * CHUNK)]
    speeds: dict[str, list[float]] = {"lazy": [], "eager": []}
    with LiberoEnv(SUITE, 0, depth=False, height=SIDE, width=SIDE) as env, quiet_simulator():
        from libero.libero.envs import OffScreenRenderEnv

        eager = OffScreenRenderEnv(
            bddl_file_name=str(env.task.bddl_path), camera_heights=SIDE, camera_widths=SIDE, ignore_done=True
        )
        try:
            for _ in range(2):
                env.reset(SEED, state, SETTLE)
                env.observe()
                speeds["lazy"].append(_speed(env.step, actions_TA, env.observe))
                start = env.flat_state()
                eager.seed(SEED)
                eager.reset()
                eager.set_init_state(start)
                speeds["eager"].append(_speed(eager.step, actions_TA))
        finally:
            eager.close()
    return float(np.mean(speeds["lazy"]) / np.mean(speeds["eager"]))


def _speed(step: Callable[[Any], Any], actions_TA: NDArray[Any], observe: Callable[[], Any] | None = None) -> float:
    """Control steps per second; ``observe`` before each chunk, as a policy would be asked."""
    started = time.perf_counter()
    for number, action_A in enumerate(actions_TA):
        if observe is not None and number % CHUNK == 0:
            observe()
        step(action_A)
    return len(actions_TA) / (time.perf_counter() - started)


class StandStill:
    """A policy that costs nothing."""

    def act(self, observations: Sequence[Observation], noise_seeds: Sequence[int]) -> Answer:  # noqa: ARG002
        """The settling action, for every step of every chunk."""
        return Answer(np.tile(SETTLE_ACTION.astype(np.float32), (len(observations), CHUNK, 1)), {})

    def close(self) -> None:
        """Nothing to free."""


def episodes(horizon: int, each: int) -> list[Episode]:
    """``each`` of two tasks, in turns."""
    return [Episode(SUITE, task, state, SEED, horizon) for state in range(each) for task in range(2)]


def speed(ends: list[float], horizon: int) -> float:
    """Control steps per second from the end of the second episode on: until then scenes are built."""
    ends = sorted(ends)
    return (len(ends) - 2) * horizon / (ends[-1] - ends[1])


def workers_speed(horizon: int, each: int) -> float:
    """Of two workers."""
    with ray_crew(2, partial(Simulator, SCENE), StandStill, policy_gpus=0, address=None) as crew:
        found = Play(crew, episodes(horizon, each), batch=2, hang_seconds=300).results(lambda: None)
        return speed([time.monotonic() for _ in found], horizon)


def bare_speed(horizon: int, each: int) -> float:
    """Of two processes without Ray or a policy."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    parts = [episodes(horizon, each)[part::2] for part in range(2)]
    processes = [context.Process(target=_bare, args=(part, results)) for part in parts]
    for process in processes:
        process.start()
    ends = [end for _ in processes for end in results.get()]
    for process in processes:
        process.join()
    return speed(ends, horizon)


def _bare(own: list[Episode], results: Any) -> None:
    env = SCENE.environment(own[0].suite, own[0].task)
    ends = []
    for episode in own:
        env.reset(episode.seed, episode.init_state, SETTLE)
        for _ in range(episode.horizon // CHUNK):
            env.observe()
            for _ in range(CHUNK):
                env.step(SETTLE_ACTION)
        env.observe()
        ends.append(time.monotonic())  # one clock for all processes
    results.put(ends)
    env.close()


def two_workers_over_bare_pair(horizon: int, each: int) -> float:
    ours, bare = [], []
    for _ in range(2):
        bare.append(bare_speed(horizon, each))
        ours.append(workers_speed(horizon, each))
    return float(np.mean(ours) / np.mean(bare))


def make_run(folder: Path) -> Path:
    """A tiny policy on live tokens of Depth-Anything-3's classes."""
    from geomcache.configs.schema import PackConfig
    from geomcache.stages.cli.pack import build_from
    from geomcache.stages.extract.plan import ExtractConfig
    from geomcache.stages.extract.run import run as extract
    from geomcache.stages.train.config import TrainConfig
    from geomcache.stages.train.run import run as train

    def quiet(*_: Any) -> None:
        pass

    recorder.record(recorder.Config(suite=SUITE, tasks=(0,), episodes=1, height=SIDE, width=SIDE), folder / "demos")
    build_from(PackConfig.model_validate({"sources": [folder / "demos"], "out": folder / "pack"}), quiet)
    encoder = {"model": "tiny", "process_size": [56, 56]}
    cache = {"pack": folder / "pack", "out": folder / "cache", "encoder": "depth_anything3", "encoder_config": encoder}
    extract(ExtractConfig.model_validate(cache), quiet)
    data = [{"pack": str(folder / "pack"), "cache": str(folder / "cache")}]
    settings = load_config(
        TrainConfig,
        "train/tiny",
        ["policy.geom_compression_type=pool", "steps=2", "device=cpu"],
        {"data": data, "out": folder / "run"},
    )
    train(settings, quiet)
    return folder / "run"


def batched_over_one_by_one(run: Path) -> float:
    policy = LivePolicy(run, "cpu")
    camera = policy.card.contract.cameras[0]
    with LiberoEnv(SUITE, 0, height=camera.height, width=camera.width, depth=policy.needs_depth) as env:
        env.reset(SEED, 0, SETTLE)
        waiting = [env.observe()] * 8
    seeds = list(range(8))

    def one_by_one() -> None:
        for observation, seed in zip(waiting, seeds, strict=True):
            policy.act([observation], [seed])

    ratios = []
    one_by_one()
    for _ in range(5):
        took = []
        for ask in (one_by_one, lambda: policy.act(waiting, seeds)):
            started = time.perf_counter()
            ask()
            took.append(time.perf_counter() - started)
        ratios.append(took[0] / took[1])
    return float(np.median(ratios))


def episode_shares(run: Path, out: Path, horizon: int) -> tuple[float, dict[str, float]]:
    """With one worker on Ray: transport and waiting are in it. The first episode builds the scene and is left out."""
    config = EvalConfig(run=run, out=out, tasks=(0,), episodes=3, horizon=horizon, workers=1, device="cpu")
    results, _ = evaluate(config, lambda *_: None)
    counted = [episode.seconds for episode in results.episodes[1:]]
    sums = {name: sum(getattr(one, name) for one in counted) for name in type(counted[0]).model_fields}
    share = sum(one.other for one in counted) / sums["total"]
    return share, {name: round(value / len(counted), 3) for name, value in sums.items()}


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    only = arguments.only.split(",") if arguments.only else None
    figures: dict[str, Any] = {}

    def wanted(key: str) -> bool:
        return only is None or key in only

    steps, horizon, each = (80, 48, 3) if arguments.smallest else (160, 96, 7)
    if wanted("lazy_over_eager"):
        figures["lazy_over_eager"] = lazy_over_eager(steps)
    if wanted("two_workers_over_bare_pair"):
        figures["two_workers_over_bare_pair"] = two_workers_over_bare_pair(horizon, each)
    if wanted("batched_over_one_by_one") or wanted("other_share"):
        run = arguments.run or make_run(folder)
        figures["batched_over_one_by_one"] = batched_over_one_by_one(run)
        figures["other_share"], figures["seconds"] = episode_shares(run, folder / "eval", 2 * horizon)
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments)
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures))
    missed = [name for name, limit in LEAST.items() if figures.get(name, limit) < limit]
    missed += [name for name, limit in MOST.items() if figures.get(name, limit) > limit]
    if missed:
        print(f"limit missed: {', '.join(missed)}", file=sys.stderr)
    return int(arguments.strict and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
