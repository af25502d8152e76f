"""Smaller caches: pooled and re-encoded ones train like the full one, and the live path repeats what they did."""

from pathlib import Path

import pytest
import tensorstore
import torch
import zarr

from geomcache.cache_schemas.errors import CacheStale, ConfigError, InputError
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.pooling import pool_tokens
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.verify import verify_cache
from geomcache.stages.evaluate.live_policy import build_live_tokens
from geomcache.stages.extract.derive import DeriveConfig, derive
from geomcache.stages.train.building import require_fitting_tokens
from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.data import TrainingData
from geomcache.stages.train.policy import PolicyConfig
from tests.conftest import build_pack_at, extract_without_ray, nothing, write_demo_file

FORMS = [("int8", None), ("lossless", None), ("fp32", 3), ("int8", 3), (None, 4)]  # (codec, pool)


@pytest.mark.parametrize(("codec", "pool"), FORMS)
def test_live_tokens_repeat_codec_and_pooling_bit_for_bit(
    pack_path: Path, tmp_path: Path, codec: str | None, pool: int | None
) -> None:
    out = extract_without_ray(pack_path, "depth_anything3", tmp_path / "cache", codec=codec, pool=pool)
    _require_live_equals_cache(out, pack_path)


@pytest.mark.parametrize(("codec", "pool"), FORMS)
def test_a_derived_cache_is_repeated_live_bit_for_bit(
    pack_path: Path, caches: dict[str, Path], tmp_path: Path, codec: str | None, pool: int | None
) -> None:
    config = DeriveConfig(cache=str(caches["depth_anything3"]), out=tmp_path / "c", codec=codec, pool=pool)
    result = derive(config, nothing)
    assert result.shards_done_before == 0
    _require_live_equals_cache(config.out, pack_path)
    assert derive(config, nothing).shards_done_before == 4


def _require_live_equals_cache(path: Path, pack_path: Path) -> None:
    with CachedTokens(path) as cache, PackReader(pack_path) as pack:
        live = build_live_tokens(cache.recipe, pack.info.contract, "cpu")
        assert live.spec == cache.spec
        for rows in ([0], [24, 3, 17, 3, 8]):
            assert torch.equal(live.tokens(pack.frames(rows)), cache.tokens(rows))


