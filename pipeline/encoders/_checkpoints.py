"""Weights from a local folder or the hub, loaded strictly and digested by content.

The wrapped packages load with ``strict=False``, so that a wrong file silently leaves random weights; here
every missing, unexpected or misshapen key is an error by name.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.fingerprint import digest_bytes, digest_named_buffers

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_SHOWN_KEYS = 5


def checkpoint_folder(weights: str) -> Path:
    """A local folder, or a hub id's files (those already downloaded first, the network second).

    Raises:
        InputError: no such folder, a file instead of a folder, a missing file, or a hub id that cannot be
        had.
    """
    folder = Path(weights).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"weights {weights} is a file",
            expected=f"a folder with {' and '.join(FILES)}",
            found="a file",
            fix=f"give the folder: {folder.parent}",
        )
    if not folder.exists():
        if not _HUB_ID.fullmatch(weights):
            raise InputError(
                f"there is no weights folder {weights}",
                expected="a folder as save_pretrained writes it, or a hub id such as owner/name",
                found="no such folder",
                fix="correct the path",
            )
        folder = _hub_folder(weights)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"weights folder {folder} is not complete",
            expected=" and ".join(FILES),
            found=f"no {' and no '.join(missing)}",
            fix="save the model with save_pretrained, or download the folder again",
        )
    return folder


def _hub_folder(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(FILES), local_files_only=True))
        if all((folder / name).is_file() for name in FILES):
            return folder
    except LocalEntryNotFoundError:
        pass  # not downloaded yet
    except HFValidationError as problem:
        raise _not_had(hub_id, problem) from problem
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(FILES)))
    except (HfHubHTTPError, OSError) as problem:  # offline and connection errors are OSErrors
        raise _not_had(hub_id, problem) from problem


def _not_had(hub_id: str, problem: Exception) -> InputError:
    said = next(iter(str(problem).splitlines()), "")
    return InputError(
        f"weights {hub_id} cannot be had",
        expected="a local folder of that name, or a model on the hub",
        found=f"no such folder; hub: {type(problem).__name__}: {said}",
        fix=f"check name and network, or download elsewhere (`hf download {hub_id}`) and give the folder",
    )


def require_model_name(folder: Path, expected: str) -> None:
    """Raise ``InputError`` unless ``config.json`` has ``{"model_name": expected}``; other keys are free."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except ValueError as problem:  # bad JSON or bad UTF-8
        raise InputError(
            f"{path} cannot be read",
            expected="JSON",
            found=str(problem),
            fix="save or download the checkpoint again",
        ) from problem
    found = config.get("model_name") if isinstance(config, dict) else None
    if found != expected:
        raise InputError(
            f"{path} is of another model",
            expected=f'"model_name": "{expected}"',
            found=f'"model_name": {json.dumps(found)}',
            fix="set `model` to the checkpoint's model, or give the folder of the model you want",
        )


def load_strictly(module: nn.Module, path: Path, prefix: str, also_allowed: Sequence[str]) -> None:
    """Fill every tensor of ``module`` from a safetensors file, in place, in the module's own dtype.

    Only tensors under ``prefix`` are read. Names that share one tensor in the module (tied weights) need only one of
    them in the file, as ``safetensors.torch.save_model`` writes it; no other name may be missing.

    Args:
        module: its state dict names are the file's names less ``prefix``.
        path: the file.
        prefix: of the module's tensors in the file, e.g. "model.backbone.".
        also_allowed: prefixes of other parts that the file may hold; any other key is an error.

    Raises:
        InputError: a file that is no safetensors file or is truncated; missing, unexpected or misshapen keys;
            stored names of one tensor that differ.
    """
    from safetensors import SafetensorError, safe_open

    state = module.state_dict(keep_vars=True)  # the tensors themselves: tied names are one object
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            stored = set(file.keys())
            wanted = {prefix + name for name in state}
            had = {id(own) for name, own in state.items() if prefix + name in stored}
            _refuse(path, "lacks", sorted(prefix + name for name, own in state.items() if id(own) not in had))
            state = {name: own for name, own in state.items() if prefix + name in stored}
            foreign = [key for key in sorted(stored - wanted) if not key.startswith(tuple(also_allowed))]
            _refuse(path, "has unexpected", foreign)
            shapes = {name: list(file.get_slice(prefix + name).get_shape()) for name in state}
            _refuse(
                path,
                "has misshapen",
                [
                    f"{prefix}{name} {shapes[name]} (expected {list(own.shape)})"
                    for name, own in state.items()
                    if shapes[name] != list(own.shape)
                ],
            )
            filled: set[int] = set()
            differing = []
            with torch.no_grad():
                for name, own in state.items():
                    value = file.get_tensor(prefix + name).to(own.dtype)
                    if id(own) not in filled:
                        own.copy_(value)
                    elif not torch.equal(own, value):
                        differing.append(prefix + name)
                    filled.add(id(own))
            _refuse(path, "has another value of a shared tensor under", differing)
    except (SafetensorError, OSError) as problem:
        raise InputError(
            f"{path} cannot be read",
            expected="a whole safetensors file",
            found=str(problem),
            fix="save or download the checkpoint again",
        ) from problem


def _refuse(path: Path, verb: str, keys: list[str]) -> None:
    if keys:
        more = f", and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
        raise InputError(
            f"{path} {verb} {len(keys)} key{'s' if len(keys) > 1 else ''}",
            expected="exactly the tensors of the configured model",
            found=", ".join(keys[:_SHOWN_KEYS]) + more,
            fix="set `model` to the checkpoint's model, or save or download the checkpoint again",
        )


def module_digest(module: nn.Module) -> str:
    """Digest of a module's named tensors as they are in memory; the same on every device."""

    def buffers() -> Iterator[tuple[str, str, bytes]]:
        for name, tensor in module.state_dict().items():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            # The digest of the bytes stands for them, so that one tensor at a time is copied, not the whole
            # model.
            yield name, f"{tensor.dtype} {tuple(tensor.shape)}", digest_bytes(data).encode()

    return digest_named_buffers(buffers())
