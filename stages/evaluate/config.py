"""The configuration of closed-loop evaluation."""

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import ImageOrientation


class EvalConfig(Schema):
    """``geomcache eval``: success of a trained policy in the LIBERO simulator.

    Encoder, codec, cameras, orientation and normalisation come from the checkpoint. The keys of the last block
    state what you believe the checkpoint holds: a difference is an error, never a change.
    """

    run: Path  # a run folder of geomcache train, or one checkpoint of it
    out: Path
    suite: str = "libero_object"
    tasks: tuple[int, ...] | None = None  # None: every task of the suite
    episodes: int = Field(
        default=10, ge=1
    )  # per task; episode i starts from shipped initial state first_init_state + i
    first_init_state: int = Field(default=0, ge=0)
    seed: int = Field(default=7, ge=0, lt=2**32)
    execute_steps: int = Field(default=8, ge=1)  # actions executed per query of the policy
    settle_steps: int = Field(default=10, ge=0)  # steps with an open gripper before the first query
    horizon: int | None = Field(default=None, ge=1)  # control steps; None: the community's limit for the suite
    averaged: bool = True  # act with the averaged weights (EMA) where the checkpoint has them
    without_geometry: bool = False  # mask every geometry token; train with geom_dropout for a policy that knows this
    device: str = "auto"
    encoder_config: dict[str, object] = Field(default_factory=dict)  # e.g. where the same weights lie on this machine

    @field_validator("tasks")
    @classmethod
    def _each_task_once(cls, tasks: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if tasks is not None and (not tasks or len(set(tasks)) != len(tasks)):
            raise ValueError(f"at least one task, none twice (leave tasks out for the whole suite), not {list(tasks)}")
        return tasks

    def identity(self) -> Self:
        """Without where things lie; the checkpoint's weights and the encoder's are compared by digest."""
        return self.model_copy(update={"out": Path(), "run": Path(), "encoder_config": {}})

    encoder: str | None = None
    cameras: tuple[str, ...] | None = None
    image_orientation: ImageOrientation | None = None
