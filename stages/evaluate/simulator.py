"""One simulator of an evaluation: plays an episode in turns, between which the policy is asked.

Cameras render for the step before the policy is asked, and at the video's frame rate where a video is wanted.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import Contract
from geomcache.pipeline.frames import Observation
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.stages.evaluate.metrics import GraspMetrics, MotionMetrics, TrackRecorder
from geomcache.stages.evaluate.pictures import evenly


@dataclass(frozen=True)
class Episode:
    """What to play."""

    suite: str
    task: int
    init_state: int
    seed: int
    horizon: int  # control steps after settling
    video: bool = False


@dataclass(frozen=True)
class Scene:
    """How every episode is played."""

    contract: Contract  # of the checkpoint: cameras and their size
    depth: bool  # whether the live encoder reads depth and camera matrices
    settle_steps: int
    execute_steps: int
    video_fps: int | None = None

    def environment(self, suite: str, task: int) -> LiberoEnv:
        """The task in the simulator; cheap, nothing is built before its first reset."""
        camera = self.contract.cameras[0]
        return LiberoEnv(
            suite,
            task,
            cameras=self.contract.camera_names,
            height=camera.height,
            width=camera.width,
            depth=self.depth,
        )


@dataclass
class Played:
    """An episode that is over."""

    success: bool
    steps: int
    motion: MotionMetrics | None
    grasp: GraspMetrics | None
    seconds: dict[str, float]  # reset, physics, rendering
    frames: list[NDArray[np.uint8]]  # [V, H, W, 3] at some queries and at the end; none where nobody will look
    video: list[NDArray[np.uint8]] = field(default_factory=list)  # the same, at the video's frame rate


Turn = Observation | Played  # the policy is asked, or the episode is over


class Simulator:
    """Plays episodes of any task, one after the other; made cheaply, in the process that will run it."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._env: LiberoEnv | None = None
        self._episode: Episode | None = None

    def begin(self, episode: Episode) -> Turn:
        """Reset to the episode's first observation."""
        self._seconds = {"reset": 0.0, "physics": 0.0, "rendering": 0.0}
        self._episode, self._steps, self._success = episode, 0, False
        self._frames: list[NDArray[np.uint8]] = []
        self._video: list[NDArray[np.uint8]] = []
        self._latest: tuple[int, Observation] | None = None  # (step, what was seen)
        with self._measured("reset"):
            env = self._environment(episode)
            env.reset(episode.seed, episode.init_state, self._scene.settle_steps)
            self._recorder = TrackRecorder(env)
            self._recorder.begin()
        return self._observe()

    def advance(self, chunk_TA: NDArray[np.float32]) -> Turn:
        """Execute the first ``execute_steps`` actions of a chunk, fewer when the episode ends."""
        episode, env = self._episode, self._env
        assert episode is not None
        assert env is not None
        self._recorder.chunk()
        for action_A in chunk_TA[: min(self._scene.execute_steps, episode.horizon - self._steps)]:
            with self._measured("physics"):
                self._success = env.step(action_A)
                self._recorder.step(action_A)
            self._steps += 1
            self._film(env, episode)
            if self._success:
                break
        if not self._success and self._steps < episode.horizon:
            return self._observe()
        last = self._observe().frame.images_BVHWC[0]
        if self._video and self._video[-1] is not last:
            self._video.append(last)  # the moment of success, between two frames
        with self._measured("physics"):
            motion, grasp = self._recorder.metrics(self._success)
        shown = evenly(self._frames) if episode.video or not self._success else []
        return Played(self._success, self._steps, motion, grasp, self._seconds, shown, self._video)

    def close(self) -> None:
        """Free the simulator."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _environment(self, episode: Episode) -> LiberoEnv:
        if self._env is not None and (self._env.task.suite, self._env.task.index) != (episode.suite, episode.task):
            self.close()
        if self._env is None:
            self._env = self._scene.environment(episode.suite, episode.task)
        return self._env

    def _observe(self) -> Observation:
        assert self._env is not None
        assert self._episode is not None
        if self._steps == 0:
            self._film(self._env, self._episode)
        observation = self._seen(self._env)
        self._frames.append(observation.frame.images_BVHWC[0])
        return observation

    def _seen(self, env: LiberoEnv) -> Observation:
        """The observation of this step, rendered once."""
        if self._latest is None or self._latest[0] != self._steps:
            with self._measured("rendering"):
                self._latest = self._steps, env.observe()
        return self._latest[1]

    def _film(self, env: LiberoEnv, episode: Episode) -> None:
        fps = self._scene.video_fps
        if fps is None or not episode.video:
            return
        hz = self._scene.contract.control_rate_hz
        if self._steps == 0 or self._steps * fps // hz > (self._steps - 1) * fps // hz:
            self._video.append(self._seen(env).frame.images_BVHWC[0])

    @contextmanager
    def _measured(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - started
