"""Order of rows, action chunks at episode ends, and the join of pack and cache."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from geomcache.cache_schemas.errors import CacheIncomplete, CacheStale, ConfigError, ContractMismatch
from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.row_order import RowOrder, Rows, rows_of_step, shard_starts
from tests.conftest import LENGTHS, build_pack_at, extract_without_ray, write_demo_file
from tests.thinned_files import thinned

ROWS = sum(LENGTHS) - len(LENGTHS)


def _config(*pairs: tuple[Path, Path | None], compressor: str = "pool") -> TrainConfig:
    return TrainConfig(
        out=Path("unused"),
        data=tuple(DataPair(pack=pack, cache=cache) for pack, cache in pairs),
        policy=PolicyConfig(geom_compression_type=compressor),
    )


def _rows(
    seed: int, step: int, batch: int, starts: tuple[int, ...], order: RowOrder = "global", out: tuple[int, ...] = ()
) -> np.ndarray:
    mask = np.isin(np.arange(starts[-1]), out)
    return rows_of_step(seed, step, batch, Rows(starts, mask), order)


def test_the_order_is_a_permutation_each_epoch_and_does_not_depend_on_how_it_is_cut() -> None:
    whole = np.concatenate([_rows(3, step, 5, (0, 20)) for step in range(8)])
    assert sorted(whole[:20]) == sorted(whole[20:]) == list(range(20))
    assert list(whole[:20]) != list(whole[20:])
    np.testing.assert_array_equal(np.concatenate([_rows(3, step, 10, (0, 20)) for step in range(4)]), whole)
    assert list(_rows(4, 0, 20, (0, 20))) != list(whole[:20])


def test_a_batch_may_cross_epochs() -> None:
    rows = _rows(0, 1, 7, (0, 10))  # positions 7..13
    np.testing.assert_array_equal(rows[:3], _rows(0, 0, 10, (0, 10))[7:])
    np.testing.assert_array_equal(rows[3:], _rows(0, 1, 10, (0, 10))[:4])


def test_chunks_stop_at_the_episodes_end(pack_path: Path) -> None:
    data = TrainingData(_config((pack_path, None), compressor="none"))
    first_end = LENGTHS[0] - 1
    chunk, mask = data.action_chunk(first_end - 3)
    assert mask.tolist() == [True] * 3 + [False] * (data.horizon - 3)
    actions = data.labels(np.arange(len(data)))
    np.testing.assert_array_equal(chunk[:3], actions[first_end - 3 : first_end])
    np.testing.assert_array_equal(chunk[3:], np.repeat(actions[first_end - 1 : first_end], data.horizon - 3, 0))


def test_thinned_and_plain_packs_train_together_and_weigh_by_what_counts(pack_path: Path, tmp_path: Path) -> None:
    """Every 4th step observed, pushes at control steps 5 and 20; chunks, weights and statistics see every step."""
    path = thinned(tmp_path / "task_demo.hdf5", 4, [6, 21], lengths=(31,))
    data = TrainingData(_config((pack_path, None), (build_pack_at(path, tmp_path / "pack"), None), compressor="none"))
    with h5py.File(path) as file:
        labels = file["data/demo_0/actions"][1:].astype(np.float32)
    assert (len(data), data.horizon) == (ROWS + 8, 8)
    chunk, mask = data.action_chunk(ROWS + 4)  # control step 16
    np.testing.assert_array_equal(chunk, labels[16:24])
    assert mask.tolist() == [True] * 5 + [False] * 3
    every = np.arange(len(data))
    masks = np.stack([data.action_chunk(int(row))[1] for row in every])
    for rows in (every, every[[3, ROWS + 1, ROWS + 1]], every[-1:]):
        assert data.count_actions(rows) == masks[rows].sum()
    taken = np.array([0, ROWS + 1, ROWS + 7])
    np.testing.assert_array_equal(data.labels(taken), [data.labels(every)[0], *labels[4:8], *labels[28:]])
    assert len(data.labels(every)) == ROWS + 30
    assert [key["step"] for key in data.keys(taken)] == [0, 4, 28]
    maker = BatchMaker(data, None, Normaliser.fit(data.states(), data.labels(every)), _config())  # type: ignore[arg-type]
    wanted = np.concatenate([data.labels(every[:ROWS]), labels])
    np.testing.assert_allclose(maker.mean_action()[:6], _min_max(wanted)[:, :6].mean(axis=0), atol=1e-6)


def _min_max(actions: np.ndarray) -> np.ndarray:
    low, high = actions.min(axis=0), actions.max(axis=0)
    return np.asarray((actions - low) / (high - low) * 2.0 - 1.0)


def test_several_pairs_are_one_run_of_rows(pack_path: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    other = build_pack_at(write_demo_file(tmp_path / "other_demo.hdf5", seed=8, lengths=(5,)), tmp_path / "pack")
    other_cache = extract_without_ray(other, "oracle_pointmap", tmp_path / "cache")
    data = TrainingData(_config((pack_path, caches["oracle_pointmap"]), (other, other_cache)))
    assert len(data) == ROWS + 4
    assert data.locate(ROWS - 1) == (0, ROWS - 1)
    assert data.locate(ROWS) == (1, 0)
    tokens = data.tokens(np.array([ROWS + 2, 0]))
    assert tokens is not None
    np.testing.assert_array_equal(tokens[0], data.caches[1].tokens([2])[0])  # type: ignore[union-attr]


def test_shard_order_keeps_to_windows_of_shards_and_visits_every_row_once() -> None:
    starts = shard_starts([(45, 2), (7, 4)])  # 23 and 2 shards
    assert starts == (*range(0, 45, 2), 45, 49, 52)
    one_epoch = _rows(1, 0, 52, starts, "shard")
    assert sorted(one_epoch) == list(range(52))
    for first in range(0, 40, 13):  # 8 shards hold at most 18 rows, so 13 rows touch at most two windows
        shards = np.searchsorted(starts, one_epoch[first : first + 13], side="right")
        assert len(set(shards)) <= 2 * 8
    assert list(one_epoch) != list(_rows(2, 0, 52, starts, "shard"))
    np.testing.assert_array_equal(np.concatenate([_rows(1, step, 13, starts, "shard") for step in range(4)]), one_epoch)


def test_token_statistics_are_those_of_all_tokens(pack_path: Path, caches: dict[str, Path]) -> None:
    data = TrainingData(_config((pack_path, caches["oracle_pointmap"])))
    statistics = data.token_statistics()
    assert statistics is not None
    every = data.caches[0].tokens(range(ROWS)).numpy().reshape(-1, 3).astype(np.float64)  # type: ignore[union-attr]
    np.testing.assert_allclose(statistics.mean, every.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.std, every.std(axis=0), rtol=1e-5)


def test_a_cache_of_another_pack_a_missing_one_and_an_unfinished_one_are_named(
    pack_path: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    other = build_pack_at(write_demo_file(tmp_path / "other_demo.hdf5", seed=8), tmp_path / "pack")
    with pytest.raises(CacheStale, match="made from another pack"):
        TrainingData(_config((other, caches["oracle_pointmap"])))
    with pytest.raises(ConfigError, match="reads a token cache"):
        TrainingData(_config((pack_path, None)))
    unfinished = extract_without_ray(pack_path, "oracle_pointmap", tmp_path / "cache")
    (unfinished / "commits/000001.json").unlink()
    with pytest.raises(CacheIncomplete):
        TrainingData(_config((pack_path, unfinished)))
    with pytest.raises(CacheStale, match="hold different tokens"):
        TrainingData(_config((pack_path, caches["oracle_pointmap"]), (pack_path, caches["depth_anything3"])))
    with pytest.raises(ConfigError, match="given more than once"):
        TrainingData(_config((pack_path, caches["oracle_pointmap"]), (pack_path, caches["oracle_pointmap"])))
    other_seed = extract_without_ray(pack_path, "depth_anything3", tmp_path / "seed", seed=9)
    with pytest.raises(CacheStale, match="weights"):
        TrainingData(_config((pack_path, caches["depth_anything3"]), (pack_path, other_seed)))
    flat = build_pack_at(write_demo_file(tmp_path / "flat_demo.hdf5", depth=False), tmp_path / "flat")
    with pytest.raises(ContractMismatch, match="has_depth"):
        TrainingData(_config((pack_path, None), (flat, None), compressor="none"))
