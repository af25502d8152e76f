"""Rulers: what an evaluation changes of what a policy is given, to measure what its success rests on.

The simulator, its goal predicate and the images that the VLM sees are never changed. Every draw comes from a generator
keyed by a hash on (suite, task, initial state, seed) and on what is drawn: policies meet the same draws, and the order
of playing does not matter.

Non-obvious:
- Geometry rulers change the frame that the live encoder alone is given, so they reach the policy through the encoder
  and the codec, as a wrong depth camera would.
- With ``shuffle_geometry`` the encoder is given the first frame (after settling) of another initial state of the same
  task, with the camera turned as in that other episode, at every query: tokens of the right kind that tell nothing of
  this scene, nor of where the arm is now.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.frames import FrameBatch, Observation

EpisodeKey = tuple[str, int, int, int]  # (suite, task, init state, seed)

_LEAST_DEPTH = 1e-3  # metres: noise makes no surface behind the camera


class Corruption(Schema):
    """Rulers of ``geomcache eval``; by default none."""

    nominal_extrinsics: bool = False  # the encoder is told the camera matrices of the unturned camera
    depth_scale: float = Field(default=0.0, ge=0, lt=1)  # one factor an episode and camera, uniform in 1 +- this
    depth_noise_m: float = Field(default=0.0, ge=0)  # standard deviation of Gaussian noise, metres, every pixel
    shuffle_geometry: bool = False  # tokens are made from the first frame of another initial state of the task
    shuffle_instructions: bool = False  # the policy is told another instruction of suites.instructions_at

    @model_validator(mode="after")
    def _one_frame(self) -> Self:
        if self.shuffle_geometry and self.geometry != ("shuffle_geometry",):
            raise ValueError(f"shuffle_geometry replaces the whole frame: leave {', '.join(self.geometry[:-1])} out")
        return self

    @property
    def geometry(self) -> tuple[str, ...]:
        """Names of the fields in force that change what the encoder is given."""
        names = ("nominal_extrinsics", "depth_scale", "depth_noise_m", "shuffle_geometry")
        return tuple(name for name in names if getattr(self, name))

    def describe(self) -> list[str]:
        """What is in force, in words; empty for nothing."""
        words = {
            "nominal extrinsics": self.nominal_extrinsics,
            f"depth scaled by 1 ± {self.depth_scale:g}": self.depth_scale,
            f"depth noise {self.depth_noise_m:g} m": self.depth_noise_m,
            "shuffled geometry": self.shuffle_geometry,
            "shuffled instructions": self.shuffle_instructions,
        }
        return [text for text, in_force in words.items() if in_force]


class Drawn(Schema):
    """What was drawn for one episode."""

    camera_orbit: float = 0.0  # degrees by which the agent-view camera was turned
    depth_factors: tuple[float, ...] | None = None  # one a camera, in the contract's order
    geometry_of: int | None = None  # initial state of the same task whose first frame the encoder saw
    geometry_orbit: float = 0.0  # degrees by which the camera was turned there
    told: str | None = None  # the instruction that the policy was told; None: its own


@dataclass(frozen=True)
class CorruptedObservation(Observation):
    """An observation whose encoder is given another frame than the VLM."""

    encoder_frame: FrameBatch  # B = 1


def encoder_frame(seen: Observation) -> FrameBatch:
    """What the live encoder is given for this observation."""
    return seen.encoder_frame if isinstance(seen, CorruptedObservation) else seen.frame


def draw_orbit(key: EpisodeKey, largest: float) -> float:
    """Degrees, uniform in +- ``largest``; for another ``largest`` the same draw on another scale."""
    return largest * float(_generator(key, "camera_orbit").uniform(-1.0, 1.0))


def draw(
    key: EpisodeKey,
    camera_orbit: float,
    corruption: Corruption,
    *,
    cameras: Sequence[str],
    init_states: int,
    own: str,
    instructions: Sequence[str],
) -> Drawn:
    """What an episode is played with.

    Args:
        key: of the episode.
        camera_orbit: largest |degrees|.
        corruption: the rulers in force.
        cameras: names, in the contract's order.
        init_states: of the task, those that evaluation may use.
        own: the task's instruction.
        instructions: that can be told; the own one may be among them.

    Raises:
        InputError: there is no other initial state, or no other instruction, to take.
    """
    found: dict[str, object] = {"camera_orbit": draw_orbit(key, camera_orbit)}
    if corruption.depth_scale:
        factors = [1 + corruption.depth_scale * _generator(key, f"depth_scale {c}").uniform(-1.0, 1.0) for c in cameras]
        found["depth_factors"] = tuple(factors)
    if corruption.shuffle_geometry:
        suite, task, own_state, seed = key
        _require_other(init_states > 1, "shuffle_geometry", key, "initial state")
        other = (own_state + int(_generator(key, "shuffle_geometry").integers(1, init_states))) % init_states
        found |= {"geometry_of": other, "geometry_orbit": draw_orbit((suite, task, other, seed), camera_orbit)}
    if corruption.shuffle_instructions:
        texts = sorted({*instructions} - {own})
        _require_other(bool(texts), "shuffle_instructions", key, "instruction")
        found["told"] = texts[int(_generator(key, "shuffle_instructions").integers(len(texts)))]
    return Drawn.model_validate(found)


def require_effect(
    corruption: Corruption, camera_orbit: float, *, cameras: Sequence[str], turned: str, needs: frozenset[str]
) -> None:
    """Refuse rulers that could change nothing: their result would be read as "the policy does not mind".

    Args:
        corruption: the rulers.
        camera_orbit: largest |degrees|.
        cameras: that the policy is given.
        turned: the camera that an orbit turns.
        needs: what the live encoder reads, as ``GeometryEncoder.needs``; empty without one.

    Raises:
        InputError: which ruler, and why it can do nothing.
    """
    if camera_orbit and turned not in cameras:
        raise _useless("camera_orbit", f"a policy that is given the camera {turned}", f"cameras {', '.join(cameras)}")
    reads = ", ".join(sorted(needs))
    for name in corruption.geometry:
        if not needs:
            raise _useless(f"corruption.{name}", "a policy with a geometry encoder", "no geometry tokens")
        read = {"nominal_extrinsics": "cameras", "shuffle_geometry": None}.get(name, "depth")
        if read is not None and read not in needs:
            raise _useless(f"corruption.{name}", f"an encoder that reads {read}", f"one that reads {reads}")
    if corruption.nominal_extrinsics and not camera_orbit:
        raise _useless("corruption.nominal_extrinsics", "a turned camera: --set camera_orbit=10", "camera_orbit 0")


@dataclass(frozen=True)
class Given:
    """What the policy is given in one episode, made from what is seen."""

    key: EpisodeKey
    corruption: Corruption
    drawn: Drawn
    elsewhere: FrameBatch | None = None  # the other episode's frame, for ``shuffle_geometry``
    # The view that an orbit turns, and where its camera stands unturned: camera-to-robot-base [4, 4], metres.
    nominal: tuple[int, NDArray[np.float64]] | None = None

    def observation(self, seen: Observation, step: int) -> Observation:
        """Of control step ``step``; ``seen`` itself where nothing is changed."""
        told = replace(seen, instruction=self.drawn.told) if self.drawn.told is not None else seen
        if not self.corruption.geometry:
            return told
        frame = self._encoder_frame(seen.frame, step)
        return CorruptedObservation(told.frame, told.state_S, told.instruction, frame)

    def _encoder_frame(self, frame: FrameBatch, step: int) -> FrameBatch:
        if self.corruption.shuffle_geometry:
            assert self.elsewhere is not None
            return self.elsewhere
        if self.corruption.nominal_extrinsics:
            assert self.nominal is not None
            assert frame.extrinsics_BV44 is not None
            view, extrinsics_44 = self.nominal
            told_BV44 = frame.extrinsics_BV44.copy()
            told_BV44[:, view] = extrinsics_44
            frame = replace(frame, extrinsics_BV44=told_BV44)
        depth_BVHW = frame.depth_BVHW
        if depth_BVHW is not None and self.drawn.depth_factors is not None:
            depth_BVHW = depth_BVHW * np.array(self.drawn.depth_factors, dtype=np.float32)[:, None, None]
        if depth_BVHW is not None and self.corruption.depth_noise_m:
            generator = _generator(self.key, f"depth_noise {step}")
            noise = generator.normal(0.0, self.corruption.depth_noise_m, depth_BVHW.shape).astype(np.float32)
            depth_BVHW = np.maximum(depth_BVHW + noise, np.float32(_LEAST_DEPTH))
        return replace(frame, depth_BVHW=depth_BVHW)


def _generator(key: EpisodeKey, what: str) -> np.random.Generator:
    text = "/".join(map(str, (*key, what)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def _require_other(there_is: bool, name: str, key: EpisodeKey, what: str) -> None:
    if not there_is:
        raise _useless(f"corruption.{name}", f"another {what} to take", f"{key[0]} task {key[1]} has only its own")


def _useless(name: str, expected: str, found: str) -> InputError:
    return InputError(f"{name} can change nothing here", expected=expected, found=found, fix=f"leave {name} out")
