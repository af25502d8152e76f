"""What every encoder checks before it looks at a frame."""

import numpy as np

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import ContractMismatch, InputError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.frames import FrameBatch


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
