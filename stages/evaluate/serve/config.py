"""What ``geomcache serve`` is told, and which policies the protocol can feed; everything is checked before loading."""

import ipaddress
from pathlib import Path

from pydantic import Field

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.devices import resolve_device
from geomcache.stages.evaluate.live_policy import LivePolicy, reads_depth, require_contract, require_possible
from geomcache.stages.evaluate.serve.session import require_known_cameras
from geomcache.stages.train.checkpoint import CheckpointCard, latest_checkpoint, read_card

_SHORTEST_TOKEN = 16  # characters


class ServeConfig(Schema):
    """``geomcache serve``. Encoder, codec, cameras, orientation and normalisation come from the checkpoint."""

    run: Path  # a run folder of geomcache train, or one checkpoint of it
    host: str = "127.0.0.1"  # any other than this machine's own needs a token
    port: int = Field(default=8000, ge=0, le=65535)  # 0: a free one
    token: str | None = Field(default=None, repr=False)  # what clients must know
    execute_steps: int = Field(default=8, ge=1)  # actions executed per query of the policy
    seed: int = 7  # of the policy's noise
    averaged: bool = True  # act with the averaged weights (EMA) where the checkpoint has them
    without_geometry: bool = False  # mask every geometry token
    device: str = "auto"
    max_batch: int = Field(default=16, ge=1)  # observations answered at once
    max_clients: int = Field(default=64, ge=1)
    max_message_mb: float = Field(default=16.0, gt=0)
    idle_seconds: float = Field(default=300.0, gt=0)  # a client that neither sends nor reads for so long is closed
    encoder_config: dict[str, object] = Field(default_factory=dict)  # e.g. where the same weights lie on this machine


def load_served_policy(config: ServeConfig) -> LivePolicy:
    """The policy, after everything that the settings alone can tell has been checked.

    Raises:
        GeomcacheError: no checkpoint; a policy that the protocol cannot feed; no token where there must be one.
    """
    _require_token(config)
    checkpoint = latest_checkpoint(config.run)
    card = read_card(checkpoint)
    _require_servable(config, card)
    device = resolve_device(config.device)
    return LivePolicy(
        checkpoint,
        device,
        dict(config.encoder_config),
        averaged=config.averaged,
        without_geometry=config.without_geometry,
    )


def _require_servable(config: ServeConfig, card: CheckpointCard) -> None:
    require_possible(card, execute_steps=config.execute_steps, without_geometry=config.without_geometry)
    require_known_cameras(card.contract)
    arriving = Contract(image_orientation="upright", cameras=card.contract.cameras, has_depth=False)
    require_contract(card, arriving, needs_depth=False)
    if card.recipe is not None and not config.without_geometry and reads_depth(card, dict(config.encoder_config)):
        raise InputError(
            f"the encoder {card.recipe.encoder.name} cannot be served",
            expected="an encoder that needs images only: the protocol sends neither depth nor camera matrices",
            found=f"{card.recipe.encoder.name} reads depth or camera matrices",
            fix="geomcache eval runs this policy; --without-geometry serves it with its geometry masked",
        )


def _require_token(config: ServeConfig) -> None:
    fix = "export GEOMCACHE_TOKEN=$(python -c 'import secrets; print(secrets.token_urlsafe())')"
    if config.token is None:
        if _is_loopback(config.host):
            return
        raise InputError(
            f"{config.host} can be reached from other machines",
            expected="a token that clients must know, in GEOMCACHE_TOKEN or --token",
            found="none",
            fix=f"{fix}; or leave out --host",
        )
    if len(config.token) < _SHORTEST_TOKEN or not (config.token.isascii() and config.token.isprintable()):
        raise InputError(
            "the token cannot be used",
            expected=f"at least {_SHORTEST_TOKEN} printable ASCII characters",
            found=f"{len(config.token)} characters",
            fix=fix,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
