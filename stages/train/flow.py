"""Conditional flow matching on action chunks: pure functions, no modules.

The path runs from noise at t = 0 to data at t = 1 (GR00T's direction; openpi's code runs the other way, with
the opposite sign):

    x_t      = (1 - t) * noise + t * action
    velocity = action - noise                      (the regression target, constant along a path)
    t        = max(0, (0.999 - u) / 0.999),  u ~ Beta(1.5, 1)

Beta(1.5, 1) has the density 1.5 * sqrt(u), so u is mostly near 1 and t mostly near 0: training dwells on the
noisy end. Drawing t itself from Beta(1.5, 1) would reverse that.
Sources: Lipman et al., "Flow Matching for Generative Modeling", 2023; Black et al., "pi0", 2024, appendix B
(the shifted Beta distribution and the cut-off 0.999); GR00T N1, 2025.
"""

from collections.abc import Callable

import torch

CUTOFF = 0.999
BETA_A = 1.5  # Beta(BETA_A, 1): the inverse of its distribution function is r -> r ** (1 / BETA_A)


def sample_time(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Times in [0, 1], float32 of ``shape``, on the generator's device; exact (inverse of the CDF)."""
    r = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)
    u = r ** (1.0 / BETA_A)
    return ((CUTOFF - u) / CUTOFF).clamp(min=0.0)


def time_cdf(t: torch.Tensor) -> torch.Tensor:
    """P(time <= t) of ``sample_time``: 1 - (0.999 (1 - t)) ** 1.5 for t in [0, 1]; 0.0015 at t = 0."""
    return 1.0 - (CUTOFF * (1.0 - t)) ** BETA_A


def interpolate(noise: torch.Tensor, action: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t on the straight path; ``t`` [...] is broadcast over the trailing [T, A] of noise and action."""
    t = t[..., None, None]
    return (1.0 - t) * noise + t * action


def velocity_target(noise: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """d x_t / dt = action - noise."""
    return action - noise


def euler(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, steps: int
) -> torch.Tensor:
    """Integrate from noise (t = 0) to data (t = 1) in equal Euler steps, evaluated at t = i / steps.

    Args:
        velocity: (x, t) -> dx/dt; x has the shape of ``noise``, t is a float32 scalar tensor.
        noise: the starting point.
        steps: number of evaluations, at least 1.
    """
    x = noise
    for i in range(steps):
        t = torch.tensor(i / steps, dtype=torch.float32, device=noise.device)
        x = x + velocity(x, t) / steps
    return x
