"""Packs whose rows are several control steps apart, and of pushed demonstrations: every action, every mask."""

import json
import tarfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest

from geomcache.cache_schemas.errors import InputError, PackDamaged, SourceDamaged
from geomcache.pipeline.pack.picture import row_picture
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.sources.libero_hdf5 import Config, Source
from geomcache.stages.cli.pack import build_from
from tests.conftest import build_pack_at, nothing, pack_config, write_demo_file
from tests.thinned_files import STEPS, thinned


def test_a_hand_computed_pack(tmp_path: Path) -> None:
    """13 control steps, rows at 0, 4, 8, 12; pushes at control steps 5 and 6 (recorded steps 6 and 7)."""
    path = thinned(tmp_path / "task_demo.hdf5", 4, [6, 7])
    info, _ = build_from(pack_config(path, out=tmp_path / "pack"), nothing)
    assert (info.rows, info.steps_per_row, info.schema_version) == (4, 4, 3)
    assert info.steps is not None
    assert (info.steps.total, info.steps.perturbed) == (13, 2)
    with PackReader(tmp_path / "pack") as pack, h5py.File(path) as file:
        demo = file["data/demo_0"]
        labels = demo["actions"][1:].astype(np.float32)
        assert pack.step_of_row.tolist() == [0, 4, 8, 12]
        assert (pack.episodes[0].rows, pack.episodes[0].steps) == (4, 13)
        np.testing.assert_array_equal(pack.images([2])[0, 0], demo["obs/agentview_rgb"][2][::-1])
        np.testing.assert_array_equal(pack.states_NS[:, :6], demo["obs/ee_states"][:4].astype(np.float32))
        np.testing.assert_array_equal(pack.actions_NA, labels[[0, 4, 8, 12]])
        actions, counts = pack.action_chunk(0, 8)
        np.testing.assert_array_equal(actions, labels[:8])
        assert counts.tolist() == [True] * 6 + [False] * 2  # step 5 was answered before its push, 6 and 7 after it
        assert pack.action_chunk(1, 8)[1].tolist() == [True, True] + [False] * 6
        assert pack.action_chunk(2, 8)[1].tolist() == [True] * 5 + [False] * 3  # to the end of the episode
        actions, counts = pack.action_chunk(3, 3)
        np.testing.assert_array_equal(actions, labels[[12, 12, 12]])
        assert counts.tolist() == [True, False, False]
        assert pack.counted_N.tolist() == [6, 2, 5, 1]
        np.testing.assert_array_equal(pack.labels(np.array([1, 3])), labels[[4, 5, 6, 7, 12]])
        assert pack.verify(nothing) == []
        assert len(row_picture(pack, 3)) > 1000
    card = (tmp_path / "pack/README.md").read_text()
    assert "Only one in 4 control steps was observed" in card
    assert "in 2 control steps" in card


@pytest.mark.parametrize("every", [1, 3, 4])
def test_chunks_are_those_of_the_definition(tmp_path: Path, every: int) -> None:
    """A step counts unless the episode is over, or an executed action from the row's step to the one before it
    carried a push."""
    rng, lengths, horizon = np.random.default_rng(every), (9, 3, 21, 13), 7
    pushed = [np.flatnonzero(rng.random(length) < 0.2).tolist() for length in lengths]
    path = thinned(tmp_path / "task_demo.hdf5", every, *pushed, lengths=lengths)
    with PackReader(build_pack_at(path, tmp_path / "pack")) as pack, h5py.File(path) as file:
        row = 0
        for number, length in enumerate(lengths):
            labels = file[f"data/demo_{number}/actions"][:].astype(np.float32)
            for first in range(1, length, every):  # the recorded step whose action answers the row
                actions, counts = pack.action_chunk(row, horizon)
                for t in range(horizon):
                    np.testing.assert_array_equal(actions[t], labels[min(first + t, length - 1)])
                    before = range(first, first + t)
                    assert counts[t] == (first + t < length and not set(pushed[number]) & set(before))
                assert counts.sum() == min(horizon, pack.counted_N[row])
                row += 1
        assert row == len(pack)
        assert (pack.info.steps_per_row, pack.episodes[2].steps) == (every, 20)


def test_a_plain_pack_is_what_it_was_before(pack_path: Path) -> None:
    """No new column, no new key, the old schema version: older readers, digests and caches go on."""
    info = json.loads((pack_path / "pack.json").read_text())
    assert "steps" not in info
    assert info["schema_version"] == 2
    columns = "episode step state action offset size crc32c intrinsics extrinsics"
    assert pa.ipc.open_file(pack_path / "rows.arrow").schema.names == columns.split()
    assert pa.ipc.open_file(pack_path / "episodes.arrow").schema.names[-2:] == ["rows", "metadata"]
    with PackReader(pack_path) as pack:
        assert (pack.info.steps_per_row, pack.info.steps) == (1, None)
        assert pack.counted_N[:9].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 11]
        np.testing.assert_array_equal(pack.labels(np.array([3, 9])), pack.actions_NA[[3, 9]])


