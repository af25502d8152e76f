"""Closed-loop evaluation over tasks and shipped initial states; results survive a stop and are continued."""

from collections.abc import Callable
from pathlib import Path

import geomcache
from geomcache.cache_schemas.base import Schema, VersionedSchema
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.devices import resolve_device
from geomcache.pipeline.files import require_own_folder, write_atomic, write_config
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.suites import horizon as suite_horizon
from geomcache.pipeline.sim.suites import task_count, task_info
from geomcache.pipeline.sim.system import require_simulator
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.live_policy import LivePolicy, require_belief
from geomcache.stages.evaluate.pictures import filmstrip
from geomcache.stages.evaluate.rollout import roll_out
from geomcache.stages.evaluate.statistics import wilson_interval
from geomcache.stages.train.checkpoint import weights_digest

RESULTS_NAME = "results.json"
Progress = Callable[[int, int, str], None]  # (episodes done, episodes in all, text)


class EpisodeResult(Schema):
    """One episode."""

    suite: str
    task: int
    task_name: str
    init_state: int
    seed: int
    success: bool
    steps: int
    queries: int


class TaskResult(Schema):
    """Success over the episodes of one task, with the 95 % Wilson interval."""

    suite: str
    task: int
    instruction: str
    episodes: int
    successes: int
    rate: float
    low: float
    high: float
    filmstrip: str  # picture of the task's first episode


class EvalResults(VersionedSchema):
    """results.json."""

    config: EvalConfig
    checkpoint_weights: str  # digest of the checkpoint's weights, the averaged ones included
    checkpoint_step: int
    horizon: int
    geomcache_version: str
    finished: bool
    episodes: tuple[EpisodeResult, ...]
    tasks: tuple[TaskResult, ...]
    successes: int
    rate: float
    low: float
    high: float


def run(config: EvalConfig, progress: Progress) -> tuple[EvalResults, bool]:
    """Evaluate; returns (results, True when they stood already). Finished episodes of a stopped run are kept.

    Raises:
        GeomcacheError: no checkpoint, an unknown suite or task, a missing simulator, a mismatch; all by name before
            the first episode.
    """
    require_own_folder(config.out, lambda folder: (folder / RESULTS_NAME).exists(), "evaluation results")
    require_simulator()
    tasks = config.tasks if config.tasks is not None else tuple(range(task_count(config.suite)))
    for task in tasks:
        _require_init_states(config, task)
    weights, policy = _load_policy(config)
    done = _finished_episodes(config, weights)
    total, finished_before = len(tasks) * config.episodes, len(done)
    results = _Results(config, policy, weights, done)
    results.write(finished=False)
    write_config(config.out, config)
    progress(len(done), total, "")
    for task in tasks:
        states = range(config.first_init_state, config.first_init_state + config.episodes)
        missing = [state for state in states if (task, state) not in done]
        if missing:
            _run_task(config, task, missing, policy, results, progress, total)
    return results.write(finished=True), finished_before == total


def _load_policy(config: EvalConfig) -> tuple[str, LivePolicy]:
    policy = LivePolicy(
        config.run,
        resolve_device(config.device),
        dict(config.encoder_config),
        averaged=config.averaged,
        without_geometry=config.without_geometry,
    )
    card = policy.card
    require_belief("encoder", config.encoder, card.recipe.encoder.name if card.recipe else "none")
    require_belief("cameras", config.cameras, card.contract.camera_names)
    require_belief("image_orientation", config.image_orientation, card.contract.image_orientation)
    if config.without_geometry and card.recipe is None:
        raise InputError(
            "this policy has no geometry to leave out",
            expected="a run of another compressor than none",
            found=str(config.run),
            fix="leave out without_geometry",
        )
    if config.execute_steps > policy.horizon:
        raise InputError(
            "execute_steps is longer than the policy's action chunk",
            expected=f"at most {policy.horizon}",
            found=str(config.execute_steps),
            fix=f"--set execute_steps={policy.horizon}",
        )
    return weights_digest(card), policy


def _require_init_states(config: EvalConfig, task: int) -> None:
    available = task_info(config.suite, task).n_init_states
    if config.first_init_state + config.episodes > available:
        raise InputError(
            f"{config.suite} task {task} has too few initial states",
            expected=f"first_init_state + episodes <= {available}",
            found=f"{config.first_init_state} + {config.episodes}",
            fix=f"--episodes {max(1, available - config.first_init_state)}",
        )


