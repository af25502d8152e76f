"""One simulator of an evaluation: plays an episode in turns, between which the policy is asked.

Cameras render for the step before the policy is asked, and at the video's frame rate where a video is wanted. For a
policy that is blind they render for pictures alone, and what it is given is black.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import Contract
from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.pipeline.sim import suites
from geomcache.pipeline.sim.camera_orbit import CAMERA as TURNED_CAMERA
from geomcache.pipeline.sim.grasp_sensor import goal_holds
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.stages.evaluate.corruption import Corruption, Drawn, EpisodeKey, Given
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
    drawn: Drawn = field(default_factory=Drawn)

    @property
    def key(self) -> EpisodeKey:
        """What makes it this episode."""
        return self.suite, self.task, self.init_state, self.seed


@dataclass(frozen=True)
class Scene:
    """How every episode is played."""

    contract: Contract  # of the checkpoint: cameras and their size
    depth: bool  # whether the live encoder reads depth and camera matrices
    settle_steps: int
    execute_steps: int
    video_fps: int | None = None
    corruption: Corruption = field(default_factory=Corruption)
    blind: bool = False  # the policy reads neither images nor geometry

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
    told_success: bool | None = None  # of what the policy was told instead of the task; see EpisodeResult


Turn = Observation | Played  # the policy is asked, or the episode is over


class Simulator:
    """Plays episodes of any task, one after the other; made cheaply, in the process that will run it."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._env: LiberoEnv | None = None
        self._episode: Episode | None = None
        self._nominal: dict[tuple[str, int], NDArray[np.float64]] = {}  # task -> the unturned camera's pose

    def begin(self, episode: Episode) -> Turn:
        """Reset to the episode's first observation."""
        self._seconds = {"reset": 0.0, "physics": 0.0, "rendering": 0.0}
        self._episode, self._steps, self._success = episode, 0, False
        self._frames: list[NDArray[np.uint8]] = []
        self._video: list[NDArray[np.uint8]] = []
        self._latest: tuple[int, Observation] | None = None  # (step, what was seen)
        with self._measured("reset"):
            env = self._environment(episode)
            self._given = self._changes(env, episode)
            self._reset(env, episode.seed, episode.init_state, episode.drawn.camera_orbit)
            self._recorder = TrackRecorder(env)
            self._recorder.begin()
            told = episode.drawn.told
            self._told_goal = None if told is None else suites.goal_state(episode.suite, told)
            self._told_success = None if self._told_goal is None else goal_holds(env, self._told_goal)
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
                if self._told_goal is not None and self._told_success is False:
                    self._told_success = goal_holds(env, self._told_goal)
            self._steps += 1
            self._film(env, episode)
            if self._success:
                break
        if not self._success and self._steps < episode.horizon:
            return self._observe()
        last = self._look(env, episode)
        if last is not None and self._video and not np.shares_memory(self._video[-1], last.frame.images_BVHWC):
            self._video.append(last.frame.images_BVHWC[0])  # the moment of success, between two frames
        with self._measured("physics"):
            motion, grasp = self._recorder.metrics(self._success)
        shown = evenly(self._frames) if episode.video or not self._success else []
        return Played(
            self._success,
            self._steps,
            motion,
            grasp,
            self._seconds,
            shown,
            self._video,
            told_success=self._told_success,
        )

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

    def _reset(self, env: LiberoEnv, seed: int, init_state: int, orbit: float) -> None:
        env.reset(seed, init_state, self._scene.settle_steps, agentview_orbit=orbit)

    def _changes(self, env: LiberoEnv, episode: Episode) -> Given:
        """What the rulers need of other scenes; the episode's own reset comes after it."""
        corruption, drawn = self._scene.corruption, episode.drawn
        elsewhere, nominal = None, None
        if corruption.shuffle_geometry:
            assert drawn.geometry_of is not None
            self._reset(env, episode.seed, drawn.geometry_of, drawn.geometry_orbit)
            elsewhere = env.observe().frame
        if corruption.nominal_extrinsics:
            view, task = self._scene.contract.camera_names.index(TURNED_CAMERA), (episode.suite, episode.task)
            if task not in self._nominal:
                self._reset(env, episode.seed, episode.init_state, 0.0)
                extrinsics_BV44 = env.observe().frame.extrinsics_BV44
                assert extrinsics_BV44 is not None
                self._nominal[task] = extrinsics_BV44[0, view]
            nominal = view, self._nominal[task]
        return Given(episode.key, corruption, drawn, elsewhere, nominal)

    def _observe(self) -> Observation:
        """What the policy is given now."""
        env, episode = self._env, self._episode
        assert env is not None
        assert episode is not None
        if self._steps == 0:
            self._film(env, episode)
        seen = self._look(env, episode)
        if self._scene.blind or seen is None:
            seen = Observation(self._black(), env.proprioception().state_S, env.instruction)
        return self._given.observation(seen, self._steps)

    def _look(self, env: LiberoEnv, episode: Episode) -> Observation | None:
        """What there is to see now, kept for the filmstrip; None, unrendered, where nobody will look at it."""
        if self._scene.blind and not episode.video:
            return None
        seen = self._seen(env)
        self._frames.append(seen.frame.images_BVHWC[0])
        return seen

    def _black(self) -> FrameBatch:
        cameras = self._scene.contract.cameras
        return FrameBatch(np.zeros((1, len(cameras), cameras[0].height, cameras[0].width, 3), dtype=np.uint8))

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