def test_others_find_every_action_without_us(tmp_path: Path) -> None:
    path = thinned(tmp_path / "task_demo.hdf5", 4, [6])
    pack = build_pack_at(path, tmp_path / "pack")
    with h5py.File(path) as file, tarfile.open(pack / "shards/000000.tar") as tar:
        member = tar.extractfile("00000003.json")
        assert member is not None
        last = json.loads(member.read())
        np.testing.assert_allclose(last["actions"], file["data/demo_0/actions"][13:], rtol=1e-6)
    assert (last["step"], last["perturbed"]) == (12, [0])
    table = pa.ipc.open_file(pack / "rows.arrow").read_all()
    assert table["perturbed"].to_pylist()[1] == [0, 1, 0, 0]


def test_flags_of_some_sources_are_none_of_the_others(tmp_path: Path) -> None:
    """A pack of pushed and of plain demonstrations, rows at every step: the plain ones count to their ends."""
    pushed = thinned(tmp_path / "pushed_demo.hdf5", 1, [3], lengths=(6,))
    plain = write_demo_file(tmp_path / "plain_demo.hdf5", seed=3, lengths=(5,))
    info, _ = build_from(pack_config(pushed, plain, out=tmp_path / "pack"), nothing)
    assert (info.steps_per_row, info.steps and info.steps.perturbed) == (1, 1)
    with PackReader(tmp_path / "pack") as pack:
        assert pack.counted_N.tolist() == [3, 2, 1, 2, 1, 4, 3, 2, 1]


def test_rows_that_lie_differently_far_apart_share_no_pack(tmp_path: Path) -> None:
    four = thinned(tmp_path / "four_demo.hdf5", 4)
    every = write_demo_file(tmp_path / "every_demo.hdf5", seed=4, lengths=(5,))
    with pytest.raises(InputError, match=r"4, as in four_demo(.|\n)*1 in every_demo"):
        build_from(pack_config(four, every, out=tmp_path / "pack"), nothing)
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize(("every", "pushed"), [(4, None), (1, [3])])
def test_the_no_op_filter_is_refused(tmp_path: Path, every: int, pushed: list[int] | None) -> None:
    path = thinned(tmp_path / "task_demo.hdf5", every, pushed)
    with pytest.raises(InputError, match="no-op filter cannot be used"):
        build_from(pack_config(path, out=tmp_path / "pack", no_ops={"success_only": False}), nothing)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attribute": 0}, "observe_every is"),
        ({"attribute": 3}, "obs/ee_states has 4 steps but there are 14 actions, one in 3 of them observed"),
        ({"perturbed": np.zeros(4, np.uint8)}, "expected 0 or 1 for each of 14 actions"),
        ({"perturbed": np.full(STEPS, 2, np.uint8)}, "expected 0 or 1 for each of 14 actions"),
    ],
)
def test_a_recording_that_contradicts_itself_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = thinned(tmp_path / "task_demo.hdf5", 4, [6])
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0"]
        if "attribute" in change:
            demo.attrs["observe_every"] = change["attribute"]
        else:
            del demo["perturbed"]
            demo["perturbed"] = change["perturbed"]
    with pytest.raises(SourceDamaged) as caught:
        Source(Config(path=path)).head(0)
    assert named in str(caught.value)


@pytest.mark.parametrize("lie", [None, {"per_row": 2}, {"total": 12}, {"perturbed": None}], ids=str)
def test_a_pack_json_that_lies_about_steps_is_refused(tmp_path: Path, lie: dict[str, Any] | None) -> None:
    pack = build_pack_at(thinned(tmp_path / "task_demo.hdf5", 4, [6]), tmp_path / "pack")
    card = json.loads((pack / "pack.json").read_text())
    card["steps"] = None if lie is None else {**card["steps"], **lie}
    (pack / "pack.json").write_text(json.dumps(card))
    with pytest.raises(PackDamaged, match=r"pack\.json"):
        PackReader(pack)


def test_the_recorders_suite_is_preferred_to_the_bddl_files(tmp_path: Path) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5", lengths=(4,))
    assert Source(Config(path=path)).head(0).suite == "libero_object"
    with h5py.File(path, "a") as file:
        file["data"].attrs["suite"] = "libero_object_spread"
    assert Source(Config(path=path)).head(0).suite == "libero_object_spread"