def test_what_a_pooled_cache_keeps_are_the_means_of_the_full_ones_tokens(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    derive(DeriveConfig(cache=str(caches["oracle_pointmap"]), out=tmp_path / "c", pool=5), nothing)
    with CachedTokens(caches["oracle_pointmap"]) as full, CachedTokens(tmp_path / "c") as pooled:
        assert pooled.spec.row_shape == (1, 5, 3)
        rows = range(len(full))
        assert torch.equal(pooled.tokens(rows), pool_tokens(full.tokens(rows), 5))
        tokens = full.tokens([7]).flatten(1, 2)[0]  # 32 tokens: groups begin at 0, 6, 12, 19, 25
        torch.testing.assert_close(pooled.tokens([7])[0, 0, 2], tokens[12:19].mean(dim=0))
        assert pooled.manifest.derived_from == full.recipe.fingerprint.cache_id


def test_training_standardises_pooled_tokens_as_the_full_ones(
    pack_path: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    full = caches["depth_anything3"]
    derive(DeriveConfig(cache=str(full), out=tmp_path / "c", pool=4), nothing)
    data = [_data(pack_path, path) for path in (full, tmp_path / "c")]
    assert data[0].token_statistics() == data[1].token_statistics()


def _data(pack: Path, *caches: Path) -> TrainingData:
    pairs = tuple(DataPair(pack=pack, cache=str(cache)) for cache in caches)
    return TrainingData(TrainConfig(out=Path("unused"), data=pairs, policy=PolicyConfig()))


def test_compressors_that_look_at_single_tokens_refuse_a_pooled_cache_by_name(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    derive(DeriveConfig(cache=str(caches["depth_anything3"]), out=tmp_path / "c", pool=4), nothing)
    spec = CachedTokens(tmp_path / "c").spec
    for name in ("qformer", "gated"):
        with pytest.raises(ConfigError, match=f"compressor '{name}' reads every token"):
            require_fitting_tokens(name, False, spec, 4)
    require_fitting_tokens("pool", True, spec, 4)
    with pytest.raises(ConfigError, match="geom_dit_tokens=4"):
        require_fitting_tokens("pool", True, spec, 2)
    require_fitting_tokens("qformer", False, CachedTokens(caches["depth_anything3"]).spec, 2)


def test_deriving_from_what_is_not_full_and_impossible_pools_are_refused(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    derive(DeriveConfig(cache=str(caches["depth_anything3"]), out=tmp_path / "c", pool=4), nothing)
    with pytest.raises(InputError, match="derive from the full cache"):
        derive(DeriveConfig(cache=str(tmp_path / "c"), out=tmp_path / "d", pool=2), nothing)
    with pytest.raises(InputError, match="--pool at most 8"):
        derive(DeriveConfig(cache=str(caches["depth_anything3"]), out=tmp_path / "d", pool=9), nothing)
    with pytest.raises(CacheStale, match="pooled_to: 4 != 2"):
        derive(DeriveConfig(cache=str(caches["depth_anything3"]), out=tmp_path / "c", pool=2), nothing)
    assert not (tmp_path / "d").exists()


def test_two_packs_share_channel_statistics_or_are_refused(pack_path: Path, tmp_path: Path) -> None:
    other_pack = build_pack_at(write_demo_file(tmp_path / "other_demo.hdf5", seed=8), tmp_path / "pack")
    first = extract_without_ray(pack_path, "depth_anything3", tmp_path / "first", codec="int8")
    alone = extract_without_ray(other_pack, "depth_anything3", tmp_path / "alone", codec="int8")
    shared = extract_without_ray(
        other_pack, "depth_anything3", tmp_path / "shared", codec="int8", statistics_from=str(first)
    )
    pairs = [DataPair(pack=pack_path, cache=str(first)), DataPair(pack=other_pack, cache=str(alone))]
    with pytest.raises(CacheStale, match=rf"--statistics-from {first}"):
        TrainingData(TrainConfig(out=Path("unused"), data=tuple(pairs)))
    pairs[1] = DataPair(pack=other_pack, cache=str(shared))
    assert len(TrainingData(TrainConfig(out=Path("unused"), data=tuple(pairs)))) == 50


@pytest.mark.parametrize(("codec", "pool"), FORMS)
def test_other_zarr_readers_agree_on_every_form(
    pack_path: Path, tmp_path: Path, codec: str | None, pool: int | None
) -> None:
    out = extract_without_ray(pack_path, "depth_anything3", tmp_path / "cache", codec=codec, pool=pool)
    with CachedTokens(out) as cache:
        for name, ours in cache.arrays(range(len(cache))).items():
            assert (zarr.open_group(str(out), mode="r")[name][:] == ours).all()
            store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(out / name)}}
            assert (tensorstore.open(store, open=True).result().read().result() == ours).all()


def test_statistics_of_another_encoder_and_useless_ones_are_refused(
    pack_path: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    other = extract_without_ray(pack_path, "depth_anything3", tmp_path / "other", codec="int8", seed=9)
    with pytest.raises(InputError, match="weights of the encoder differ"):
        extract_without_ray(pack_path, "depth_anything3", tmp_path / "c", codec="int8", statistics_from=str(other))
    full = str(caches["depth_anything3"])
    with pytest.raises(InputError, match="a cache without channel statistics"):
        extract_without_ray(pack_path, "depth_anything3", tmp_path / "c", codec="int8", statistics_from=full)
    with pytest.raises(InputError, match="no meaning here"):
        derive(DeriveConfig(cache=full, out=tmp_path / "c", codec="lossless", statistics_from=str(other)), nothing)
    with pytest.raises(InputError, match="holds a cache of something else"):
        extract_without_ray(pack_path, "depth_anything3", Path(full), codec="int8")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("way", ["extract", "derive"])
def test_a_run_that_goes_on_keeps_the_statistics_it_began_with(
    pack_path: Path, caches: dict[str, Path], tmp_path: Path, way: str
) -> None:
    """They came from another cache first; the second command does not name it, and must not mix two scales."""
    first = extract_without_ray(pack_path, "depth_anything3", tmp_path / "first", codec="int8")
    config = DeriveConfig(cache=str(caches["depth_anything3"]), out=tmp_path / "c", codec="int8")
    again = config.model_copy(update={"statistics_from": str(first)})
    if way == "derive":
        derive(again, nothing)
    else:
        extract_without_ray(pack_path, "depth_anything3", config.out, codec="int8", statistics_from=str(first))
    began_with = CachedTokens(config.out).spec.channel_statistics
    assert began_with == CachedTokens(first).spec.channel_statistics
    (config.out / "commits/000002.json").unlink()
    if way == "derive":
        assert derive(config, nothing).shards_done_before == 3
    else:
        extract_without_ray(pack_path, "depth_anything3", config.out, codec="int8")
    assert CachedTokens(config.out).spec.channel_statistics == began_with
    assert verify_cache(config.out, repair=False, progress=nothing).complete
