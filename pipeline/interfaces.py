"""The Protocols of the project, on one screen.

Shape letters (used in names everywhere): B batch, V views, H,W image, G geometry tokens per view, D geometry
dim, K compressed tokens, L DiT blocks, C context dim, S prompt tokens, T action horizon, A action dim.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.manifest import ArraySpec
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.frames import EpisodeHead, EpisodeRows, FrameBatch, Observation

Need = Literal["images", "depth", "cameras"]


@runtime_checkable
class FrameSource(Protocol):
    """A data set on disk; a source declares its conventions and hands out true upright rows.

    Built by ``Source(config)``, cheaply and without decoding a frame; pickled to workers as its config.
    """

    @property
    def contract(self) -> Contract: ...  # of the rows it hands out: image_orientation is "upright"

    @property
    def location(self) -> str: ...  # name of the file, folder or data set, without the machine's path

    @property
    def details(
        self,
    ) -> Mapping[str, str]: ...  # for data cards: format, image codec, orientation

    @property
    def revision(self) -> str: ...  # digest of the bytes behind it and of how they are read

    @property
    def episode_count(self) -> int: ...  # damaged ones included

    def where(self, episode: int) -> str: ...  # file and episode as a person finds them, without the machine's folders

    def head(self, episode: int) -> EpisodeHead: ...  # raises SourceDamaged

    def read(self, episode: int, start: int, stop: int) -> EpisodeRows: ...  # rows start..stop-1; raises SourceDamaged


@runtime_checkable
class GeometryEncoder(Protocol):
    """A frozen model: frames -> spatial tokens. Built by ``Encoder(config, contract)``; weights load in ``load``."""

    @property
    def config(self) -> Schema: ...  # the plug-in's own settings

    @property
    def version(self) -> int: ...  # raised whenever the same weights and settings give other tokens

    @property
    def spec(self) -> TokenSpec: ...  # known before weights are loaded

    @property
    def default_codec(self) -> str: ...  # the codec that suits these tokens

    @property
    def description(self) -> str: ...  # one line: model and where its weights are from

    @property
    def needs(self) -> frozenset[Need]: ...

    @property
    def license(self) -> str: ...  # of the weights

    @property
    def non_commercial(self) -> bool: ...  # whether the weights' licence forbids commercial use

    def weights_digest(self) -> str: ...  # "none" when there are no weights

    def load(self, device: str) -> None: ...

    # [B, V, G, D] float32; B = spec.encoder_batch_size; threads may call it at once
    def encode(self, frames: FrameBatch) -> torch.Tensor: ...


@runtime_checkable
class TokenCodec(Protocol):
    """Tokens <-> stored arrays, with a stated error bound. Built by ``Codec(spec)``; the spec is its only setting."""

    name: str
    needs_statistics: bool  # whether the spec must carry channel_statistics

    def arrays(self) -> dict[str, ArraySpec]: ...  # what is stored of one row

    def encode(self, tokens_BVGD: torch.Tensor) -> dict[str, NDArray[Any]]: ...  # rows are independent of each other

    def decode(self, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor: ...  # float32 [B, V, G, D], arrays' device

    def error_bound(self, tokens_BVGD: torch.Tensor) -> torch.Tensor: ...  # largest |decoded - token| of each value


@runtime_checkable
class TokenProvider(Protocol):
    """Where tokens come from: the cache (rows) or the live encoder (frames); the same bits either way on CPU."""

    @property
    def spec(self) -> TokenSpec: ...

    def tokens(self, what: Any) -> torch.Tensor: ...  # float32 [B, V, G, D]


@runtime_checkable
class SimEnv(Protocol):
    """One simulated task."""

    @property
    def contract(self) -> Contract: ...

    @property
    def instruction(self) -> str: ...

    @property
    def horizon(self) -> int: ...

    def reset(
        self, seed: int, init_state: int | NDArray[np.float64], settle_steps: int = 10, *, agentview_orbit: float = 0.0
    ) -> None: ...

    def step(self, action_A: NDArray[np.floating[Any]]) -> bool: ...  # True once the task's own goal holds

    def observe(self) -> Observation: ...

    def close(self) -> None: ...


class Policy(Protocol):
    """What evaluation needs of a policy."""

    def act(
        self, observations: Sequence[Observation], noise_seeds: Sequence[int]
    ) -> NDArray[np.float32]: ...  # [B, T, A] in environment units