def _run_task(
    config: EvalConfig,
    task: int,
    init_states: list[int],
    policy: LivePolicy,
    results: "_Results",
    progress: Progress,
    total: int,
) -> None:
    camera = policy.card.contract.cameras[0]
    with LiberoEnv(
        config.suite,
        task,
        cameras=policy.card.contract.camera_names,
        height=camera.height,
        width=camera.width,
        depth=policy.needs_depth,
    ) as env:
        policy.require_contract(env.contract)
        horizon = config.horizon or env.horizon
        for init_state in init_states:
            done = len(results.episodes)

            def on_step(steps: int, done: int = done, init_state: int = init_state) -> None:
                progress(done, total, f"task {task}, initial state {init_state}, step {steps}/{horizon}")

            rollout = roll_out(
                env,
                policy,
                seed=config.seed,
                init_state=init_state,
                settle_steps=config.settle_steps,
                execute_steps=config.execute_steps,
                horizon=horizon,
                on_step=on_step,
            )
            if init_state == config.first_init_state:
                filmstrip(rollout.frames, config.out / filmstrip_name(task))
            results.add(
                EpisodeResult(
                    suite=config.suite,
                    task=task,
                    task_name=env.task.name,
                    init_state=init_state,
                    seed=config.seed,
                    success=rollout.success,
                    steps=rollout.steps,
                    queries=rollout.queries,
                )
            )
            results.write(finished=False)
            progress(done + 1, total, "success" if rollout.success else "failure")


def filmstrip_name(task: int) -> str:
    """Picture of a task's first episode, relative to the results."""
    return f"filmstrips/task_{task:02d}.png"


def _finished_episodes(config: EvalConfig, weights: str) -> dict[tuple[int, int], EpisodeResult]:
    path = config.out / RESULTS_NAME
    if not path.exists():
        return {}
    standing = EvalResults.read(path, InputError)
    differences = standing.config.identity().describe_difference(config.identity())
    differences += [] if standing.checkpoint_weights == weights else ["the checkpoint's weights"]
    if differences and standing.episodes:
        raise InputError(
            f"{config.out} holds results of another evaluation",
            expected="the same configuration and checkpoint, to continue it",
            found="; ".join(differences),
            fix="choose another --out",
        )
    return {(episode.task, episode.init_state): episode for episode in standing.episodes}


class _Results:
    """Collects episodes and writes results.json after each."""

    def __init__(
        self, config: EvalConfig, policy: LivePolicy, weights: str, done: dict[tuple[int, int], EpisodeResult]
    ) -> None:
        self._config, self._policy, self._weights = config, policy, weights
        self.episodes = list(done.values())

    def add(self, episode: EpisodeResult) -> None:
        self.episodes.append(episode)

    def write(self, *, finished: bool) -> EvalResults:
        config = self._config
        tasks = []
        for task in sorted({episode.task for episode in self.episodes}):
            own = [episode.success for episode in self.episodes if episode.task == task]
            low, high = wilson_interval(sum(own), len(own))
            info = task_info(config.suite, task)
            tasks.append(
                TaskResult(
                    suite=config.suite,
                    task=task,
                    instruction=info.instruction,
                    episodes=len(own),
                    successes=sum(own),
                    rate=sum(own) / len(own),
                    low=low,
                    high=high,
                    filmstrip=filmstrip_name(task),
                )
            )
        successes, trials = sum(episode.success for episode in self.episodes), len(self.episodes)
        low, high = wilson_interval(successes, trials)
        results = EvalResults(
            config=config,
            checkpoint_weights=self._weights,
            checkpoint_step=self._policy.card.step,
            horizon=config.horizon or suite_horizon(config.suite),
            geomcache_version=geomcache.__version__,
            finished=finished,
            episodes=tuple(sorted(self.episodes, key=lambda episode: (episode.task, episode.init_state))),
            tasks=tuple(tasks),
            successes=successes,
            rate=successes / max(1, trials),
            low=low,
            high=high,
        )
        write_atomic(config.out / RESULTS_NAME, results.model_dump_json(indent=2))
        return results


def read_results(folder: Path) -> EvalResults:
    """results.json of an evaluation."""
    path = folder / RESULTS_NAME
    return EvalResults.read(path, InputError)
