"""Tokens read ahead are the tokens asked for, in order, whatever the buffers; nothing hangs."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.errors import CacheDamaged
from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.data import TrainingData
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.token_feed import TokenFeed
from tests.conftest import build_pack_at, extract_without_ray, write_demo_file

CPU = torch.device("cpu")


def _data(*pairs: tuple[Path, Path]) -> TrainingData:
    data = tuple(DataPair(pack=pack, cache=str(cache)) for pack, cache in pairs)
    return TrainingData(TrainConfig(out=Path("unused"), data=data, policy=PolicyConfig()))


@pytest.mark.parametrize("encoder", ["oracle_pointmap", "depth_anything3"])
def test_batches_come_in_order_and_stay_what_they_were(pack_path: Path, caches: dict[str, Path], encoder: str) -> None:
    """Kept until the end: a buffer that is used again must not show through."""
    data = _data((pack_path, caches[encoder]))
    batches = [np.random.default_rng(k).integers(0, 25, 6) for k in range(12)]
    with TokenFeed(data, batches, 6, CPU) as feed:
        found = list(feed)
    assert len(found) == 12
    for rows, tokens in zip(batches, found, strict=True):
        assert data.caches[0] is not None
        assert torch.equal(tokens, data.caches[0].tokens(rows.tolist()))


def test_rows_of_two_caches_are_put_back_into_their_order(pack_path: Path, tmp_path: Path) -> None:
    other_pack = build_pack_at(write_demo_file(tmp_path / "other_demo.hdf5", seed=8), tmp_path / "pack")
    first = extract_without_ray(pack_path, "oracle_pointmap", tmp_path / "first")
    second = extract_without_ray(other_pack, "oracle_pointmap", tmp_path / "second")
    data = _data((pack_path, first), (other_pack, second))
    rows = np.array([30, 2, 49, 24, 25, 2])
    with TokenFeed(data, [rows], 6, CPU) as feed:
        tokens = next(feed)
    assert data.caches[0] is not None
    assert data.caches[1] is not None
    for position, row in enumerate(rows.tolist()):
        cache = data.caches[row // 25]
        assert cache is not None
        assert torch.equal(tokens[position], cache.tokens([row % 25])[0])


@pytest.mark.timeout(20)
def test_damage_reaches_the_training_loop_and_an_early_end_leaves_no_thread(pack_path: Path, tmp_path: Path) -> None:
    cache = extract_without_ray(pack_path, "oracle_pointmap", tmp_path / "cache")
    shard = cache / "tokens/c/1/0/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    good, bad = np.array([0, 1]), np.array([8, 9])
    with TokenFeed(_data((pack_path, cache)), [good, bad, good], 2, CPU) as feed:
        next(feed)
        with pytest.raises(CacheDamaged, match="row 0 of the shard"):
            next(feed)
    with TokenFeed(_data((pack_path, cache)), [good] * 50, 2, CPU) as feed:
        next(feed)  # and no more: the thread waits for a free buffer when the block ends
    assert not [thread for thread in threading.enumerate() if thread.name == "token-feed"]
