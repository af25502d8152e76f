"""Tokens made live, and what describes them; the cached twin lives in ``pipeline/store``.

Live tokens go through the codec and back, so that they carry the same rounding as tokens read from a cache.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.fingerprint import (
    IN_FINGERPRINT_UNLESS_DEFAULT,
    NOT_IN_FINGERPRINT,
    Fingerprint,
    digest_json,
)
from geomcache.cache_schemas.manifest import EncoderRecord, TokenRecipe
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline import plugins
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.image_path import IMAGE_PATH_VERSION
from geomcache.pipeline.interfaces import GeometryEncoder, TokenCodec
from geomcache.pipeline.pooling import pool_tokens


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


def build_codec(spec: TokenSpec) -> TokenCodec:
    """The codec plug-in that ``spec.codec`` names; raises ``UnknownName``, or ``ConfigError`` without statistics."""
    return cast(TokenCodec, plugins.load("codec", spec.codec)(spec))


def round_trip(codec: TokenCodec, tokens_BVGD: torch.Tensor) -> torch.Tensor:
    """What a reader of the cache would get for these tokens: float32 [B, V, G, D] on the CPU."""
    return codec.decode(as_tensors(codec.encode(tokens_BVGD)))


def as_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    """The same memory, as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class StoredForm:
    """An encoder's tokens on their way into a cache and out again; the live path makes the same way.

    Full tokens -> the source codec and back (a derived cache was made from stored tokens) -> means of K groups (a
    pooled cache) -> the codec.
    """

    def __init__(self, spec: TokenSpec) -> None:
        self.spec = spec
        self.codec = build_codec(spec)
        self._source = build_codec(spec.full) if spec.source_codec is not None else None

    def prepare(self, tokens_BVGD: torch.Tensor, *, from_source: bool = False) -> torch.Tensor:
        """Full tokens, float32 -> what the codec is given, [B, *spec.row_shape]; rows are independent.

        ``from_source``: they were read from the source cache, so they have made its codec's trip already.
        """
        if self._source is not None and not from_source:
            tokens_BVGD = round_trip(self._source, tokens_BVGD)
        return tokens_BVGD if self.spec.pooled_to is None else pool_tokens(tokens_BVGD.cpu(), self.spec.pooled_to)

    def round_trip(self, tokens_BVGD: torch.Tensor) -> torch.Tensor:
        """Full tokens -> what a reader of the cache gets for them."""
        return round_trip(self.codec, self.prepare(tokens_BVGD))


def token_recipe(
    encoder: GeometryEncoder, contract: Contract, pack_digest: str, codec: str | None = None, **storage: Any
) -> TokenRecipe:
    """Everything the tokens depend on, and how to build the encoder again.

    ``Fingerprint.encoder_config`` is the digest of the encoder's name and version, its settings (less those that only
    say where weights come from) and the TokenSpec, so that another camera order, batch size or codec is another
    cache id.

    Args:
        encoder: built; weights are read for their digest if they are not loaded yet.
        contract: the one the encoder was built with.
        pack_digest: of the pack the frames come from.
        codec: name; None takes the encoder's own default (fp32 for pooled tokens).
        storage: the other fields of ``TokenSpec.storage``.
    """
    default = "fp32" if storage.get("pooled_to") is not None else encoder.default_codec
    spec = encoder.spec.model_copy(update={"codec": codec or default, **storage})
    spec = TokenSpec.model_validate(spec.model_dump())  # model_copy checks nothing
    settings = encoder.config.model_dump(mode="json")
    return TokenRecipe(
        spec=spec,
        contract=contract,
        fingerprint=Fingerprint(
            encoder_config=stored_digest(
                digest_json(
                    {
                        "encoder": spec.encoder,
                        "version": encoder.version,
                        "config": {name: settings[name] for name in _fingerprint_fields(encoder.config)},
                        "spec": _without_none(spec.full),
                    }
                ),
                spec,
            ),
            weights=encoder.weights_digest(),
            image_path=IMAGE_PATH_VERSION,
            pack=pack_digest,
        ),
        encoder=EncoderRecord(name=spec.encoder, config=settings, license=encoder.license),
    )


def stored_digest(full_digest: str, spec: TokenSpec) -> str:
    """``Fingerprint.encoder_config`` of tokens kept as ``spec`` says, from that of the full tokens."""
    if spec == spec.full:
        return full_digest
    return digest_json({"full": full_digest, "spec": _without_none(spec)})


def _without_none(spec: TokenSpec) -> dict[str, Any]:
    """A field that a later release adds and that is not used must not change the id of old caches."""
    return {name: value for name, value in spec.model_dump(mode="json").items() if value is not None}


def _fingerprint_fields(config: Schema) -> list[str]:
    names = []
    for name, field in type(config).model_fields.items():
        unused = field.json_schema_extra == IN_FINGERPRINT_UNLESS_DEFAULT and getattr(config, name) == field.default
        if field.json_schema_extra != NOT_IN_FINGERPRINT and not unused:
            names.append(name)
    return names


class LiveTokens:
    """TokenProvider that runs the encoder; equal to the cache's tokens, bit for bit on a CPU."""

    def __init__(self, encoder: GeometryEncoder, spec: TokenSpec) -> None:
        """``encoder`` is loaded; ``spec`` is the cache's: the encoder's own, and how the tokens are kept."""
        self._encoder = encoder
        self._form = StoredForm(encoder.spec.model_copy(update=spec.storage))

    @property
    def spec(self) -> TokenSpec:
        """The encoder's, with the cache's storage."""
        return self._form.spec

    @property
    def needs_depth(self) -> bool:
        """Whether the frames must carry depth and camera matrices."""
        return bool(self._encoder.needs - {"images"})

    def tokens(self, frames: FrameBatch) -> torch.Tensor:
        """N frames -> float32 [N, *spec.row_shape] on the CPU."""
        return self._form.round_trip(encode_padded(self._encoder, frames))
