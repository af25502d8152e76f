"""The data contract: what an episode and a batch of frames hold, one comment a field.

Shape letters: B batch, V views, H,W image, T steps, A action dim, S state dim.
Images are true upright RGB; extrinsics are camera-to-robot-base in OpenCV axes (x right, y down, z forward).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FrameBatch:
    """B time steps with all their views, as encoders take them."""

    images_BVHWC: NDArray[np.uint8]  # [B, V, H, W, 3] RGB, upright
    depth_BVHW: NDArray[np.float32] | None = None  # [B, V, H, W] metres along the optical axis
    intrinsics_BV33: NDArray[np.float64] | None = None  # [B, V, 3, 3] pixels
    extrinsics_BV44: NDArray[np.float64] | None = None  # [B, V, 4, 4] camera-to-robot-base, metres

    def __len__(self) -> int:
        return len(self.images_BVHWC)

    def __getitem__(self, rows: "slice | NDArray[np.int64]") -> "FrameBatch":
        return FrameBatch(
            self.images_BVHWC[rows],
            None if self.depth_BVHW is None else self.depth_BVHW[rows],
            None if self.intrinsics_BV33 is None else self.intrinsics_BV33[rows],
            None if self.extrinsics_BV44 is None else self.extrinsics_BV44[rows],
        )

    @classmethod
    def join(cls, parts: Sequence["FrameBatch"]) -> "FrameBatch":
        """The rows of several batches of one kind, in order."""
        joined: dict[str, Any] = {}
        for field_ in fields(cls):
            arrays = [getattr(part, field_.name) for part in parts]
            joined[field_.name] = None if arrays[0] is None else np.concatenate(arrays)
        return cls(**joined)


@dataclass(frozen=True)
class Observation:
    """What a policy is given at one time step; the live twin of one pack row."""

    frame: FrameBatch  # B = 1
    state_S: NDArray[np.float32]  # [8] see Contract.state_layout
    instruction: str


@dataclass(frozen=True)
class EpisodeHead:
    """What is known of one demonstration without decoding a frame; row t is (observation BEFORE action t, action t).

    Where only every k-th control step was observed, row r is the observation before action r * k, and the actions r * k
    to r * k + k - 1 are its own; the last row may have fewer.
    """

    where: str  # file and episode as a person finds them: "x_demo.hdf5: data/demo_3"
    suite: str  # LIBERO's suite, "unknown" where the data set does not say
    task: str  # LIBERO's task name
    number: int  # of the episode within its task or data set
    instruction: str
    actions_TA: NDArray[np.float32]  # [T, 7] of every control step, in the convention of Contract.action_layout
    succeeded: bool | None = None  # None: the data set does not say
    metadata: dict[str, str] = field(default_factory=dict)  # recorder's seed, init state, noise; shown in the index
    steps_per_row: int = 1  # k: control steps from one row to the next
    perturbed_T: NDArray[np.bool_] | None = None  # [T] the executed action carried a push; None: never said

    def __len__(self) -> int:
        """Rows."""
        return -(-len(self.actions_TA) // self.steps_per_row)


@dataclass(frozen=True)
class EpisodeRows:
    """Some consecutive rows of one demonstration."""

    frames: FrameBatch  # B = rows
    states_TS: NDArray[np.float32]  # [rows, 8] see Contract.state_layout

    def __len__(self) -> int:
        return len(self.states_TS)

    def take(self, rows: NDArray[np.int64]) -> "EpisodeRows":
        """Only these rows."""
        return EpisodeRows(self.frames[rows], self.states_TS[rows])
