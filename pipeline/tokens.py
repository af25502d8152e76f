"""Tokens made live, and what describes them; the cached twin lives in ``pipeline/store``.

Live tokens go through the codec and back, so that they carry the same rounding as tokens read from a cache.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.fingerprint import NOT_IN_FINGERPRINT, Fingerprint, digest_json
from geomcache.cache_schemas.manifest import EncoderRecord, TokenRecipe
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline import plugins
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.image_path import IMAGE_PATH_VERSION
from geomcache.pipeline.interfaces import GeometryEncoder, TokenCodec


def build_encoder(
    name: str, config: Mapping[str, Any], contract: Contract, device: str | None = "cpu"
) -> GeometryEncoder:
    """Build an encoder plug-in from plain settings and load its weights.

    Args:
        name: file name under ``pipeline/encoders``.
        config: settings as read from YAML or from a manifest's ``EncoderRecord``.
        contract: conventions of the frames it will see.
        device: "cpu", "cuda", "cuda:1", ...; None leaves the weights unloaded (``spec`` is known anyway).

    Raises:
        UnknownName: no such encoder.
        ConfigError: unknown or wrong settings.
        InputError: the contract or the weights do not fit.
    """
    settings = parse_config(plugins.config_class("encoder", name), config, f"encoder {name}")
    encoder = cast(GeometryEncoder, plugins.load("encoder", name)(settings, contract))
    if device is not None:
        encoder.load(device)
    return encoder


def build_codec(name: str) -> TokenCodec:
    """The codec plug-in of that name; raises ``UnknownName``."""
    return cast(TokenCodec, plugins.load("codec", name)(plugins.config_class("codec", name)()))


def round_trip(codec: TokenCodec, tokens_BVGD: torch.Tensor) -> torch.Tensor:
    """What a reader of the cache would get for these tokens: float32 [B, V, G, D] on the CPU."""
    return codec.decode(codec.encode(tokens_BVGD))


def token_recipe(
    encoder: GeometryEncoder, contract: Contract, pack_digest: str, codec: str | None = None
) -> TokenRecipe:
    """Everything the tokens depend on, and how to build the encoder again.

    ``Fingerprint.encoder_config`` is the digest of the encoder's name and version, its settings (less those that only
    say where weights come from) and the TokenSpec, so that another camera order, batch size or codec is another
    cache id.

    Args:
        encoder: built; weights are read for their digest if they are not loaded yet.
        contract: the one the encoder was built with.
        pack_digest: of the pack the frames come from.
        codec: name; None takes the encoder's own default.
    """
    spec = encoder.spec.model_copy(update={"codec": codec or encoder.default_codec})
    settings = encoder.config.model_dump(mode="json")
    return TokenRecipe(
        spec=spec,
        contract=contract,
        fingerprint=Fingerprint(
            encoder_config=digest_json(
                {
                    "encoder": spec.encoder,
                    "version": encoder.version,
                    "config": {name: settings[name] for name in _fingerprint_fields(encoder.config)},
                    "spec": spec.model_dump(mode="json"),
                }
            ),
            weights=encoder.weights_digest(),
            image_path=IMAGE_PATH_VERSION,
            pack=pack_digest,
        ),
        encoder=EncoderRecord(name=spec.encoder, config=settings, license=encoder.license),
    )


def _fingerprint_fields(config: Schema) -> list[str]:
    return [name for name, field in type(config).model_fields.items() if field.json_schema_extra != NOT_IN_FINGERPRINT]


class LiveTokens:
    """TokenProvider that runs the encoder; equal to the cache's tokens, bit for bit on a CPU."""

    def __init__(self, encoder: GeometryEncoder, codec: TokenCodec) -> None:
        """``encoder`` is loaded; ``codec`` is the cache's."""
        self._encoder = encoder
        self._codec = codec
        self._spec = encoder.spec.model_copy(update={"codec": codec.name})

    @property
    def spec(self) -> TokenSpec:
        """The encoder's, with this codec."""
        return self._spec

    @property
    def needs_depth(self) -> bool:
        """Whether the frames must carry depth and camera matrices."""
        return bool(self._encoder.needs - {"images"})

    def tokens(self, frames: FrameBatch) -> torch.Tensor:
        """N frames -> float32 [N, V, G, D] on the CPU."""
        return round_trip(self._codec, encode_padded(self._encoder, frames))
