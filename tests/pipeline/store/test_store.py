"""The cache on disk: other Zarr readers agree, damage is found, half-written is never complete."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from geomcache.cache_schemas.errors import (
    CacheDamaged,
    CacheIncomplete,
    CacheLocked,
    CacheMissing,
    CacheStale,
    InputError,
    SchemaTooNew,
)
from geomcache.cache_schemas.layout import commit_path
from geomcache.pipeline.files import temporary_name
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.lock import write_lock
from geomcache.pipeline.store.reader import CachedTokens, open_manifest
from geomcache.pipeline.store.shard_file import crc32c
from geomcache.pipeline.store.verify import verify_cache
from geomcache.stages.extract.plan import ExtractConfig, begin, make_plan
from tests.conftest import ENCODERS, build_pack_at, extract_without_ray, nothing, write_demo_file


@pytest.fixture
def cache(pack_path: Path, tmp_path: Path) -> Path:
    """A fresh complete cache that a test may damage."""
    return extract_without_ray(pack_path, "depth_anything3", tmp_path / "cache")


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == (0xE3069283).to_bytes(4, "little")  # RFC 3720, appendix B.4


def test_zarr_python_and_tensorstore_read_what_we_write(caches: dict[str, Path]) -> None:
    for path in caches.values():
        with CachedTokens(path) as cache:
            ours = cache.arrays(range(len(cache)))["tokens"]
            theirs = zarr.open_group(str(path), mode="r")["tokens"]
            assert theirs.attrs["logical_dtype"] == cache.manifest.arrays["tokens"].logical_dtype
            np.testing.assert_array_equal(theirs[:], ours)
            store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "tokens")}}
            np.testing.assert_array_equal(tensorstore.open(store, open=True).result().read().result(), ours)


@pytest.mark.parametrize("writer", ["zarr-python", "tensorstore"])
def test_we_read_what_others_write(caches: dict[str, Path], tmp_path: Path, writer: str) -> None:
    """Another writer's shards under our metadata: the same rows, in whatever physical order; the short last one too."""
    source, copy = caches["depth_anything3"], tmp_path / "copy"
    shutil.copytree(source, copy)
    with CachedTokens(source) as ours:
        rows = ours.arrays(range(len(ours)))["tokens"]
    shutil.rmtree(copy / "tokens/c")
    if writer == "zarr-python":
        zarr.open_group(str(copy), mode="r+")["tokens"][:] = rows
    else:
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(copy / "tokens")}}
        tensorstore.open(store, open=True).result().write(rows).result()
    with CachedTokens(copy) as theirs:
        np.testing.assert_array_equal(theirs.arrays(range(len(theirs)))["tokens"], rows)


def test_rows_come_in_the_order_asked_for(caches: dict[str, Path]) -> None:
    with CachedTokens(caches["oracle_pointmap"]) as cache:
        every = cache.tokens(range(len(cache)))
        assert torch.equal(cache.tokens([20, 1, 1, 9]), every[[20, 1, 1, 9]])
        with pytest.raises(InputError, match="0 to 24"):
            cache.tokens([25])


@pytest.mark.parametrize("place", ["payload", "index", "commit", "zero pages", "cut", "deleted", "swapped"])
def test_damage_is_found_by_verify_and_by_reading_and_repaired_by_one_shard(cache: Path, place: str) -> None:
    shard, other = cache / "tokens/c/1/0/0/0", cache / "tokens/c/2/0/0/0"
    data = bytearray(shard.read_bytes())
    if place == "payload":
        data[1000] ^= 4
        shard.write_bytes(data)
    elif place == "index":
        data[-20] ^= 4
        shard.write_bytes(data)
    elif place == "commit":
        record = json.loads((cache / commit_path(1)).read_text())
        (cache / commit_path(1)).write_text(json.dumps({**record, "rows": 7}))
    elif place == "zero pages":
        data[0:2048] = bytes(2048)
        shard.write_bytes(data)
    elif place == "cut":
        shard.write_bytes(data[:-10])
    elif place == "deleted":
        shard.unlink()
    elif place == "swapped":
        theirs = other.read_bytes()
        other.write_bytes(bytes(data))
        shard.write_bytes(theirs)
    result = verify_cache(cache, repair=False, progress=nothing)
    assert not result.complete
    assert set(result.damaged) == ({1, 2} if place == "swapped" else {1})
    with pytest.raises(CacheDamaged):
        CachedTokens(cache).tokens(range(8, 16))
    assert verify_cache(cache, repair=True, progress=nothing).repaired
    with pytest.raises(CacheIncomplete):
        CachedTokens(cache)
    config = _config(cache)
    assert make_plan(config).remaining == ((1, 2) if place == "swapped" else (1,))


