"""The one policy of an evaluation: answers whatever observations wait, in batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.pipeline.encoding import one_thread
from geomcache.pipeline.frames import Observation
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.live_policy import LivePolicy


def build_policy(config: EvalConfig, device: str) -> LivePolicy:
    """The policy that ``config`` asks for."""
    return LivePolicy(
        config.run,
        device,
        dict(config.encoder_config),
        averaged=config.averaged,
        without_geometry=config.without_geometry,
    )


@dataclass(frozen=True)
class Answer:
    """Chunks for a batch of observations, and what they cost."""

    chunks_BTA: NDArray[np.float32]  # environment units
    seconds: dict[str, float]  # encoder, vlm, head; of the whole batch


class PolicyWorker:
    """Made cheaply; the first answer loads the weights.

    Args:
        config: of the evaluation.
        device: "cpu" or "cuda".
        fixed_batch: every query has exactly this many samples (the last one repeated), runs on one thread of a CPU and
            pads prompts to the longest one's length: answers do not depend on who else waits. None: as they come.
        instructions: all that may be asked about, for ``fixed_batch`` > 1.
    """

    def __init__(
        self, config: EvalConfig, device: str, fixed_batch: int | None = None, instructions: tuple[str, ...] = ()
    ) -> None:
        self._config, self._device, self._fixed = config, device, fixed_batch
        self._instructions = instructions
        self._policy: LivePolicy | None = None

    def load(self) -> None:
        """Read the weights, so that the first query does not wait for them."""
        self._loaded()

    def act(self, observations: Sequence[Observation], noise_seeds: Sequence[int]) -> Answer:
        """Answer all of them; at most ``fixed_batch``."""
        policy, count = self._loaded(), len(observations)
        if self._fixed is not None:
            missing = self._fixed - count
            observations = [*observations, *[observations[-1]] * missing]
            noise_seeds = [*noise_seeds, *[noise_seeds[-1]] * missing]
        with self._threads():
            chunks = policy.act(observations, noise_seeds)
        return Answer(chunks[:count], policy.take_seconds())

    def close(self) -> None:
        """Forget the weights."""
        self._policy = None

    def _loaded(self) -> LivePolicy:
        if self._policy is None:
            self._policy = build_policy(self._config, self._device)
            if self._fixed is not None and self._fixed > 1:
                self._policy.fix_prompt_length(self._instructions)
        return self._policy

    @contextmanager
    def _threads(self) -> Iterator[None]:
        if self._fixed is not None and torch.device(self._device).type == "cpu":
            with one_thread():
                yield
        else:
            yield
