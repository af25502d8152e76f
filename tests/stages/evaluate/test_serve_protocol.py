"""The protocol's bytes, written here by hand with msgpack and numpy: what is read, and what rubbish is told."""

import io
import struct
import tracemalloc
import zlib
from typing import Any

import msgpack
import numpy as np
import pytest
from PIL import Image

from geomcache.cache_schemas.errors import InputError
from geomcache.stages.evaluate.serve.protocol import pack, read_array, read_image, unpack

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def _message(**changes: Any) -> bytes:
    return msgpack.packb({"type": "hello", "payload": {}, "seq": 3, "timestamp": 1.5, **changes})


def _png(pixels: np.ndarray[Any, Any] = PIXELS, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _image(data: Any, **changes: Any) -> dict[str, Any]:
    return {"__image__": True, "format": "png", "data": data, "shape": [6, 4, 3], **changes}


def _array(values: np.ndarray[Any, Any], **changes: Any) -> dict[str, Any]:
    said = {"data": values.tobytes(), "dtype": values.dtype.str, "shape": list(values.shape)}
    return {"__ndarray__": True, **said, **changes}


def test_a_message_makes_the_round_trip() -> None:
    message = unpack(pack("action", {"actions": np.arange(7, dtype=np.float32)}, 12))
    assert (message.type, message.seq) == ("action", 12)
    actions = read_array(message.payload["actions"], "actions", (7,), ("<f4",))
    np.testing.assert_array_equal(actions, np.arange(7))
    raw = msgpack.unpackb(pack("action", {"actions": np.arange(7, dtype=np.float32)}, 12))
    assert set(raw) == {"type", "payload", "seq", "timestamp"}
    assert raw["payload"]["actions"]["dtype"] == "<f4"


@pytest.mark.parametrize(
    "value",
    [_image(_png()), _image(PIXELS.tobytes(), format="raw", dtype="|u1"), _array(PIXELS)],
    ids=["png", "raw", "array"],
)
def test_a_picture_is_read_as_it_was_sent(value: dict[str, Any]) -> None:
    np.testing.assert_array_equal(read_image(value, "agentview", 6, 4), PIXELS)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "incomplete"),
        (_message()[:-3], "incomplete"),
        (_message() + b"\x00", "extra data"),
        (b"\xc1", "not MessagePack"),
        (b"\x91" * 5000, "StackError"),
        (b"\xdd\xff\xff\xff\xff", "max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "incomplete"),
        (b"\xc7\x05\x01abcde", "max_ext_len"),
        (_message(payload={"text": "x" * 20_000}), "max_str_len"),
        (_message(payload={7: 1}), "not allowed for map key"),
        (_message(payload={b"bytes": 1}), "a key is no text"),
        (b"\x81\xa1a\xa2\xff\xff", "utf-8"),
        (b"\x07", "lacks fields"),
        (msgpack.packb({"type": "hello"}), "lacks fields"),
        (_message(type="infer"), "unknown type"),
        (_message(type=["hello"]), "unknown type"),
        (_message(payload=[1]), "wrong fields"),
        (_message(seq=True), "wrong fields"),
        (_message(seq="1"), "wrong fields"),
    ],
)
def test_rubbish_is_refused_by_name(data: bytes, said: str) -> None:
    with pytest.raises(InputError) as caught:
        unpack(data)
    assert said in str(caught.value)


def test_a_small_message_does_not_take_much_memory() -> None:
    lists = b"\xdc\x00\x40" + (b"\xdc\x00\x40" + b"\x90" * 64) * 64
    bomb = b"\xdc\x00\x40" + lists * 64
    tracemalloc.start()
    with pytest.raises(InputError, match="more than 512 lists and maps"):
        unpack(bomb)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 200_000  # 15 million bytes without the limit


STATE = np.zeros(8)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([0.0] * 8, "is no array"),
        ({"__ndarray__": 1}, "is no array"),
        (_array(np.zeros(7)), "another shape or type"),
        (_array(np.zeros((1, 8))), "another shape or type"),
        (_array(STATE, dtype="|O"), "another shape or type"),
        (_array(STATE, dtype=">f8"), "another shape or type"),
        (_array(STATE, dtype="<c16"), "another shape or type"),
        (_array(STATE, dtype=["<f8"]), "another shape or type"),
        (_array(STATE, shape=[2**62]), "another shape or type"),
        (_array(STATE, shape=8), "another shape or type"),
        (_array(STATE, data=b"\0" * 63), "64 bytes"),
        (_array(STATE, data="text"), "64 bytes"),
    ],
)
def test_arrays_are_what_they_must_be(value: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_array(value, "states", (8,), ("<f4", "<f8"))
    assert said in str(caught.value)
    assert "states" in str(caught.value)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BOMB = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (_png(), "is no picture"),
        (_image(_png(PIXELS[:5])), "found:    5 x 4"),
        (_image(BOMB), "60000 x 60000"),
        (_image(BOMB[:20]), "is no PNG"),
        (_image(_png()[:60]), "damaged PNG"),
        (_image(b"GIF89a" + bytes(40)), "is no PNG"),
        (_image(7), "is no PNG"),
        (_image(_png(PIXELS[..., 0])), "not RGB"),
        (_image(_png(np.dstack([PIXELS, PIXELS[..., :1]]))), "not RGB"),
        (_image(_png(kind="JPEG"), format="jpeg"), "with loss"),
        (_image(PIXELS.tobytes(), format="raw", dtype="<f4"), "another shape or type"),
        (_image(PIXELS.tobytes(), format="raw", dtype="|u1", shape=[6, 4]), "another shape or type"),
        (_array(PIXELS[:, :3]), "found:    6 x 3 x 3"),
        (_array(PIXELS, data=b""), "72 bytes"),
    ],
)
def test_pictures_are_what_they_must_be(value: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_image(value, "image wrist", 6, 4)
    assert said in str(caught.value)
    assert "image wrist" in str(caught.value)


def test_chunks_without_pixels_never_reach_pillow() -> None:
    """A short gAMA or APNG chunk makes PIL raise IndexError or warn; here the picture is read, or refused by name."""
    png = _png()
    for kind in (b"gAMA", b"acTL", b"fcTL", b"iCCP", b"tRNS", b"eXIf", b"IEND"):
        for at in (33, len(png) - 12):
            changed = png[:at] + _chunk(kind, b"\x01") + png[at:]
            np.testing.assert_array_equal(read_image(_image(changed), "agentview", 6, 4), PIXELS)
