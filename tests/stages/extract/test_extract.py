"""Stage one: parity of cached and live tokens, resume, a killed worker, other weights refused."""

import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from geomcache.cache_schemas.errors import CacheStale, ContractMismatch, InputError, UnknownName
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.stages.evaluate.live_policy import build_live_tokens
from geomcache.stages.extract.plan import ExtractConfig, begin, make_plan
from geomcache.stages.extract.run import run
from geomcache.stages.extract.worker import ShardWorker
from tests.conftest import ENCODERS, build_pack_at, nothing, write_demo_file


def _config(pack: Path, out: Path, encoder: str = "depth_anything3") -> ExtractConfig:
    return ExtractConfig(pack=pack, out=out, encoder=encoder, encoder_config=ENCODERS[encoder], device="cpu")


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
@pytest.mark.parametrize("threads", [1, 2])
def test_live_tokens_equal_cached_tokens_bit_for_bit(
    caches: dict[str, Path], pack_path: Path, encoder: str, threads: int
) -> None:
    """Another slot of the batch, other neighbours, one by one, another number of threads: the same bits."""
    torch.set_num_threads(threads)
    with CachedTokens(caches[encoder]) as cache, PackReader(pack_path) as pack:
        live = build_live_tokens(cache.recipe, pack.info.contract, "cpu")
        assert live.spec == cache.spec
        for rows in ([0], [24, 3, 17, 3, 8, 9, 1], list(range(24, -1, -1))):
            assert torch.equal(live.tokens(pack.frames(rows)), cache.tokens(rows))
        assert torch.equal(torch.cat([live.tokens(pack.frames([row])) for row in (5, 6)]), cache.tokens([5, 6]))


def test_tokens_depend_on_the_frame(caches: dict[str, Path], pack_path: Path) -> None:
    """So that the equalities above mean something."""
    with CachedTokens(caches["depth_anything3"]) as cache, PackReader(pack_path) as pack:
        frames = pack.frames([4])
        turned = FrameBatch(np.ascontiguousarray(frames.images_BVHWC[:, :, :, ::-1]))
        live = build_live_tokens(cache.recipe, pack.info.contract, "cpu")
        assert (live.tokens(turned) - cache.tokens([4])).abs().max() > 0.01
        assert (cache.tokens([4]) - cache.tokens([5])).abs().max() > 0.01


def test_other_weights_settings_cameras_and_orientation_are_refused_by_name(
    caches: dict[str, Path], pack_path: Path
) -> None:
    with CachedTokens(caches["depth_anything3"]) as cache, PackReader(pack_path) as pack:
        recipe, contract = cache.recipe, pack.info.contract
    with pytest.raises(CacheStale, match="weights: "):
        build_live_tokens(recipe, contract, "cpu", {"seed": 1})
    with pytest.raises(CacheStale, match="image_size"):
        build_live_tokens(recipe, contract, "cpu", {"process_size": [42, 42]})
    with pytest.raises(CacheStale, match=r"tap: 'features\.global' != 'features\.local'"):
        build_live_tokens(recipe, contract, "cpu", {"tap": "features.local"})
    swapped = contract.model_copy(update={"cameras": contract.cameras[::-1]})
    with pytest.raises(ContractMismatch, match="cameras"):
        build_live_tokens(recipe, swapped, "cpu")
    turned = contract.model_copy(update={"image_orientation": "rot180"})
    with pytest.raises(ContractMismatch, match="image_orientation: 'upright' != 'rot180'"):
        build_live_tokens(recipe, turned, "cpu")


def test_unknown_encoder_and_missing_pack_are_named(pack_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'depth_anything3'"):
        make_plan(ExtractConfig(pack=pack_path, out=tmp_path / "c", encoder="depth_anything"))
    with pytest.raises(InputError, match="geomcache pack build"):
        make_plan(_config(tmp_path / "none", tmp_path / "c"))
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_workers_resume_and_survive_a_kill_with_the_same_bytes(
    pack_path: Path, caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, one shard done before, one worker killed: the cache equals an undisturbed run's, byte for byte."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # no business of a run that was given no address
    config = _config(pack_path, tmp_path / "cache").model_copy(update={"workers": 2})
    plan = begin(make_plan(config))
    ShardWorker(config.pack, config.out, plan.manifest, "cpu").run(2)
    victims: list[int] = []
    started = time.time()

    def kill_a_worker_once(*_: int) -> None:
        for process in psutil.process_iter(["cmdline", "create_time"]):
            ours = process.info["create_time"] >= started - 1
            if ours and not victims and "ray::ShardWorker" in " ".join(process.info["cmdline"] or []):
                victims.append(process.pid)
                process.kill()

    result = run(config, kill_a_worker_once)
    assert victims
    assert (result.shards, result.shards_done_before, result.rows_encoded) == (4, 1, 17)
    undisturbed = caches["depth_anything3"]
    for shard in range(4):
        name = f"tokens/c/{shard}/0/0/0"
        assert (config.out / name).read_bytes() == (undisturbed / name).read_bytes()
    with CachedTokens(config.out) as cache:
        assert cache.recipe == CachedTokens(undisturbed).recipe


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_worker_meets_reaches_the_user_by_name(pack_path: Path, tmp_path: Path) -> None:
    """Another pack at the worker's path, and a cluster that is not there."""
    config = _config(pack_path, tmp_path / "cache")
    plan = make_plan(config)
    other = build_pack_at(write_demo_file(tmp_path / "other_demo.hdf5", seed=3), tmp_path / "other")
    worker = ShardWorker(other, config.out, plan.manifest, "cpu")
    with pytest.raises(CacheStale, match="pack: "):
        worker.start()
    for address, said in (("127.0.0.1:9", r"no Ray cluster at 127\.0\.0\.1:9"), ("nohost", "nohost cannot be joined")):
        with pytest.raises(InputError, match=said):
            run(config.model_copy(update={"ray_address": address}), nothing)
