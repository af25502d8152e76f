"""metrics.jsonl and tensorboard's events: the same numbers, once each, also after a stop between checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from geomcache.cache_schemas.errors import MissingDependency
from geomcache.stages.train import metrics
from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.run import run
from tests.conftest import nothing


class Stopped(Exception):
    pass


@pytest.fixture
def config(pack_path: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        out=tmp_path / "run",
        data=(DataPair(pack=pack_path),),
        policy=PolicyConfig.model_validate(
            {
                "dit": {"width": 32, "blocks": 2, "heads": 2, "future_tokens": 2},
                "backbone": {"config": {"image_size": 28}},
                "geom_compression_type": "none",
                "repeated_diffusion_steps": 1,
            }
        ),
        steps=8,
        batch_size=2,
        warmup_steps=1,
        save_every=3,
        log_every=1,
        validation_share=0.34,
        validate_every=2,
        validation_rows=4,
        open_loop_rows=4,
        device="cpu",
    )


def train(config: TrainConfig, stop_at: int | None = None) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)

    def progress(done: int, *_: Any) -> None:
        if done == stop_at:
            raise Stopped

    run(config, progress if stop_at else nothing)


def events(out: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(out / "tensorboard" / metrics.PROJECT))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_shows_each_step_once_after_a_stop_between_checkpoints(config: TrainConfig) -> None:
    """Its own reader as the oracle: steps 3 and 4 were logged, lost with the kill, and logged again."""
    with pytest.raises(Stopped):
        train(config, stop_at=5)
    assert [step for step, _ in events(config.out)["loss"]] == [0, 1, 2, 3, 4]
    train(config)
    shown, lines = events(config.out), metrics.read_metrics(config.out / metrics.METRICS_NAME)
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["validation"]["loss"]) for line in lines if "validation" in line]
    assert [step for step, _ in training] == list(range(8))
    assert [step for step, _ in held_out] == [1, 3, 5, 7]
    for tag, expected in (("loss", training), ("validation/loss", held_out)):
        assert [step for step, _ in shown[tag]] == [step for step, _ in expected]
        assert [value for _, value in shown[tag]] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert {"gradient_norm", "learning_rates/vlm", "learning_rates/head", "loss_per_action_dim/6"} < set(shown)


def test_without_trackers_there_is_metrics_jsonl_alone(config: TrainConfig) -> None:
    train(config.model_copy(update={"trackers": (), "log_every": 3}))
    assert not (config.out / "tensorboard").exists()
    lines = metrics.read_metrics(config.out / metrics.METRICS_NAME)
    assert [line["step"] for line in lines if "loss" in line] == [0, 3, 6, 7]  # and the last
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines if "loss" in line)


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "get_available_trackers", lambda: ["tensorboard"])
    metrics.require_trackers(["tensorboard"])
    with pytest.raises(MissingDependency, match=r"wandb is not installed[\s\S]*trackers=\[\]"):
        metrics.require_trackers(["tensorboard", "wandb"])


@pytest.mark.parametrize("end", ['{"st', "[1]", '{"loss": 3}', "\udc81"])
def test_what_a_kill_left_of_the_last_line_is_dropped_for_good(config: TrainConfig, end: str) -> None:
    with pytest.raises(Stopped):
        train(config.model_copy(update={"trackers": ()}), stop_at=4)
    path = config.out / metrics.METRICS_NAME
    with path.open("a", errors="surrogateescape") as file:
        file.write(end)
    train(config.model_copy(update={"trackers": ()}))
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines() if "validation" not in line]
    assert steps == list(range(8))
