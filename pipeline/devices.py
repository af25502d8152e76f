"""Naming the device that work runs on; the only place that asks torch for GPUs."""

import torch

from geomcache.cache_schemas.errors import GeomcacheError, InputError


def resolve_device(name: str) -> str:
    """``auto`` -> ``cuda`` where there is a GPU, else ``cpu``; any other name is checked and returned.

    Raises:
        InputError: see ``require_device``.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(require_device(name))


def require_device(device: str) -> torch.device:
    """The torch device; raises ``InputError`` for a name torch does not know and a GPU that is not there."""
    try:
        found = torch.device(device)
    except RuntimeError as problem:
        raise _no_device(device, "no such device type") from problem
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise _no_device(device, f"{torch.cuda.device_count()} CUDA devices")
    return found


def _no_device(device: str, found: str) -> GeomcacheError:
    return InputError(f"device {device} cannot be used", expected="cpu, cuda, cuda:0, ...", found=found, fix="use cpu")
