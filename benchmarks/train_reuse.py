"""Keys and values of the context once per sample, beside the plain way; the numbers must be equal in the same run.

Plain training repeats every layer's context R times and makes its keys and values anew for each draw (as the published
code does); plain sampling makes them anew in each Euler step. The VLM is not in these times: it runs once either way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from cache_common import Rows, over, seconds, take_turns

from geomcache.stages.train import flow
from geomcache.stages.train.batch import GeomTokens
from geomcache.stages.train.dit import Config, DiT

PROMPT, TOKENS, DRAWS, STEPS = 160, 16, 4, 4  # S, K, R, Euler steps


@dataclass(frozen=True)
class Head:
    """A DiT with a batch of what it is given: states of the VLM that want gradients, as while training."""

    dit: DiT
    hidden_LBSC: list[torch.Tensor]
    geom_LBKC: torch.Tensor
    proprio_BP: torch.Tensor
    noisy_BRTA: torch.Tensor
    time_BR: torch.Tensor

    @classmethod
    def random(cls, width: int, blocks: int, batch: int) -> "Head":
        torch.manual_seed(0)
        config = Config(width=width, blocks=blocks)
        return cls(
            DiT(config, context_dim=width),
            [torch.randn(batch, PROMPT, width, requires_grad=True) for _ in range(blocks)],
            torch.randn(blocks, batch, TOKENS, width, requires_grad=True),
            torch.randn(batch, config.state_dim),
            torch.randn(batch, DRAWS, config.horizon, config.action_dim),
            torch.rand(batch, DRAWS),
        )

    def velocity(self, repeats: int, noisy_BRTA: torch.Tensor, time_BR: torch.Tensor) -> torch.Tensor:
        """Context, then velocity; ``repeats`` > 1: every sample stands there so often, with one draw each."""
        B, K = self.geom_LBKC.shape[1:3]
        geom = GeomTokens(
            self.geom_LBKC.repeat_interleave(repeats, dim=1), torch.ones(B * repeats, K, dtype=torch.bool)
        )
        hidden_LBSC = [hidden_BSC.repeat_interleave(repeats, dim=0) for hidden_BSC in self.hidden_LBSC]
        context = self.dit.encode_context(hidden_LBSC, torch.ones(B * repeats, PROMPT, dtype=torch.bool), geom)
        noisy_BRTA = noisy_BRTA.reshape(B * repeats, -1, *noisy_BRTA.shape[2:])
        proprio_BP = self.proprio_BP.repeat_interleave(repeats, dim=0)
        found: torch.Tensor = self.dit(noisy_BRTA, time_BR.reshape(B * repeats, -1), proprio_BP, context)
        return found

    def train(self, repeats: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(velocities, gradient of the first layer's states) of one forward and backward pass."""
        self.dit.zero_grad(set_to_none=True)
        for leaf in (*self.hidden_LBSC, self.geom_LBKC):
            leaf.grad = None
        velocity = self.velocity(repeats, self.noisy_BRTA, self.time_BR)
        velocity.square().mean().backward()  # type: ignore[no-untyped-call]
        gradient = self.hidden_LBSC[0].grad
        assert gradient is not None
        return velocity.detach().reshape(self.noisy_BRTA.shape), gradient

    @torch.no_grad()
    def sample_reused(self) -> torch.Tensor:
        """As ``PolicyNet.sample`` goes on from the VLM's states."""
        B, K = self.geom_LBKC.shape[1:3]
        geom = GeomTokens(self.geom_LBKC, torch.ones(B, K, dtype=torch.bool))
        context = self.dit.encode_context(self.hidden_LBSC, torch.ones(B, PROMPT, dtype=torch.bool), geom)
        return flow.euler(
            lambda x_B1TA, t: self.dit(x_B1TA, t.expand(B, 1), self.proprio_BP, context),
            self.noisy_BRTA[:, :1],
            STEPS,
        )

    @torch.no_grad()
    def sample_plain(self) -> torch.Tensor:
        """The context anew in each step."""
        B = self.geom_LBKC.shape[1]
        return flow.euler(lambda x_B1TA, t: self.velocity(1, x_B1TA, t.expand(B, 1)), self.noisy_BRTA[:, :1], STEPS)


def measure_reuse(width: int, blocks: int, batch: int, rounds: int) -> dict[str, float]:
    """Plain time over ours, and ours in seconds."""
    head = Head.random(width, blocks, batch)
    for ours, plain in zip(head.train(1), head.train(DRAWS), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    torch.testing.assert_close(head.sample_reused(), head.sample_plain(), rtol=1e-3, atol=1e-4)
    figures: dict[str, float] = {}
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "train": (partial(head.train, 1), partial(head.train, DRAWS)),
        "sample": (head.sample_reused, head.sample_plain),
    }
    for name, (reused, repeated) in ways.items():
        pair: dict[str, Callable[[Rows], float]] = {"ours": partial(_timed, reused), "plain": partial(_timed, repeated)}
        times = take_turns(pair, [np.zeros(0, np.int64)] * rounds)
        figures[f"kv_reuse_{name}"] = over(times, "ours", "plain")
        figures[f"seconds_kv_reuse_{name}"] = float(np.median(times["ours"]))
    return figures


def _timed(work: Callable[[], object], _: Rows) -> float:
    return seconds(work)
