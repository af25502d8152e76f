"""What ``diagnose`` found, as records: numbers, a few of them for logging, and one plain verdict with a stated rule."""

from typing import Literal

from geomcache.cache_schemas.base import Schema

STANDARD_ERRORS = 2.0  # a mean change counts when it is further from 0 than so many of its standard errors
LARGE_ENOUGH = 0.01  # of the loss: a change that counts and is smaller is called hardly used
HARDLY_MOVED = 0.1  # standard deviations: shuffled tokens that differ by less were nearly the right ones


class Spread(Schema):
    """Mean over samples and its standard error."""

    mean: float
    error: float | None  # std over samples (n - 1) / sqrt(n); None for one sample

    @property
    def counts(self) -> bool:
        """Whether the mean is further from 0 than ``STANDARD_ERRORS`` standard errors."""
        return self.error is not None and abs(self.mean) > STANDARD_ERRORS * self.error


class Effect(Schema):
    """What one change of the geometry tokens does; noise and times are the same with and without it."""

    loss: Spread  # loss with the change less loss without
    actions: Spread  # mean absolute change of a sampled action, normalised units
    tokens_moved: float | None  # root mean square change of the tokens, in standard deviations; None when masked


class Block(Schema):
    """One cross-attending block."""

    vlm_layer: int  # paired with it, 1-based
    mass: tuple[float, ...]  # attention on geometry in each Euler step; mean over heads, action positions, samples
    entropy: tuple[float, ...]  # of that attention in each step, as a share of the log of the real context tokens
    rank: float  # effective rank of a sample's K tokens less their mean, mean over samples; at most K - 1
    rank_over_samples: float | None  # of the samples' K x C tokens less their mean; at most B - 1; None for one sample
    varying_share: float | None  # of the tokens' variance lies between samples: 0 = the same tokens for every scene


class Gates(Schema):
    """Gate values of a compressor that has them, over samples, real tokens and channels."""

    mean: float
    histogram: tuple[float, ...]  # shares in equal bins of [0, 1]

    @property
    def below(self) -> float:
        """Share below 0.1."""
        return self.histogram[0]

    @property
    def above(self) -> float:
        """Share from 0.9 on."""
        return self.histogram[-1]


class Gradient(Schema):
    """Of one module's trainable weights."""

    norm: float
    over_weights: float  # norm / norm of the weights


class Gradients(Schema):
    """Of the loss of ``samples`` samples, one backward in eval mode."""

    samples: int
    compressor: Gradient | None  # None: nothing there is trained
    dit: Gradient | None
    vlm: Gradient | None
    tokens: float  # norm of a sample's loss gradient by its standardised tokens, mean over samples


class Diagnosis(Schema):
    """``measure`` of one batch."""

    samples: int
    draws: int  # of (noise, time) for each sample's loss
    compressor: str
    geometry_tokens: int  # K
    prompt_tokens: float  # real ones, mean over samples
    uniform_share: float  # of attention that geometry would get if all real tokens got the same, mean over samples
    loss: Spread  # with the right geometry
    noise_actions: Spread  # change of a sampled action when only the starting noise is another: a rule to measure by
    shuffled: Effect | None  # each sample with another's tokens; None for one sample
    masked: Effect  # no token is attended to
    zeroed: Effect  # every token at its channels' mean
    blocks: tuple[Block, ...]
    gates: Gates | None
    gradients: Gradients

    @property
    def effects(self) -> dict[str, Effect]:
        """The changes that could be made."""
        every = {"shuffled": self.shuffled, "masked": self.masked, "zeroed": self.zeroed}
        return {name: effect for name, effect in every.items() if effect is not None}

    @property
    def mass(self) -> float:
        """Attention on geometry, mean over blocks and steps."""
        return _mean([value for block in self.blocks for value in block.mass])

    def flat(self) -> dict[str, float]:
        """The few numbers that are worth a curve."""
        found = {"attention_mass": self.mass, "uniform_share": self.uniform_share}
        for name, effect in self.effects.items():
            found[f"{name}_loss_change"] = effect.loss.mean
            found[f"{name}_action_change"] = effect.actions.mean
        found["effective_rank"] = _mean([block.rank for block in self.blocks])
        for name in ("compressor", "dit"):
            if (gradient := self.gradients.dit if name == "dit" else self.gradients.compressor) is not None:
                found[f"{name}_gradient_norm"] = gradient.norm
        if self.gates is not None:
            found["gate_mean"] = self.gates.mean
        return {f"geometry/{name}": value for name, value in found.items()}

    @property
    def used(self) -> Literal["yes", "hardly", "no sign", "harmful", "unreached"] | None:
        """The verdict's word, from the shuffled geometry alone; None where there was nothing to shuffle."""
        if self.shuffled is None or not self.shuffled.tokens_moved:
            return None
        loss = self.shuffled.loss
        if loss.mean == 0 and self.shuffled.actions.mean == 0:
            return "unreached"
        if not loss.counts:
            return "no sign"
        if loss.mean < 0:
            return "harmful"
        return "yes" if loss.mean >= LARGE_ENOUGH * self.loss.mean else "hardly"

    def verdict(self) -> str:
        """One plain sentence. The rule: the shuffled loss's mean change against twice its standard error, and 1 %."""
        used = self.used
        if self.shuffled is None or used is None:
            what = "one row cannot be" if self.samples == 1 else "all rows have the same geometry, which cannot be"
            return f"no verdict: {what} shuffled; measure other rows, or more of them"
        if used == "unreached":
            return "shuffled geometry changes nothing at all: what the tokens say does not reach the actions"
        percent = 100 / self.loss.mean
        loss, direction = self.shuffled.loss, "raises" if self.shuffled.loss.mean > 0 else "lowers"
        assert loss.error is not None, "several rows"
        sentence = (
            f"shuffled geometry {direction} the loss by {abs(loss.mean) * percent:.2g} % "
            f"(+- {STANDARD_ERRORS * loss.error * percent:.2g} %, two standard errors over {self.samples} rows): "
        )
        sentence += {
            "yes": "this policy uses its geometry",
            "hardly": "this policy hardly uses its geometry",
            "no sign": "within its spread, no sign that this policy uses its geometry",
            "harmful": "on these rows its geometry misleads this policy",
        }[used]
        moved = self.shuffled.tokens_moved
        if moved is not None and moved < HARDLY_MOVED:
            sentence += f"; but the tokens of different rows are only {moved:.2g} standard deviations apart"
        return sentence


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
