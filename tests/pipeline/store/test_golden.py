"""Caches that older releases wrote must open for ever.

When a test here fails, the code is wrong, not the fixture: users hold terabytes of such caches. v1 was written by the
release before schema version 2 (no seals, no checksums in the commit records); its tokens stand beside it as .npy.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache_schemas.errors import CacheDamaged
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.verify import verify_cache
from geomcache.stages.evaluate.live_policy import build_live_tokens
from geomcache.stages.extract.derive import DeriveConfig, derive
from geomcache.stages.extract.plan import ExtractConfig, begin, make_plan
from geomcache.stages.extract.worker import ShardWorker
from tests.conftest import ENCODERS, nothing

CACHES = Path(__file__).parents[2] / "golden" / "caches"


@pytest.mark.parametrize("version", ["v1"])
@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_an_old_cache_opens_reads_verifies_and_is_what_the_encoder_still_makes(version: str, encoder: str) -> None:
    folder = CACHES / version
    expected = np.load(folder / f"{encoder}.npy", allow_pickle=False)
    with CachedTokens(folder / encoder) as cache, PackReader(folder / "pack") as pack:
        np.testing.assert_array_equal(cache.tokens(range(len(cache))).numpy(), expected)
        live = build_live_tokens(cache.recipe, pack.info.contract, "cpu")  # refuses when its fingerprint changed
        assert live.spec == cache.spec
        np.testing.assert_allclose(live.tokens(pack.frames([3])).numpy(), expected[3:4], atol=1e-2)
        covered = pack.info.digest, len(pack)
    assert verify_cache(folder / encoder, repair=False, progress=nothing, pack=covered).complete


@pytest.mark.parametrize("version", ["v1"])
def test_an_old_cache_can_be_continued_derived_from_and_is_still_checked(version: str, tmp_path: Path) -> None:
    folder = tmp_path / version
    shutil.copytree(CACHES / version, folder)
    (folder / "depth_anything3/commits/000001.json").unlink()
    config = ExtractConfig(
        pack=folder / "pack",
        out=folder / "depth_anything3",
        encoder_config=ENCODERS["depth_anything3"],
        encoder="depth_anything3",
        device="cpu",
    )
    plan = begin(make_plan(config))
    assert plan.remaining == (1,)
    ShardWorker(config.pack, config.out, plan.manifest, "cpu").run(1)
    assert verify_cache(config.out, repair=False, progress=nothing).complete
    assert derive(DeriveConfig(cache=str(config.out), out=tmp_path / "pooled", pool=2), nothing).rows == 7
    shard = config.out / "tokens/c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheDamaged, match="checksum"):
        CachedTokens(config.out).tokens([0])
