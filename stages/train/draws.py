"""Random numbers of training, keyed on what they are for and on nothing else.

Every sample of an optimiser step has its own generator, keyed on (seed, step, place in the step). So a resumed run
draws what the first would have drawn, and so do other numbers of ranks or accumulation parts.
"""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import torch

from geomcache.stages.train import flow


class Draws(NamedTuple):
    """What is random about the loss of B samples."""

    time_BR: torch.Tensor  # float32 in [0, 1)
    noise_BRTA: torch.Tensor  # float32, standard normal
    chance_B: torch.Tensor  # float32 in [0, 1): below ``geom_dropout`` the sample's geometry is masked


def seed_of(*key: object) -> int:
    """A 63-bit seed from a key."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw(keys: Iterable[tuple[object, ...]], repeats: int, chunk_shape: tuple[int, int]) -> Draws:
    """One sample's draws for each key.

    Args:
        keys: B of them.
        repeats: R, draws of (noise, time) per sample.
        chunk_shape: (T, A).
    """
    times, noises, chances = [], [], []
    for key in keys:
        generator = torch.Generator().manual_seed(seed_of(*key))
        times.append(flow.sample_time((repeats,), generator))
        noises.append(torch.randn((repeats, *chunk_shape), generator=generator))
        chances.append(torch.rand((), generator=generator))
    return Draws(torch.stack(times), torch.stack(noises), torch.stack(chances))
