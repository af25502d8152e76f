"""Small helpers for what is built from a config: seeded weights, checked options, the layer pairing."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from geomcache.cache_schemas.errors import ConfigError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline import plugins
from geomcache.pipeline.config_errors import parse_config


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random initial weights that depend on ``seed`` alone; the global generator is as before afterwards.

    Each module is seeded by itself, so policies that differ in one module start from the same other weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
        yield


def parse_options(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """The ``Config`` of a plug-in from plain options.

    Raises:
        UnknownName: there is no such plug-in.
        ConfigError: an option is unknown or has a wrong value.
    """
    return parse_config(plugins.config_class(kind, name), options, f"{kind} {name}")


def compressors_for(spec: TokenSpec) -> list[str]:
    """The compressors that can read these tokens, with their default options."""
    names = [name for name in plugins.names("compressor") if name != "none"]
    if spec.pooled_to is not None:
        names = [
            name
            for name in names
            if plugins.load("compressor", name).reads_pooled(plugins.config_class("compressor", name)())
        ]
    return names


def require_fitting_tokens(name: str, reads_pooled: bool, spec: TokenSpec, num_tokens: int) -> None:
    """Refuse a pooled cache that a compressor cannot use as it would use the full tokens.

    Args:
        name: of the compressor.
        reads_pooled: with its options it gives the same from group means as from the tokens themselves.
        spec: of the cache.
        num_tokens: K that the compressor makes.

    Raises:
        ConfigError: the compressor looks at single tokens or their places, or makes another number of groups than
            the cache keeps.
    """
    if spec.pooled_to is None:
        return
    if not reads_pooled:
        raise ConfigError(
            f"compressor {name!r} reads every token, and this cache keeps {spec.pooled_to} means of groups",
            expected="a full cache (or compressor pool or per_layer, without view_embedding and position_embedding)",
            found=f"a cache pooled to {spec.pooled_to}",
            fix="train on the cache that it was derived from, or geomcache extract without --pool",
        )
    if num_tokens != spec.pooled_to:  # means of means weigh wrongly where tokens are missing
        raise ConfigError(
            "geom_dit_tokens (K) does not fit the pooled cache",
            expected=str(spec.pooled_to),
            found=str(num_tokens),
            fix=f"--set policy.geom_dit_tokens={spec.pooled_to}",
        )


def pair_layers(num_layers: int, num_blocks: int, explicit: Sequence[int] | None = None) -> tuple[int, ...]:
    """Which VLM layer each cross-attending DiT block looks at.

    Layer n (1-based) is the output of the n-th decoder layer: index n of transformers' ``hidden_states``.
    Without ``explicit`` the blocks are spread evenly, ceil((i + 1) * num_layers / num_blocks) for block i:
    the last block always sees the last layer, and with more blocks than layers neighbours share one.

    Raises:
        ConfigError: ``explicit`` has another length than blocks, an entry out of range, or is not ascending.
    """
    if explicit is None:
        return tuple(-(-(block + 1) * num_layers // num_blocks) for block in range(num_blocks))
    pairing = tuple(explicit)
    in_range = all(1 <= layer <= num_layers for layer in pairing)
    if len(pairing) != num_blocks or not in_range or list(pairing) != sorted(pairing):
        raise ConfigError(
            "vlm_layers cannot be paired with the DiT's blocks",
            expected=f"{num_blocks} ascending layer numbers between 1 and {num_layers}",
            found=str(list(pairing)),
            fix="correct vlm_layers, or leave it out to spread the blocks evenly",
        )
    return pairing
