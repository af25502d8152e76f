"""Packs: the right pixels in the right rows, byte-identical, readable by others, damage and misuse named."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from geomcache.cache_schemas.errors import ContractMismatch, InputError, PackDamaged, SchemaTooNew
from geomcache.pipeline.pack.picture import row_picture
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.pack.shard_writer import _tar_header
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
    (pack / "shards/000009.tar").write_bytes(b"")
    with PackReader(pack) as reader:
        stranger = f"{pack / 'shards/000009.tar'} does not belong to the pack"
        assert reader.verify(nothing) == [
            stranger,
            f"{shard} is damaged: expected the bytes that were packed, found other bytes",
        ]
    (pack / "shards/000009.tar").unlink()
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
    [{"rows": 500}, {"rows": -5}, {"episodes": 2}, {"shards": []}, {"index": []}, {"name": "../elsewhere.tar"}],
    ids=lambda lie: str(lie),
)
def test_a_pack_json_that_contradicts_the_index_is_refused(
    demo_file: Path, tmp_path: Path, lie: dict[str, Any]
) -> None:
    pack = build_pack_at(demo_file, tmp_path / "pack")
    card = json.loads((pack / "pack.json").read_text())
    if "name" in lie:  # a good file elsewhere would be verified in place of the one that rows are read from
        shutil.copy(pack / "shards/000001.tar", tmp_path / "elsewhere.tar")
        card["shards"][1] |= lie
    (pack / "pack.json").write_text(json.dumps({**card, **(lie if "name" not in lie else {})}))
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


@pytest.mark.parametrize("member", ["agentview.png", "robot0_eye_in_hand.depth.npy"])
def test_a_flipped_bit_is_seen_when_its_row_is_read(demo_file: Path, tmp_path: Path, member: str) -> None:
    """Training reads rows one by one; Pillow decodes most flipped PNGs without a word."""
    pack = build_pack_at(demo_file, tmp_path / "pack")
    with tarfile.open(pack / "shards/000001.tar") as tar:
        info = tar.getmember(f"00000009.{member}")
    data = bytearray((pack / "shards/000001.tar").read_bytes())
    data[info.offset_data + info.size - 30] ^= 1
    (pack / "shards/000001.tar").write_bytes(data)
    with PackReader(pack) as reader:
        reader.frames([8, 10])
        with pytest.raises(PackDamaged, match=r"000001\.tar(.|\n)*for row 9"):
            reader.frames([8, 9])


@pytest.mark.parametrize("name", ["/etc/cron.d/evil.png", "../../evil.png", "00000008.agentview.png"])
def test_a_member_that_leaves_the_folder_or_is_no_file_is_refused(demo_file: Path, tmp_path: Path, name: str) -> None:
    """Even where the digests in pack.json were made to fit: tar and webdataset would trust the name."""
    pack = build_pack_at(demo_file, tmp_path / "pack")
    shard = pack / "shards/000001.tar"
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member)) for member in tar]
        contents = [(member, file.read()) for member, file in members if file is not None]
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (member, data) in enumerate(contents):
            if number == 0:
                member.name = name
                member.type = tarfile.REGTYPE if name.endswith("evil.png") else tarfile.SYMTYPE
                member.size = len(data) if name.endswith("evil.png") else 0
            tar.addfile(member, io.BytesIO(data))
    card = json.loads((pack / "pack.json").read_text())
    card["shards"][1].update(bytes=shard.stat().st_size, sha256=hashlib.sha256(shard.read_bytes()).hexdigest())
    (pack / "pack.json").write_text(json.dumps(card))
    with PackReader(pack) as reader, pytest.raises(PackDamaged, match="member"):
        reader.verify_shard(1)


def test_a_row_is_drawn(pack_path: Path) -> None:
    with PackReader(pack_path) as pack:
        picture = np.asarray(Image.open(io.BytesIO(row_picture(pack, 11))).convert("RGB"))
        assert picture.shape[0] > 400
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 500  # the frames are in it
        with pytest.raises(InputError, match=f"row {ROWS} is not in"):
            row_picture(pack, ROWS)


@pytest.mark.parametrize(
    ("name", "size"), [("00000000.agentview.png", 1), ("00273464.robot0_eye_in_hand.depth.npy", 8**9)]
)
def test_tar_headers_are_those_of_pythons_own_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert _tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)
