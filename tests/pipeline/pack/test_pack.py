"""Packs: the right pixels in the right rows, byte-identical, readable by others, damage and misuse named."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from geomcache.cache_schemas.errors import ContractMismatch, InputError, PackDamaged, SchemaTooNew
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.sources.libero_hdf5 import Config, Source
from geomcache.stages.cli.pack import build_from
from tests.conftest import LENGTHS, build_pack_at, extract_without_ray, nothing, pack_config, whole, write_demo_file

ROWS = sum(LENGTHS) - len(LENGTHS)


def test_every_row_holds_its_episodes_frame_action_and_state(pack_path: Path, demo_file: Path) -> None:
    with PackReader(pack_path) as pack:
        assert len(pack) == ROWS
        row = 0
        source = Source(Config(path=demo_file))
        for number in range(source.episode_count):
            head, episode = whole(source, number)
            rows = range(row, row + len(episode))
            frames = pack.frames(rows)
            for mine, theirs in zip(
                (frames.images_BVHWC, frames.depth_BVHW, frames.intrinsics_BV33, frames.extrinsics_BV44),
                (
                    episode.frames.images_BVHWC,
                    episode.frames.depth_BVHW,
                    episode.frames.intrinsics_BV33,
                    episode.frames.extrinsics_BV44,
                ),
                strict=True,
            ):
                np.testing.assert_array_equal(mine, theirs)
            np.testing.assert_array_equal(pack.actions_NA[rows], head.actions_TA)
            np.testing.assert_array_equal(pack.states_NS[rows], episode.states_TS)
            assert pack.instruction(row) == head.instruction
            row += len(episode)
        assert pack.verify(nothing) == []


def test_rows_come_in_the_order_asked_for(pack_path: Path) -> None:
    with PackReader(pack_path) as pack:
        every = pack.images(range(ROWS))
        np.testing.assert_array_equal(pack.images([17, 3, 3, 24]), every[[17, 3, 3, 24]])


def test_the_same_input_gives_the_same_bytes(pack_path: Path, demo_file: Path, tmp_path: Path) -> None:
    again = build_pack_at(demo_file, tmp_path / "again")
    names = sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file())
    assert len(names) == 4 + 5  # shards; two indices, two JSON files, the card
    assert [name for name in names if (again / name).read_bytes() != (pack_path / name).read_bytes()] == []


# webdataset leaves its shard file to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_tar_webdataset_and_arrow_read_it_without_us(pack_path: Path) -> None:
    with PackReader(pack_path) as pack, tarfile.open(pack_path / "shards/000001.tar") as tar:
        member = tar.extractfile("00000011.robot0_eye_in_hand.png")
        assert member is not None
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(member.read()))), pack.images([11])[0, 1])
        samples = list(webdataset.WebDataset(str(pack_path / "shards/000001.tar"), shardshuffle=False).decode("rgb8"))
        assert [sample["__key__"] for sample in samples] == [f"{row:08d}" for row in range(8, 16)]
        np.testing.assert_array_equal(samples[2]["agentview.png"], pack.images([10])[0, 0])
        assert samples[2]["json"]["instruction"] == pack.instruction(10)
        table = pa.ipc.open_file(pack_path / "rows.arrow").read_all()
        np.testing.assert_allclose(table["action"].to_pylist()[5], pack.actions_NA[5])


def test_a_finished_pack_is_recognised_and_other_sources_are_refused(
    pack_path: Path, demo_file: Path, tmp_path: Path
) -> None:
    settings = pack_config(demo_file, out=pack_path)
    assert build_from(settings, nothing)[1]
    with pytest.raises(InputError, match=r"rows_per_shard: 8 != 16"):
        build_from(settings.model_copy(update={"rows_per_shard": 16}), nothing)
    other = write_demo_file(tmp_path / "other_demo.hdf5", seed=5)
    with pytest.raises(InputError, match="another --out"):
        build_from(pack_config(other, out=pack_path), nothing)


def test_two_sources_share_a_pack_only_under_one_contract(demo_file: Path, tmp_path: Path) -> None:
    other = write_demo_file(tmp_path / "other_demo.hdf5", seed=7, lengths=(4,))
    both = pack_config(demo_file, other, out=tmp_path / "both")
    info, _ = build_from(both, nothing)
    assert (info.rows, info.episodes) == (ROWS + 3, len(LENGTHS) + 1)
    flat = write_demo_file(tmp_path / "flat_demo.hdf5", depth=False)
    with pytest.raises(ContractMismatch, match="has_depth: True != False"):
        build_from(pack_config(demo_file, flat, out=tmp_path / "mixed"), nothing)


def test_foreign_folders_and_damage_are_named(demo_file: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        build_pack_at(demo_file, tmp_path / "full")
    pack = build_pack_at(demo_file, tmp_path / "pack")
    shard = pack / "shards/000002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(PackDamaged, match=r"000002\.tar"):
        PackReader(pack)
    flipped = bytearray(whole)
    flipped[2000] ^= 1
    shard.write_bytes(flipped)
    with PackReader(pack) as reader:
        assert reader.verify(nothing) == [f"{shard} is damaged"]
    index = (pack / "rows.arrow").read_bytes()
    (pack / "rows.arrow").write_bytes(index[:500] + bytes([index[500] ^ 1]) + index[501:])
    with pytest.raises(PackDamaged, match=r"rows\.arrow"):
        PackReader(pack)
    (pack / "rows.arrow").write_bytes(index)
    card = json.loads((pack / "pack.json").read_text())
    (pack / "pack.json").write_text(json.dumps({**card, "schema_version": 99}))
    with pytest.raises(SchemaTooNew, match="schema version 99"):
        PackReader(pack)


@pytest.mark.parametrize(
    "lie",
    [{"rows": 500}, {"rows": -5}, {"episodes": 2}, {"shards": []}, {"index": []}],
    ids=lambda lie: str(lie),
)
def test_a_pack_json_that_contradicts_the_index_is_refused(
    demo_file: Path, tmp_path: Path, lie: dict[str, Any]
) -> None:
    pack = build_pack_at(demo_file, tmp_path / "pack")
    card = json.loads((pack / "pack.json").read_text())
    (pack / "pack.json").write_text(json.dumps({**card, **lie}))
    with pytest.raises(PackDamaged, match=r"pack\.json"):
        PackReader(pack)


def test_a_damaged_shard_never_becomes_tokens(demo_file: Path, tmp_path: Path) -> None:
    """Depth carries no checksum of its own; extraction compares the shard's digest first."""
    pack = build_pack_at(demo_file, tmp_path / "pack")
    with tarfile.open(pack / "shards/000001.tar") as tar:
        place = tar.getmember("00000009.agentview.depth.npy").offset_data + 500
    data = bytearray((pack / "shards/000001.tar").read_bytes())
    data[place] ^= 1
    (pack / "shards/000001.tar").write_bytes(data)
    with pytest.raises(PackDamaged, match=r"000001\.tar"):
        extract_without_ray(pack, "oracle_pointmap", tmp_path / "cache")
