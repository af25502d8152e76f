"""What all encoders share: checks before they look at a frame, precision, what is known of published weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import ContractMismatch, InputError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.frames import FrameBatch

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
