"""Which episodes are held out: how many, spread over tasks, the same for every seed, and never trained on."""

from pathlib import Path

import numpy as np
import pytest

from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.data import TrainingData
from geomcache.stages.train.held_out import held_out_episodes
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.row_order import rows_of_step
from tests.conftest import LENGTHS, TASK, build_pack_at, write_demo_file

TASKS = [f"task{number % 4}" for number in range(40)]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.02, 0), (0.025, 1), (0.1, 4), (0.5, 20), (0.99, 39)])
def test_the_share_is_rounded_down(share: float, count: int) -> None:
    found = held_out_episodes(TASKS, share)
    assert len(found) == len(set(found.tolist())) == count
    assert found.tolist() == sorted(found.tolist())
    assert found.tolist() == held_out_episodes(TASKS, share).tolist()


def test_tasks_have_equal_parts() -> None:
    for share, each in ((0.1, 1), (0.3, 3), (0.5, 5)):
        held = [TASKS[number] for number in held_out_episodes(TASKS, share)]
        assert {task: held.count(task) for task in held} == dict.fromkeys(set(TASKS), each)
    few = ["rare", *["common"] * 99]  # a task of one episode is not held out whole but by chance
    assert len(held_out_episodes(few, 0.1)) == 10


def test_a_larger_share_holds_out_more_and_nothing_else() -> None:
    small, large = (set(held_out_episodes(TASKS, share).tolist()) for share in (0.1, 0.4))
    assert small < large


def test_whole_episodes_are_kept_from_training_for_every_seed(pack_path: Path, tmp_path: Path) -> None:
    other = build_pack_at(write_demo_file(tmp_path / f"{TASK}_demo.hdf5", seed=3), tmp_path / "pack")

    def data(seed: int, share: float) -> TrainingData:
        config = TrainConfig(
            out=Path("unused"),
            data=(DataPair(pack=pack_path), DataPair(pack=other)),
            policy=PolicyConfig(geom_compression_type="none"),
            validation_share=share,
            seed=seed,
        )
        return TrainingData(config)

    ends = np.cumsum([length - 1 for length in LENGTHS])
    found = data(0, 0.34)
    held = set(found.validation_rows.tolist())
    episodes = [set(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
    episodes += [{row + int(ends[-1]) for row in rows} for rows in episodes]
    assert sum(rows <= held for rows in episodes) == 2  # of 6
    assert sum(bool(rows & held) for rows in episodes) == 2
    assert held == set(data(7, 0.34).validation_rows.tolist())
    assert set(found.training_rows.tolist()) == set(range(len(found))) - held
    for order in ("global", "shard"):
        trained = np.concatenate([rows_of_step(3, step, 5, found.rows, order) for step in range(40)])
        assert set(trained.tolist()) == set(found.training_rows.tolist())
    assert len(data(0, 0.1).validation_rows) == 0
