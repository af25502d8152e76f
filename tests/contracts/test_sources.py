"""What every source plug-in promises; a new file in pipeline/sources/ is tested here by its name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache_schemas.contract import ACTION_DIM, STATE_DIM
from geomcache.pipeline import plugins
from geomcache.pipeline.interfaces import FrameSource
from geomcache.pipeline.open_source import SourceRequest, open_source, resolve
from tests.conftest import TASK, whole, write_demo_file
from tests.lerobot_files import write_data_set

# Plug-in -> writes a small data set of it and returns its path. Add yours here.
DATA_SETS: dict[str, Callable[[Path], Path]] = {
    "libero_hdf5": lambda folder: write_demo_file(folder / "libero_object" / f"{TASK}_demo.hdf5").parent,
    "lerobot": lambda folder: write_data_set(folder / "libero_object").root,
}


@pytest.fixture(params=plugins.names("source"))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> FrameSource:
    """Opened as ``pack build`` does it: the plug-in is told by what is there."""
    resolved = resolve(SourceRequest(path=str(DATA_SETS[request.param](tmp_path))))
    assert resolved.kind == request.param
    return open_source(resolved)


def test_a_source_is_one_and_names_itself_without_the_machines_folders(source: FrameSource, tmp_path: Path) -> None:
    assert isinstance(source, FrameSource)
    said = [source.location, *source.details.values(), *(source.where(i) for i in range(source.episode_count))]
    assert [text for text in said if str(tmp_path) in text or not text] == []
    assert source.details["image_orientation"]


def test_heads_and_rows_follow_the_contract(source: FrameSource) -> None:
    contract = source.contract
    assert (contract.image_orientation, contract.gripper_sign) == ("upright", "minus_open_plus_close")
    size = contract.cameras[0]
    for episode in range(source.episode_count):
        head, rows = whole(source, episode)
        assert head.where == source.where(episode)
        assert head.actions_TA.shape == (len(head), ACTION_DIM)
        assert head.actions_TA.dtype == np.float32
        assert np.abs(head.actions_TA).max() <= 1.0 + 1e-6
        assert rows.states_TS.shape == (len(head), STATE_DIM)
        images = rows.frames.images_BVHWC
        assert (images.shape, images.dtype) == (
            (len(head), len(contract.cameras), size.height, size.width, 3),
            np.uint8,
        )
        assert (rows.frames.depth_BVHW is not None) == contract.has_depth


def test_any_slice_is_that_part_of_the_whole(source: FrameSource) -> None:
    head, rows = whole(source, 1)
    for start, stop in ((0, 1), (2, 5), (len(head) - 1, len(head))):
        part = source.read(1, start, stop)
        np.testing.assert_array_equal(part.states_TS, rows.states_TS[start:stop])
        np.testing.assert_array_equal(part.frames.images_BVHWC, rows.frames.images_BVHWC[start:stop])


def test_the_revision_is_of_the_bytes_not_of_the_place(source: FrameSource, tmp_path: Path) -> None:
    revision, moved = source.revision, tmp_path / "moved" / "libero_object"
    moved.parent.mkdir()
    (tmp_path / "libero_object").rename(moved)
    request = resolve(SourceRequest(path=str(moved)))
    assert open_source(request).revision == revision
    largest = max((path for path in moved.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes() + b"x")
    assert open_source(request).revision != revision
