"""Building packs: any number of workers, stopped builds, damaged and repeated episodes, the no-op filter."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from geomcache.cache_schemas.errors import InputError, SourceDamaged
from geomcache.pipeline.files import locked_folder
from geomcache.pipeline.no_ops import rows_kept
from geomcache.pipeline.pack import shard_writer
from geomcache.pipeline.pack.reader import PackReader
from geomcache.stages.cli.pack import build_from
from tests.conftest import LENGTHS, TASK, build_pack_at, nothing, pack_config, write_demo_file
from tests.lerobot_files import KEYS, TASKS, Recorded, edit_table, write_data_set

ROWS = sum(LENGTHS) - len(LENGTHS)


def files_of(pack: Path) -> dict[str, bytes]:
    return {str(path.relative_to(pack)): path.read_bytes() for path in pack.rglob("*") if path.is_file()}


class Stopped(Exception):
    pass


def stop_at(rows: int) -> Any:
    def progress(*report: Any) -> None:
        if not rows or (report[2] == "rows" and report[0] >= rows):
            raise Stopped

    return progress


@pytest.mark.slow
def test_two_workers_on_ray_write_the_same_bytes(pack_path: Path, demo_file: Path, tmp_path: Path) -> None:
    seen = []
    build_from(pack_config(demo_file, out=tmp_path / "pack", workers=2), lambda *report: seen.append(report))
    assert files_of(tmp_path / "pack") == files_of(pack_path)
    assert seen[-1] == (ROWS, ROWS, "rows")


def test_a_stopped_build_is_no_pack_and_keeps_its_shards(demo_file: Path, pack_path: Path, tmp_path: Path) -> None:
    settings = pack_config(demo_file, out=tmp_path / "pack")
    with pytest.raises(Stopped):
        build_from(settings, stop_at(16))
    with pytest.raises(InputError, match="not a finished pack"):
        PackReader(settings.out)
    shards = sorted((settings.out / "shards").iterdir())
    assert len(shards) == 2
    written = [path.stat().st_mtime_ns for path in shards]
    reports: list[tuple[int, int, str]] = []
    build_from(settings, lambda *report: reports.append(report))
    assert next(report for report in reports if report[2] == "rows") == (16, ROWS, "rows")
    assert [path.stat().st_mtime_ns for path in shards] == written
    assert files_of(settings.out) == files_of(pack_path)


@pytest.mark.parametrize("damage", ["torn tar", "lost part", "torn part"])
def test_what_a_crash_tore_is_made_again(demo_file: Path, pack_path: Path, tmp_path: Path, damage: str) -> None:
    settings = pack_config(demo_file, out=tmp_path / "pack")
    with pytest.raises(Stopped):
        build_from(settings, stop_at(16))
    tar, part = settings.out / "shards/000001.tar", settings.out / ".parts/000001.arrow"
    if damage == "lost part":
        part.unlink()
    else:
        torn = tar if damage == "torn tar" else part
        torn.write_bytes(torn.read_bytes()[:700])
    build_from(settings, nothing)
    assert files_of(settings.out) == files_of(pack_path)


def test_an_unfinished_pack_can_be_built_with_other_settings(demo_file: Path, tmp_path: Path) -> None:
    """Shards of the other plan are not taken for this one's, and those beyond its end are removed."""
    with pytest.raises(Stopped):
        build_from(pack_config(demo_file, out=tmp_path / "pack", rows_per_shard=4), stop_at(20))
    build_from(pack_config(demo_file, out=tmp_path / "pack", rows_per_shard=10), nothing)
    build_from(pack_config(demo_file, out=tmp_path / "fresh", rows_per_shard=10), nothing)
    assert files_of(tmp_path / "pack") == files_of(tmp_path / "fresh")