def _config(cache: Path) -> ExtractConfig:
    pack = cache.parent / "pack"
    if not pack.exists():
        build_pack_at(
            write_demo_file(cache.parent / "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo.hdf5"),
            pack,
        )
    return ExtractConfig(
        pack=pack,
        out=cache,
        encoder="depth_anything3",
        encoder_config=ENCODERS["depth_anything3"],
        device="cpu",
    )


def test_an_unfinished_cache_is_not_readable_and_says_how_to_go_on(cache: Path) -> None:
    (cache / commit_path(3)).unlink()
    with pytest.raises(CacheIncomplete, match="geomcache extract again"):
        CachedTokens(cache)
    assert make_plan(_config(cache)).remaining == (3,)


def test_missing_foreign_and_future_caches_are_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheMissing, match="geomcache extract"):
        CachedTokens(tmp_path / "nothing")
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 3}))
    with pytest.raises(SchemaTooNew, match="pip install --upgrade"):
        open_manifest(cache)
    (cache / "manifest.json").write_text(json.dumps({**manifest, "rows": 24}, indent=2))
    with pytest.raises(CacheDamaged, match="cannot be edited by hand"):
        open_manifest(cache)
    (cache / "manifest.json").write_text("{")
    with pytest.raises(CacheDamaged, match=r"manifest\.json"):
        open_manifest(cache)


def test_a_shard_of_another_cache_is_refused(cache: Path, pack_path: Path, tmp_path: Path) -> None:
    other = extract_without_ray(pack_path, "depth_anything3", tmp_path / "other", seed=9)
    for name in ("tokens/c/0/0/0/0", commit_path(0)):
        (cache / name).write_bytes((other / name).read_bytes())
    with pytest.raises(CacheStale, match="belongs to another cache"):
        CachedTokens(cache)
    assert set(verify_cache(cache, repair=False, progress=nothing).damaged) == {0}


def test_extracting_something_else_into_a_cache_is_refused_by_name(cache: Path, tmp_path: Path) -> None:
    config = _config(cache)
    other = config.model_copy(update={"encoder_config": {**config.encoder_config, "seed": 3}})
    with pytest.raises(CacheStale, match=r"fingerprint\.weights"):
        make_plan(other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "data.csv").write_text("x")
    with pytest.raises(InputError, match=r"data\.csv"):
        make_plan(config.model_copy(update={"out": tmp_path / "full"}))


def test_writing_a_shard_twice_gives_the_same_bytes(cache: Path) -> None:
    from geomcache.stages.extract.worker import ShardWorker

    before = (cache / "tokens/c/2/0/0/0").read_bytes()
    (cache / commit_path(2)).unlink()
    _left_by_a_killed_writer(cache / "tokens/c/2/0/0/0").write_bytes(b"left by a killed writer")
    config = _config(cache)
    plan = begin(make_plan(config))
    assert not list(cache.rglob("*.partial"))
    ShardWorker(config.pack, cache, plan.manifest, "cpu").run(2)
    assert (cache / "tokens/c/2/0/0/0").read_bytes() == before
    assert verify_cache(cache, repair=False, progress=nothing).complete


def _left_by_a_killed_writer(path: Path) -> Path:
    """A temporary name of this host and of a process that is gone."""
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    return path.with_name(temporary_name(path).name.replace(f".{os.getpid()}.", f".{gone}."))


