"""Frames of one episode out of an MP4 file, by time, with PyAV.

Non-obvious:
- LeRobot's writer puts frame k of an episode at ``from_timestamp + k / fps`` of the file, fps as in ``info.json``.
  That fps (10, 20 or 30 for the same robot) only says where frames lie; it is never the robot's control rate.
- ``from_timestamp`` sums measured durations and drifts a little; a frame may lie up to a quarter of a frame beside its
  place. More is refused: half a frame off, the neighbour would be taken silently.
- FFmpeg conceals damage it notices and marks the picture; such a picture is an error here. MP4 has no checksums: other
  changed bytes decode to wrong pixels without a sign, and only the hub's own digest of the file tells.
- The RGB conversion gives the bits of LeRobot's own PyAV backend (``to_ndarray(format="rgb24")``).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from geomcache.pipeline.sources._lerobot_layout import CHANNELS, VideoSpan, damaged

_TOLERANCE = 0.25  # of a frame


def describe(span: VideoSpan, episode: int, key: str) -> str:
    """Codec and decoder in words."""
    with _open(span, episode, key) as (_, stream):
        codec, pixels = stream.codec_context.name, stream.codec_context.pix_fmt
        codec = "av1" if codec == "libdav1d" else codec
        return f"mp4 {codec}/{pixels}, lossy, decoded by PyAV {av.__version__}"


def decode(
    span: VideoSpan, episode: int, key: str, *, fps: float, size: tuple[int, int], start: int, stop: int
) -> NDArray[np.uint8]:
    """Frames ``start`` to ``stop`` - 1 of the episode as stored, [rows, H, W, 3] RGB.

    Raises:
        SourceDamaged: the file is missing, truncated or corrupt, has another size, or frames are not where they belong.
    """
    images_THWC = np.empty((stop - start, *size, CHANNELS), np.uint8)
    there = np.zeros(stop - start, bool)
    to_rgb = VideoReformatter()  # one for all frames: the default starts threads for each of them
    with _open(span, episode, key) as (container, stream):
        if start >= stop:
            return images_THWC
        seconds = span.from_s + (start - 1) / fps  # one frame of margin; lands on the keyframe before
        container.seek(max(0, math.floor(seconds / stream.time_base)), stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None or frame.is_corrupt:
                raise damaged(span.path, episode, key, expected="whole pictures", found="a corrupt one")
            place = (float(frame.pts * stream.time_base) - span.from_s) * fps
            row = round(place)
            if row < start:
                continue
            if row >= stop:
                break
            if abs(place - row) > _TOLERANCE:
                found = f"a frame at {place:.2f}"
                expected = f"one frame at each whole number, in frames of 1/{fps:g} s from {span.from_s:g} s"
                raise damaged(span.path, episode, key, expected=expected, found=found)
            if (frame.height, frame.width) != size:
                found = f"{frame.height} x {frame.width} at row {row}"
                raise damaged(span.path, episode, key, expected=f"{size[0]} x {size[1]} pixels", found=found)
            images_THWC[row - start] = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
            there[row - start] = True
    if not there.all():
        found = f"no frame for row {start + int(np.argmin(there))}"
        raise damaged(span.path, episode, key, expected=f"frames for rows {start} to {stop - 1}", found=found)
    return images_THWC


@contextmanager
def _open(span: VideoSpan, episode: int, key: str) -> Iterator[tuple[Any, Any]]:
    """(container, its colour video stream); FFmpeg's own errors are named by file, episode and camera."""
    try:
        with av.open(str(span.path)) as container:
            if not container.streams.video:
                raise damaged(span.path, episode, key, expected="a video stream", found="none")
            stream = container.streams.video[0]
            layout = stream.codec_context.format
            if layout is None or len(layout.components) < CHANNELS:
                found = "unknown" if layout is None else layout.name
                raise damaged(span.path, episode, key, expected="colour pictures", found=f"pixel format {found}")
            stream.codec_context.thread_count = 1  # workers are processes; frame threads would only cost memory
            yield container, stream
    except av.FFmpegError as problem:
        raise damaged(span.path, episode, key, expected="a whole MP4 file", found=str(problem)) from problem
