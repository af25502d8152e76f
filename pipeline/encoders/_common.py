"""What all encoders share: checks before they look at a frame, precision, what is known of published weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import ContractMismatch, InputError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.encoding import one_thread
from geomcache.pipeline.frames import FrameBatch

PATCH = 14  # pixels, of every DINOv2


def multiple_of(step: int) -> AfterValidator:
    """A picture's side in pixels that must be a multiple of ``step``; the error names the nearest."""

    def check(pixels: int) -> int:
        if pixels < step or pixels % step:
            below = max(step, pixels // step * step)
            raise ValueError(f"a multiple of {step} pixels, such as {below} or {below + step}")
        return pixels

    return AfterValidator(check)


PatchedPixels = Annotated[int, multiple_of(PATCH)]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """Weights that an encoder can load, as their authors publish them."""

    name: str  # hub id, or "package's own"
    license: str  # of the weights, as their publisher names it
    non_commercial: bool
    note: str = ""  # one line: size, token width, what sets it apart


@contextmanager
def precision(device: torch.device, compute_dtype: str) -> Iterator[None]:
    """No gradients; matrix products in ``compute_dtype`` by autocast, over weights that stay float32."""
    half = compute_dtype != "float32"
    with torch.no_grad(), torch.autocast(device.type, dtype=_DTYPES.get(compute_dtype), enabled=half):
        yield


@contextmanager
def compiling(encoder: str, device: torch.device) -> Iterator[None]:
    """For the first call of a compiled network: what cannot be compiled is an ``InputError`` before work begins.

    Compiled code is for the number of threads it was made with: one, as ``encode_padded`` always has.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        with one_thread():
            yield
    except TorchDynamoException as problem:
        raise InputError(
            f"encoder {encoder} cannot be compiled on {device}",
            expected="torch.compile to work; on a CPU it needs a C++ compiler",
            found=" ".join(str(problem).splitlines()[:2]),
            fix="leave `compile` out, or install g++",
        ) from problem


def resample(map_BVHWD: torch.Tensor, target_hw: tuple[int, int]) -> torch.Tensor:
    """A map on any grid -> tokens [B, V, G, D] on a grid of ``target_hw`` rows and columns.

    Antialiased bilinear, as ``image_path.prepare``; nothing happens when the grid is right already.
    """
    B, V, H, W, D = map_BVHWD.shape
    if target_hw != (H, W):
        # Channel-first and contiguous: the kernel is picked by layout, and its bits with it.
        planes = map_BVHWD.permute(0, 1, 4, 2, 3).reshape(B * V, D, H, W).contiguous()
        planes = torch.nn.functional.interpolate(
            planes, target_hw, mode="bilinear", antialias=True, align_corners=False
        )
        map_BVHWD = planes.reshape(B, V, D, *target_hw).permute(0, 1, 3, 4, 2)
    return map_BVHWD.reshape(B, V, -1, D).contiguous()


def require_upright(contract: Contract, encoder: str) -> None:
    """Raise ``ContractMismatch`` for a turned or mirrored world: a geometry model must not see one."""
    if contract.image_orientation != "upright":
        raise ContractMismatch(
            f"encoder {encoder} takes true upright images",
            expected="image_orientation 'upright'",
            found=f"image_orientation {contract.image_orientation!r}",
            fix="turn the frames with orientation.to_upright where they enter, as the sources do",
        )


def frame_size(contract: Contract, encoder: str) -> tuple[int, int]:
    """(H, W) in pixels of every view; ``InputError`` when there is no view or the sizes differ."""
    sizes = {(camera.height, camera.width) for camera in contract.cameras}
    if len(sizes) != 1:
        raise InputError(
            f"encoder {encoder} takes views of one size",
            expected="at least one camera, all of the same height and width",
            found=", ".join(f"{c.name} {c.height}x{c.width}" for c in contract.cameras) or "no camera",
            fix="record or pack the cameras at one size",
        )
    return sizes.pop()


def check_batch(frames: FrameBatch, spec: TokenSpec, frame_hw: tuple[int, int]) -> None:
    """Hold the batch to the spec: B, V and uint8 are our own invariants, another H, W raises."""
    shape = frames.images_BVHWC.shape
    assert frames.images_BVHWC.dtype == np.uint8, f"images are {frames.images_BVHWC.dtype}, expected uint8"
    assert len(shape) == 5, f"images have shape {shape}, expected [B, V, H, W, 3]"
    assert shape[4] == 3, f"images have shape {shape}, expected [B, V, H, W, 3]"
    assert shape[0] == spec.encoder_batch_size, (
        f"{shape[0]} rows for a batch of {spec.encoder_batch_size}; call through encoding.encode_padded"
    )
    assert shape[1] == spec.views, f"{shape[1]} views for an encoder of {spec.views}"
    if shape[2:4] != frame_hw:
        raise ContractMismatch(
            f"frames for encoder {spec.encoder} are not of the size its contract names",
            expected=f"{frame_hw[0]}x{frame_hw[1]} pixels",
            found=f"{shape[2]}x{shape[3]} pixels",
            fix="render or record the cameras at the contract's size",
        )
