"""Caches that older releases wrote must open for ever.

When a test here fails, the code is wrong, not the fixture: users hold terabytes of such caches. v1 was written by the
release before schema version 2 (no seals, no checksums in the commit records), v2 by the first release with it, from
v1's pack. The tokens of each cache stand beside it as .npy.
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
PACK = CACHES / "v1" / "pack"
OLD = ["v1/oracle_pointmap", "v1/depth_anything3", "v2/bf16", "v2/int8", "v2/lossless", "v2/pooled"]


@pytest.mark.parametrize("name", OLD)
def test_an_old_cache_opens_reads_verifies_and_is_what_the_encoder_still_makes(name: str) -> None:
    expected = np.load(CACHES / f"{name}.npy", allow_pickle=False)
    with CachedTokens(CACHES / name) as cache, PackReader(PACK) as pack:
        np.testing.assert_array_equal(cache.tokens(range(len(cache))).numpy(), expected)
        live = build_live_tokens(cache.recipe, pack.info.contract, "cpu")  # refuses when its fingerprint changed
        assert live.spec == cache.spec
        np.testing.assert_allclose(live.tokens(pack.frames([3])).numpy(), expected[3:4], atol=2e-2)
        covered = pack.info.digest, len(pack)
    assert verify_cache(CACHES / name, repair=False, progress=nothing, pack=covered).complete


@pytest.mark.parametrize("name", ["v1/depth_anything3", "v2/bf16"])
def test_an_old_cache_can_be_continued_derived_from_and_is_still_checked(name: str, tmp_path: Path) -> None:
    shutil.copytree(CACHES / name, tmp_path / "old")
    (tmp_path / "old/commits/000001.json").unlink()
    config = ExtractConfig(
        pack=PACK,
        out=tmp_path / "old",
        encoder_config=ENCODERS["depth_anything3"],
        encoder="depth_anything3",
        codec="bf16",
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
