"""The configuration of closed-loop evaluation."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.stages.evaluate.corruption import Corruption

Mode = Literal["auto", "reproducible", "throughput"]


class EvalConfig(Schema):
    """``geomcache eval``: success of a trained policy in the LIBERO simulator.

    Encoder, codec, cameras, orientation and normalisation come from the checkpoint. The keys of the last block
    state what you believe the checkpoint holds: a difference is an error, never a change.
    """

    run: Path  # a run folder of geomcache train, or one checkpoint of it
    out: Path
    suites: tuple[str, ...] = ("libero_object",)
    tasks: tuple[int, ...] | None = None  # of every suite; None: all its tasks
    episodes: int = Field(
        default=10, ge=1
    )  # per task and seed; episode i starts from shipped initial state first_init_state + i
    first_init_state: int = Field(default=0, ge=0)
    seeds: tuple[int, ...] = (7,)  # of the scene's fixtures and the policy's noise; every episode is run with each
    execute_steps: int = Field(default=8, ge=1)  # actions executed per query of the policy
    settle_steps: int = Field(default=10, ge=0)  # steps with an open gripper before the first query
    horizon: int | None = Field(default=None, ge=1)  # control steps; None: the community's limit for the suite
    averaged: bool = True  # act with the averaged weights (EMA) where the checkpoint has them
    without_geometry: bool = False  # mask every geometry token; train with geom_dropout for a policy that knows this
    # Another test than the plain one, said wherever its result is shown: the agent-view camera is turned about the
    # middle of the workspace, by an angle of its own for every episode (the largest one here, degrees); rulers.
    camera_orbit: float = Field(default=0.0, ge=0, le=60)
    corruption: Corruption = Corruption()
    mode: Mode = "auto"  # reproducible: the same episodes for any number of workers; auto: that on a CPU
    batch_size: int | None = Field(default=None, ge=1)  # reproducible: of every query, 1; throughput: the most, workers
    device: str = "auto"
    # Simulators side by side, each a process on Ray; None: one less than the CPUs; 0: one, in this process, without Ray
    # (for debugging: nobody replaces it when it crashes or hangs).
    workers: int | None = Field(default=None, ge=0)
    ray_address: str | None = None  # an existing cluster; None: a local one for this evaluation
    hang_seconds: float = Field(default=120.0, gt=0)  # a simulator that does not answer for so long is replaced
    video_fps: int | None = Field(default=None, ge=1, le=20)  # of one video per task; None: filmstrips only
    encoder_config: dict[str, object] = Field(default_factory=dict)  # e.g. where the same weights lie on this machine

    @field_validator("suites", "tasks", "seeds")
    @classmethod
    def _each_once(cls, values: tuple[object, ...] | None) -> tuple[object, ...] | None:
        if values is not None and (not values or len(set(values)) != len(values)):
            raise ValueError(f"at least one, none twice (leave it out for the default), not {list(values)}")
        return values

    @field_validator("seeds")
    @classmethod
    def _seeds_fit(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not all(0 <= seed < 2**32 for seed in seeds):
            raise ValueError(f"numpy's seeds go from 0 to 2**32 - 1, not {list(seeds)}")
        return tuple(sorted(seeds))  # so that a task's first episode does not depend on how they were given

    def describe_changes(self) -> list[str]:
        """What makes this another test than the plain one, in words: camera orbit and rulers; empty for nothing."""
        orbit = [f"camera orbit ±{self.camera_orbit:g}°"] if self.camera_orbit else []
        return orbit + self.corruption.describe()

    def identity(self) -> Self:
        """Without where things lie and how they are run; weights are compared by digest.

        Device, mode and batch size are compared as they were resolved (``Conditions``). Suites, tasks, episodes and
        seeds are not: more of them can be added to a finished evaluation.
        """
        elsewhere = ("out", "run", "encoder_config", "workers", "ray_address", "hang_seconds", "video_fps")
        resolved = ("device", "mode", "batch_size", "encoder", "cameras", "image_orientation")
        more = ("suites", "tasks", "episodes", "first_init_state", "seeds")
        defaults = {
            name: EvalConfig.model_fields[name].get_default(call_default_factory=True)
            for name in elsewhere + resolved + more
        }
        return self.model_copy(update={**defaults, "out": Path(), "run": Path()})

    encoder: str | None = None
    cameras: tuple[str, ...] | None = None
    image_orientation: ImageOrientation | None = None
