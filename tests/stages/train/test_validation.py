"""Held-out loss and open-loop error by hand; which weights act."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from geomcache.stages.train.checkpoint import latest_checkpoint, load_policy, read_card
from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.draws import draw
from geomcache.stages.train.policy import PolicyConfig, PolicyNet
from geomcache.stages.train.run import TrainResult, run
from geomcache.stages.train.validation import Validation, measure, spread
from tests.conftest import LENGTHS, nothing

Measure = Callable[..., Validation]


@pytest.fixture(scope="module")
def config(pack_path: Path, caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return TrainConfig(
        out=tmp_path_factory.mktemp("validated") / "run",
        data=(DataPair(pack=pack_path, cache=str(caches["oracle_pointmap"])),),
        policy=PolicyConfig.model_validate(
            {
                "dit": {"width": 32, "blocks": 2, "heads": 2, "future_tokens": 2, "dropout": 0.5},
                "backbone": {"config": {"image_size": 28}},
                "repeated_diffusion_steps": 3,
                "geom_dit_tokens": 4,
            }
        ),
        steps=4,
        batch_size=4,
        warmup_steps=0,
        ema_decay=0.3,
        validation_share=0.34,
        open_loop_rows=6,
        validation_rows=5,
        trackers=(),
        device="cpu",
    )


@pytest.fixture(scope="module")
def result(config: TrainConfig) -> TrainResult:
    AcceleratorState._reset_state(reset_partial_state=True)
    return run(config, nothing)[0]


@pytest.fixture
def policy(result: TrainResult) -> PolicyNet:
    checkpoint = latest_checkpoint(Path(result.run))
    return load_policy(checkpoint, read_card(checkpoint))


@pytest.fixture
def maker(config: TrainConfig, result: TrainResult, policy: PolicyNet) -> BatchMaker:
    card = read_card(latest_checkpoint(Path(result.run)))
    return BatchMaker(TrainingData(config), policy.backbone.packer, card.normaliser, config)


@pytest.fixture
def measured(config: TrainConfig, policy: PolicyNet, maker: BatchMaker) -> Measure:
    def on(rows: list[int], batch_size: int = 4) -> Validation:
        AcceleratorState._reset_state(reset_partial_state=True)
        changed = config.model_copy(update={"batch_size": batch_size})
        return measure(policy, maker, np.array(rows), changed, Accelerator(cpu=True))

    return on


END = LENGTHS[0] - 2  # the first episode's last row: 1 real action, the others padded


def test_by_hand_over_real_actions(policy: PolicyNet, maker: BatchMaker, measured: Measure) -> None:
    """One row at a time, padded positions left out by slicing; rows count by their real actions."""
    rows = [0, END - 1, END]
    real = {0: END + 1, END - 1: 2, END: 1}
    policy.eval()
    losses, errors, means, weights = [], [], [], []
    mean_A = torch.tensor(maker.mean_action())
    for row in rows:
        count = min(real[row], maker.data.horizon)
        batch = maker.batch(np.array([row]))
        assert batch.actions_BTA is not None
        draws = draw([("validation", row)], 3, policy.chunk_shape)
        with torch.no_grad():
            loss = policy.loss(batch, noise_BRTA=draws.noise_BRTA, time_BR=draws.time_BR).loss
            sampled = policy.sample(batch, noise_BTA=draws.noise_BRTA[:, 0])[0, :count]
        wanted = batch.actions_BTA[0, :count]
        losses.append(float(loss))
        errors.append(float((sampled - wanted).abs().mean()))
        means.append(float((mean_A - wanted).abs().mean()))
        weights.append(count)
    found = measured(rows)
    assert found.rows == 3
    for name, values in (("loss", losses), ("open_loop_error", errors), ("mean_action_error", means)):
        assert getattr(found, name) == pytest.approx(np.average(values, weights=weights), rel=1e-4), name
    assert found.loss == pytest.approx(np.mean(found.loss_per_action_dim))


def test_it_depends_on_the_weights_and_the_rows_alone(policy: PolicyNet, measured: Measure) -> None:
    """Dropout is off inside; the mode and the global generator are as before; batches may be cut anywhere."""
    policy.train()
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = measured([1, 2, 3, 4, 5])
    assert policy.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert measured([1, 2, 3, 4, 5]) == first
    assert measured([1, 2, 3, 4, 5], batch_size=2).loss == pytest.approx(first.loss, rel=1e-5)
    assert measured([5, 3, 1, 2, 4], batch_size=1).open_loop_error == pytest.approx(first.open_loop_error, rel=1e-5)


def test_the_averaged_weights_act_and_are_measured(
    config: TrainConfig, result: TrainResult, maker: BatchMaker, measured: Measure
) -> None:
    checkpoint = latest_checkpoint(config.out)
    raw, averages = load_file(checkpoint / "policy.safetensors"), load_file(checkpoint / "ema.safetensors")
    acting = load_policy(checkpoint, read_card(checkpoint)).state_dict()
    trained = load_policy(checkpoint, read_card(checkpoint), averaged=False).state_dict()
    assert averages.keys() < raw.keys()  # statistics of tokens are not averaged
    assert all(torch.equal(trained[name], tensor) for name, tensor in raw.items())
    assert all(torch.equal(acting[name], averages.get(name, tensor)) for name, tensor in raw.items())
    assert any(not torch.equal(raw[name], tensor) for name, tensor in averages.items())
    rows = spread(maker.data.training_rows, config.open_loop_rows).tolist()
    assert result.open_loop_error == pytest.approx(measured(rows).open_loop_error, rel=1e-5)
    assert result.validation is not None
    held_out = spread(maker.data.validation_rows, config.validation_rows).tolist()
    assert result.validation.loss == pytest.approx(measured(held_out).loss, rel=1e-5)


def test_spread_takes_first_and_last_and_no_row_twice() -> None:
    rows = np.arange(100, 150)
    assert spread(rows, 3).tolist() == [100, 124, 149]
    assert spread(rows, 500).tolist() == rows.tolist()
    assert spread(rows, 1).tolist() == [100]