def test_lost_zarr_metadata_is_found_and_written_again(cache: Path) -> None:
    (cache / "tokens/zarr.json").write_text("{}")
    (cache / "zarr.json").unlink()
    found = verify_cache(cache, repair=True, progress=nothing)
    assert found.metadata == ("zarr.json", "tokens/zarr.json")
    assert not found.complete
    assert verify_cache(cache, repair=False, progress=nothing).complete
    assert zarr.open_group(str(cache), mode="r")["tokens"].shape[0] == 25


def test_a_creation_that_was_stopped_goes_on(cache: Path) -> None:
    """Only the manifest and a temporary file stand, as after a kill or a full disk."""
    config = _config(cache).model_copy(update={"out": cache.parent / "stopped"})
    (cache.parent / "stopped").mkdir()
    (cache.parent / "stopped" / "manifest.json").write_bytes((cache / "manifest.json").read_bytes())
    assert len(begin(make_plan(config)).remaining) == 4
    assert (config.out / "tokens/zarr.json").exists()
    only_temporary = config.model_copy(update={"out": cache.parent / "temporary"})
    only_temporary.out.mkdir()
    _left_by_a_killed_writer(only_temporary.out / "manifest.json").write_text("{")
    assert len(make_plan(only_temporary).remaining) == 4


def test_the_same_weights_in_another_folder_are_the_same_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geomcache.pipeline.encoders import depth_anything3

    config = _config(cache)
    monkeypatch.setattr(depth_anything3.Encoder, "weights_digest", lambda _: "the same")
    stored = extract_without_ray(config.pack, "depth_anything3", tmp_path / "here", weights=None)
    moved = config.model_copy(update={"out": stored, "encoder_config": {**config.encoder_config, "seed": 12}})
    assert make_plan(moved).remaining == ()


def test_verify_tells_whether_the_pack_is_covered(cache: Path, pack_path: Path) -> None:
    with PackReader(pack_path) as pack:
        digest, rows = pack.info.digest, len(pack)
    for pack, found in (
        ((digest, rows), "matches"),
        ((digest, 26), "26 rows in the pack"),
        (("0" * 64, rows), "another"),
    ):
        result = verify_cache(cache, repair=False, progress=nothing, pack=pack)
        assert result.pack.startswith(found)
        assert result.complete == (found == "matches")


def test_verify_names_the_rows_and_repair_refuses_while_somebody_writes(cache: Path, tmp_path: Path) -> None:
    shard = cache / "tokens/c/1/0/0/0"
    data = bytearray(shard.read_bytes())
    data[1100] ^= 1  # the second row: 1,024 bytes and a checksum each
    shard.write_bytes(data)
    assert verify_cache(cache, repair=False, progress=nothing).bad_rows == {1: [9]}
    with write_lock(cache, "geomcache extract"), pytest.raises(CacheLocked, match="geomcache extract"):
        verify_cache(cache, repair=True, progress=nothing)
    with pytest.raises(CacheMissing):
        verify_cache(tmp_path / "mistyped", repair=True, progress=nothing)
    assert not (tmp_path / "mistyped").exists()


def test_rows_are_checked_as_asked(cache: Path) -> None:
    """Every time, the first time, never: told by a row that changes under an open reader."""
    readers = {check: CachedTokens(cache, check=check) for check in ("every", "first", "never")}
    truth = readers["every"].tokens([9])
    assert torch.equal(readers["first"].tokens([9]), truth)
    shard = cache / "tokens/c/1/0/0/0"
    with shard.open("r+b") as file:
        file.seek(1101)
        byte = file.read(1)[0]
        file.seek(1101)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CacheDamaged):
        readers["every"].tokens([9])
    assert not torch.equal(readers["first"].tokens([9]), truth)
    assert not torch.equal(readers["never"].tokens([9]), truth)
    with pytest.raises(InputError, match="every, first, never"):
        CachedTokens(cache, check="evry")  # type: ignore[arg-type]