def test_stale_shards_of_other_settings_are_not_kept(demo_file: Path, pack_path: Path, tmp_path: Path) -> None:
    """Same rows, same sizes, other pictures; the second build is killed between a tar and its part of the index."""
    settings = pack_config(demo_file, out=tmp_path / "pack")
    with pytest.raises(Stopped):
        build_from(settings, stop_at(16))
    turned = pack_config(demo_file, out=tmp_path / "pack", source={"image_orientation": "upright"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "_write_part", stop_at(0))
        with pytest.raises(Stopped):
            build_from(turned, nothing)
    build_from(settings, nothing)
    assert files_of(settings.out) == files_of(pack_path)
    with pytest.raises(Stopped):
        build_from(pack_config(demo_file, out=tmp_path / "other"), stop_at(16))
    build_from(turned.model_copy(update={"out": tmp_path / "other"}), nothing)
    build_from(turned.model_copy(update={"out": tmp_path / "fresh"}), nothing)
    assert files_of(tmp_path / "other") == files_of(tmp_path / "fresh")


def test_rows_of_a_long_episode_keep_their_own_actions_and_pictures(tmp_path: Path) -> None:
    """More rows in one piece than are decoded at once."""
    path = write_demo_file(tmp_path / "task_demo.hdf5", lengths=(150,), depth=False)
    info, _ = build_from(pack_config(path, out=tmp_path / "pack", rows_per_shard=256), nothing)
    with PackReader(tmp_path / "pack") as pack, h5py.File(path) as file:
        demo = file["data/demo_0"]
        np.testing.assert_array_equal(pack.actions_NA, demo["actions"][1:].astype(np.float32))
        np.testing.assert_array_equal(pack.states_NS[:, :6], demo["obs/ee_states"][:-1].astype(np.float32))
        np.testing.assert_array_equal(pack.images(range(info.rows))[:, 0], demo["obs/agentview_rgb"][:-1][:, ::-1])


def test_going_on_without_what_is_damaged_keeps_the_shards_before_it(tmp_path: Path) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5", lengths=(17, 9, 9))
    _damage(path, "picture")
    with pytest.raises(SourceDamaged):
        build_pack_at(path, tmp_path / "pack")
    reports: list[tuple[int, int, str]] = []
    settings = pack_config(path, out=tmp_path / "pack", on_error="skip")
    with pytest.raises(Stopped):
        build_from(settings, stop_at(24))  # the damage is known by now, and remembered
    build_from(settings, lambda *report: reports.append(report))
    assert [report for report in reports if report[2] == "rows"] == [(24, 24, "rows")]
    build_from(settings.model_copy(update={"out": tmp_path / "fresh"}), nothing)
    assert files_of(tmp_path / "pack") == files_of(tmp_path / "fresh")


@pytest.mark.slow
def test_many_damaged_pictures_give_one_pack_for_any_number_of_workers(tmp_path: Path) -> None:
    written = write_data_set(tmp_path / "libero", lengths=(5,) * 12)
    for episode in (1, 4, 5, 9):
        file = f"data/chunk-000/file-{episode // 2:03d}.parquet"
        edit_table(written.root / file, KEYS[0], 5 * (episode % 2) + 2, {"bytes": b"junk", "path": "x.png"})
    packs = []
    for workers in (1, 2):
        settings = pack_config(written.root, out=tmp_path / f"pack{workers}", on_error="skip", workers=workers)
        info, _ = build_from(settings, nothing)
        assert [one.episode for one in info.left_out] == [1, 4, 5, 9]
        packs.append(files_of(settings.out))
    assert packs[0] == packs[1]


def test_one_process_at_a_time(demo_file: Path, tmp_path: Path) -> None:
    with locked_folder(tmp_path / "pack"), pytest.raises(InputError, match="another process is writing into"):
        build_pack_at(demo_file, tmp_path / "pack")
    build_pack_at(demo_file, tmp_path / "pack")


def _damage(path: Path, kind: str) -> None:
    if kind == "action":
        with h5py.File(path, "a") as file:
            file["data/demo_1/actions"][1, 1] = np.nan
        return
    with h5py.File(path, "a") as file:  # a compressed picture whose bytes are cut: only seen when it is decoded
        obs = file["data/demo_1/obs"]
        images = obs["agentview_rgb"][:]
        del obs["agentview_rgb"]
        stored = obs.create_dataset("agentview_rgb", data=images, chunks=(1, *images.shape[1:]), compression="gzip")
        stored.id.write_direct_chunk((4, 0, 0, 0), b"these bytes are no gzip stream")


@pytest.mark.parametrize("kind", ["action", "picture"])
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_episode_stops_the_build_or_is_left_out_by_name(tmp_path: Path, kind: str, workers: int) -> None:
    path = write_demo_file(tmp_path / "task_demo.hdf5")
    _damage(path, kind)
    with pytest.raises(SourceDamaged, match="data/demo_1 cannot be used"):
        build_pack_at(path, tmp_path / "pack")
    settings = pack_config(path, out=tmp_path / "pack", on_error="skip", workers=workers)
    info, _ = build_from(settings, nothing)
    assert (info.rows, info.episodes) == (ROWS - LENGTHS[1] + 1, 2)
    (left_out,) = info.left_out
    assert (left_out.source, left_out.episode) == (0, 1)
    assert left_out.where == "task_demo.hdf5: data/demo_1"
    assert ("NaN" if kind == "action" else "filter") in left_out.why
    assert "data/demo_1" in (settings.out / "README.md").read_text()
    assert str(tmp_path) not in (settings.out / "pack.json").read_text()
    with PackReader(settings.out) as pack, h5py.File(path) as file:
        demo = file["data/demo_2"]
        np.testing.assert_array_equal(pack.actions_NA[LENGTHS[0] - 1 :], demo["actions"][1:].astype(np.float32))
        np.testing.assert_array_equal(pack.images([info.rows - 1])[0, 0], demo["obs/agentview_rgb"][-2][::-1])
        assert pack.verify(nothing) == []


def test_hdf5_and_lerobot_sets_share_a_pack_and_say_what_they_are(tmp_path: Path) -> None:
    """The same conventions after each source's own border: bottom-up raw frames, and frames turned by 180 degrees."""
    demos = write_demo_file(tmp_path / "task_demo.hdf5", depth=False)
    with h5py.File(demos) as file:
        raw = [file[f"data/demo_{i}/obs/{name}_rgb"][:] for i in (0,) for name in ("agentview", "eye_in_hand")]
    turned = np.rot90(np.stack(raw, axis=1), 2, axes=(2, 3))
    length = len(turned)
    states, actions = np.full((length, 8), 0.01, np.float32), np.zeros((length, 7), np.float32)
    actions[:, 6], actions[:, 0] = -1.0, np.linspace(0, 1, length)
    stored = Recorded(tmp_path, [turned], [states], [actions], [TASKS[0]])
    write_data_set(tmp_path / "libero_object_lerobot", recorded=stored)
    settings = pack_config(demos, tmp_path / "libero_object_lerobot", out=tmp_path / "pack")
    info, _ = build_from(settings, nothing)
    assert [source.kind for source in info.request.sources] == ["libero_hdf5", "lerobot"]
    card = (settings.out / "README.md").read_text()
    assert "LeRobot v3.0" in card
    assert "image_orientation rot180" in card
    with PackReader(settings.out) as pack:
        both = pack.images([0, ROWS])  # the first rows of the first episode of each
        np.testing.assert_array_equal(both[0], both[1])
        assert pack.instruction(ROWS) == TASKS[0]


def test_a_demonstration_that_is_there_twice_is_refused(demo_file: Path, tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir()
    for name in ("a", "b"):
        (tmp_path / "copies" / name).mkdir()
        (tmp_path / "copies" / name / demo_file.name).write_bytes(demo_file.read_bytes())
    with pytest.raises(SourceDamaged, match="the same demonstration is there twice"):
        build_pack_at(tmp_path / "copies", tmp_path / "pack")
    info, _ = build_from(pack_config(tmp_path / "copies", out=tmp_path / "pack", on_error="skip"), nothing)
    assert (info.rows, len(info.left_out)) == (ROWS, len(LENGTHS))


def test_a_whole_copy_of_a_damaged_demonstration_is_packed(tmp_path: Path) -> None:
    good = write_demo_file(tmp_path / "all" / "b" / "task_demo.hdf5", lengths=(9, 12))
    bad = tmp_path / "all" / "a" / "task_demo.hdf5"
    bad.parent.mkdir()
    bad.write_bytes(good.read_bytes())
    _damage(bad, "picture")
    with h5py.File(bad, "a") as file:
        file["data/demo_0/actions"][:] *= 0.5  # only demo_1 is there twice
    info, _ = build_from(pack_config(tmp_path / "all", out=tmp_path / "pack", on_error="skip"), nothing)
    assert (info.episodes, [one.episode for one in info.left_out]) == (3, [1])


def test_a_refused_build_does_not_claim_the_folder(tmp_path: Path) -> None:
    broken = write_demo_file(tmp_path / "task_demo.hdf5")
    whole = broken.read_bytes()
    _damage(broken, "action")
    with pytest.raises(SourceDamaged):
        build_pack_at(broken, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
    broken.write_bytes(whole)
    assert len(PackReader(build_pack_at(broken, tmp_path / "pack"))) == ROWS


def test_the_no_op_rule_is_the_communitys() -> None:
    """Hand-computed: row 0 stays still with a fresh gripper, 2 repeats row 1's, 3 only closes, 5 only repeats."""
    actions = np.zeros((6, 7), np.float32)
    actions[:, 6] = [-1, -1, -1, 1, 1, 1]
    actions[1, 0], actions[4, 5], actions[2, 1] = 0.5, 2e-4, 5e-5
    assert rows_kept(actions, 1e-4).tolist() == [1, 3, 4]
    assert rows_kept(actions, 1e-3).tolist() == [1, 3]
    assert rows_kept(actions[:1], 1e-4).tolist() == []
    # a gripper change against the last KEPT action, not against the row before
    actions[:, 6] = [-1, -1, -1, 1, 1, -1]
    actions[4, 5] = 0.0
    assert rows_kept(actions, 1e-4).tolist() == [1, 3, 5]


def test_no_ops_and_failures_are_left_out_and_named(tmp_path: Path) -> None:
    path = write_demo_file(tmp_path / f"{TASK}_demo.hdf5")
    with h5py.File(path, "a") as file:
        for number, length in enumerate(LENGTHS):
            file[f"data/demo_{number}/dones"] = np.eye(length, dtype=np.uint8)[-1] * (number != 2)
        actions = file["data/demo_1/actions"]
        actions[4:6, :6], actions[3:6, 6] = 0.0, 0.25
        kept = [row for row in range(LENGTHS[1] - 1) if row not in (3, 4)]
        images, states = file["data/demo_1/obs/agentview_rgb"][:], file["data/demo_1/obs/ee_states"][:]
    info, _ = build_from(pack_config(path, out=tmp_path / "pack", no_ops={}), nothing)
    assert (info.rows, info.episodes, info.no_op_rows) == (LENGTHS[0] - 1 + len(kept), 2, 2)
    assert [(one.where, one.why) for one in info.left_out] == [(f"{path.name}: data/demo_2", "it failed")]
    with PackReader(tmp_path / "pack") as pack:
        rows = range(LENGTHS[0] - 1, info.rows)
        np.testing.assert_array_equal(pack.images(rows)[:, 0], images[kept][:, ::-1])
        np.testing.assert_array_equal(pack.states_NS[rows.start :, :6], states[kept].astype(np.float32))
    plain, _ = build_from(pack_config(path, out=tmp_path / "plain"), nothing)
    assert plain.digest != info.digest
    every, _ = build_from(pack_config(path, out=tmp_path / "every", no_ops={"success_only": False}), nothing)
    assert every.rows == ROWS - 2


def test_an_episode_of_no_ops_alone_is_named(tmp_path: Path) -> None:
    path = write_demo_file(tmp_path / f"{TASK}_demo.hdf5")
    with h5py.File(path, "a") as file:
        file["data/demo_1/actions"][:, :6] = 0.0
        file["data/demo_1/actions"][:, 6] = -1.0
    settings = pack_config(path, out=tmp_path / "pack", no_ops={"success_only": False})
    (left_out,) = build_from(settings, nothing)[0].left_out
    assert (left_out.episode, left_out.why) == (1, "nothing but no-ops")


def test_success_that_nobody_recorded_is_not_guessed(demo_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"success_only=false"):
        build_from(pack_config(demo_file, out=tmp_path / "pack", no_ops={}), nothing)
