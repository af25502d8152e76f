"""The bytes of vla-eval's open protocol (version 1): MessagePack messages over a WebSocket, arrays inside.

What comes in is written by strangers: every limit is checked before memory is taken, nothing is unpickled, and an array
is decoded only when it is asked for by name, with the shape and the type that it must have.

Convention: package ``vla-eval`` 0.8.0 on the registry, ``vla_eval/protocol`` (allenai/vla-evaluation-harness).

Non-obvious:
- An array is a map ``{"__ndarray__", data, dtype, shape}``; an image (uint8, height x width x 3) is
  ``{"__image__", format, data, shape}`` with format png (the client's default), raw, or jpeg. A client switched to raw
  sends images as plain arrays.
- msgpack's own limit on arrays and maps counts one container; a message of nothing but empty lists would still grow to
  sixty times its size, so containers are counted.
- Pillow decides on a picture's size by its header alone, and reads chunks that carry no pixels with less care
  (IndexError, OverflowError, warnings): the PNG's header is compared first, and only its pixels are handed on.
"""

import io
import struct
import time
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError

PROTOCOL_VERSION = 1
MessageType = Literal["hello", "observation", "action", "episode_start", "episode_end", "error"]

_FIELDS = ("type", "payload", "seq", "timestamp")
_MOST_ENTRIES = 64  # of one list or map
_MOST_CONTAINERS = 512  # of one message
_MOST_TEXT = 16_384  # bytes of one string
_DTYPES = {code: np.dtype(code) for code in ("|u1", "<f4", "<f8", "<i4", "<i8")}
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", b"\x00\x00\x00\x00IEND\xaeB`\x82"
_PNG_HEADER = 33  # bytes
_EIGHT_BIT_RGB = (8, 2)  # bits, colour type


@dataclass(frozen=True)
class Message:
    """One message; arrays in ``payload`` are still maps, see ``read_array`` and ``read_image``."""

    type: MessageType
    payload: dict[str, Any]
    seq: int  # the sender's count; an answer repeats it


def unpack(data: bytes) -> Message:
    """Bytes -> message.

    Raises:
        InputError: not MessagePack, too deep or too many entries, or not a message of the protocol.
    """
    import msgpack

    containers = 0

    def count(container: Any) -> Any:
        nonlocal containers
        containers += 1
        if isinstance(container, dict) and not all(isinstance(key, str) for key in container):
            raise ValueError("a key is no text")
        if containers > _MOST_CONTAINERS:
            raise ValueError(f"more than {_MOST_CONTAINERS} lists and maps")
        return container

    try:
        raw = msgpack.unpackb(
            data,
            object_hook=count,
            list_hook=count,
            max_array_len=_MOST_ENTRIES,
            max_map_len=_MOST_ENTRIES,
            max_str_len=_MOST_TEXT,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as problem:
        raise _refused(
            "the message is not MessagePack within our limits", "a whole map", str(problem) or type(problem).__name__
        ) from problem
    if not isinstance(raw, dict) or not all(name in raw for name in _FIELDS):
        raise _refused("the message lacks fields", f"a map with {', '.join(_FIELDS)}", _short(raw))
    if raw["type"] not in get_args(MessageType):
        raise _refused(
            "the message has an unknown type", f"one of {', '.join(get_args(MessageType))}", _short(raw["type"])
        )
    if not isinstance(raw["payload"], dict) or type(raw["seq"]) is not int:
        raise _refused("the message has wrong fields", "a map as payload, a whole number as seq", _short(raw))
    return Message(raw["type"], raw["payload"], raw["seq"])


def pack(kind: MessageType, payload: dict[str, Any], seq: int) -> bytes:
    """Message -> bytes; arrays in ``payload`` are numpy's."""
    import msgpack

    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    return cast(bytes, msgpack.packb(message, default=_encode))


def read_array(value: Any, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> NDArray[Any]:
    """The array that the map ``value`` holds.

    Args:
        value: from a payload.
        name: what the client calls it, for messages.
        shape: what it must be.
        dtypes: numpy codes that are fine, of uint8, float32, float64, int32 and int64, little-endian.

    Raises:
        InputError: no array, another shape or type, or not as many bytes as they say.
    """
    expected = f"an array of shape {list(shape)}, dtype {' or '.join(dtypes)}"
    if not isinstance(value, dict) or value.get("__ndarray__") is not True:
        raise _refused(f"{name} is no array", expected, _short(value))
    return _from_bytes(value, name, shape, dtypes, expected)


def read_image(value: Any, name: str, height: int, width: int) -> NDArray[np.uint8]:
    """The picture [height, width, 3] that the map ``value`` holds, as it was sent.

    Raises:
        InputError: no picture, another size, damaged, or stored with loss.
    """
    shape = (height, width, 3)
    expected = f"a {height} x {width} RGB picture as the checkpoint was trained on, uint8, lossless (png or raw)"
    if isinstance(value, dict) and value.get("__image__") is True and value.get("format") in ("png", "jpeg"):
        if value["format"] == "jpeg":
            raise _refused(f"{name} was stored with loss", expected, "jpeg", 'image format "png" in the client')
        return _from_png(value.get("data"), name, shape, expected)
    if isinstance(value, dict) and (value.get("__image__") is True or value.get("__ndarray__") is True):
        said = value.get("shape")
        if isinstance(said, list) and len(said) == len(shape) and said != list(shape):
            raise _other_size(name, expected, " x ".join(map(_short, said)))
        return _from_bytes(value, name, shape, ("|u1",), expected)
    raise _refused(f"{name} is no picture", expected, _short(value))


def _from_bytes(
    value: dict[str, Any], name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], expected: str
) -> NDArray[Any]:
    dtype, data = value.get("dtype"), value.get("data")
    if dtype not in dtypes or value.get("shape") != list(shape):
        raise _refused(f"{name} has another shape or type", expected, f"{_short(value.get('shape'))}, {_short(dtype)}")
    size = prod(shape) * _DTYPES[dtype].itemsize
    if not isinstance(data, bytes) or len(data) != size:
        found = f"{len(data)} bytes" if isinstance(data, bytes) else _short(data)
        raise _refused(f"{name} is not as long as its shape says", f"{size} bytes", found)
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _from_png(data: Any, name: str, shape: tuple[int, ...], expected: str) -> NDArray[np.uint8]:
    from PIL.PngImagePlugin import PngImageFile

    if not isinstance(data, bytes) or not data.startswith(_PNG_START) or len(data) < _PNG_HEADER:
        raise _refused(f"{name} is no PNG", expected, _short(data))
    width, height, depth, colour = struct.unpack_from(">IIBB", data, len(_PNG_START))
    if (height, width) != shape[:2]:
        raise _other_size(name, expected, f"{height} x {width}")
    if (depth, colour) != _EIGHT_BIT_RGB:
        raise _refused(f"{name} is not RGB", expected, f"PNG of colour type {colour}, {depth} bits")
    try:
        image = np.asarray(PngImageFile(io.BytesIO(_only_pixels(data))))
    except (OSError, SyntaxError, ValueError) as problem:  # PIL calls a broken PNG a SyntaxError
        raise _refused(f"{name} is a damaged PNG", expected, str(problem)) from problem
    assert image.shape == shape
    return image


def _only_pixels(data: bytes) -> bytes:
    """The PNG's header, pixels and end; of its other chunks, which PIL reads with less care, none."""
    kept, at = [data[:_PNG_HEADER]], _PNG_HEADER
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind == b"IDAT":
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, _PNG_END])


def _other_size(name: str, expected: str, found: str) -> InputError:
    fix = "render at that size in the client (docs/serve.md says how), or train on frames of the client's size"
    return _refused(f"{name} has another size", expected, found, fix)


def _encode(value: Any) -> Any:
    assert isinstance(value, np.ndarray)
    return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}


def _refused(what: str, expected: str, found: str, fix: str = "send what vla-eval 0.8 sends") -> InputError:
    return InputError(what, expected=expected, found=found, fix=fix)


def _short(value: Any) -> str:
    """A stranger's value in a message: one line, not longer than it needs to be."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = f"keys {sorted(value)[:8]}" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
