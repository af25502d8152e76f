"""The trainer: exact resume, learning rates, what a checkpoint holds, what is refused before the first step."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from geomcache.cache_schemas.errors import ConfigError, InputError, SchemaTooNew, TrainingFailed
from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.pipeline.files import locked_folder
from geomcache.stages.train.augment import Augmentation
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.checkpoint import checkpoints_of, latest_checkpoint, load_policy, read_card
from geomcache.stages.train.config import DataPair, LearningRates, TrainConfig
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.metrics import read_metrics
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.optim import learning_rate
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.run import build_policy, main, run
from tests.conftest import build_pack_at, nothing
from tests.thinned_files import thinned

STEPS = 6


@pytest.fixture
def config(pack_path: Path, caches: dict[str, Path], tmp_path: Path) -> TrainConfig:
    """Six steps of a tiny policy on the oracle's tokens, dropout on so that resume must restore it."""
    return TrainConfig(
        out=tmp_path / "run",
        data=(DataPair(pack=pack_path, cache=caches["oracle_pointmap"]),),
        policy=PolicyConfig.model_validate(
            {
                "dit": {"width": 32, "blocks": 2, "heads": 2, "dropout": 0.1},
                "backbone": {"config": {"image_size": 28}},
                "repeated_diffusion_steps": 2,
            }
        ),
        steps=STEPS,
        batch_size=4,
        learning_rate=LearningRates(vlm=1e-3, head=1e-3),
        warmup_steps=1,
        save_every=2,
        log_every=1,
        open_loop_rows=8,
        trackers=(),
        device="cpu",
    )


class Stopped(Exception):
    pass


def _stop_at(step: int) -> Any:
    def progress(done: int, *_: Any) -> None:
        if done == step:
            raise Stopped

    return progress


def _outcome(run_folder: Path) -> tuple[bytes, bytes, list[tuple[int, float, float]]]:
    last = checkpoints_of(run_folder)[-1]
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return (
        (last / "policy.safetensors").read_bytes() + (last / "ema.safetensors").read_bytes(),
        (last / "optimizer.pt").read_bytes(),
        [(line["step"], line["loss"], line["gradient_norm"]) for line in lines],
    )


@pytest.mark.parametrize(
    ("stop", "workers", "changes"),
    [
        (3, 0, {}),
        (4, 0, {}),
        (5, 2, {}),
        (3, 0, {"gradient_accumulation_steps": 2}),
        (3, 0, {"mixed_precision": "bf16"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_stopped_run_ends_bit_for_bit_like_an_undisturbed_one(
    config: TrainConfig, tmp_path: Path, stop: int, workers: int, changes: dict[str, Any]
) -> None:
    """Stopped between checkpoints and at one; weights, optimiser and the log are equal. Also for loader processes."""
    config = config.model_copy(update=changes)
    run(config, nothing)
    other = config.model_copy(update={"out": tmp_path / "other", "data_workers": workers})
    with pytest.raises(Stopped):
        run(other, _stop_at(stop))
    assert [path.name for path in checkpoints_of(other.out)] == [
        f"step_{2 * k:08d}" for k in range(1, (stop - 1) // 2 + 1)
    ]
    result, stood = run(other, nothing)
    assert not stood
    assert _outcome(other.out) == _outcome(config.out)
    assert result.open_loop_error == run(config, nothing)[0].open_loop_error


def test_a_finished_run_is_recognised_and_a_changed_one_refused(config: TrainConfig) -> None:
    run(config, nothing)
    assert run(config, nothing)[1]
    changed = config.model_copy(update={"seed": 4, "batch_size": 8})
    with pytest.raises(InputError) as caught:
        run(changed, nothing)
    assert "seed: 0 != 4" in str(caught.value)
    assert "batch_size: 4 != 8" in str(caught.value)


def test_what_changes_no_number_may_change_between_stop_and_resume(config: TrainConfig) -> None:
    with pytest.raises(Stopped):
        run(config, _stop_at(3))
    moved = config.out.rename(config.out.with_name("moved"))
    again = config.model_copy(update={"out": moved, "data_workers": 0, "log_every": 3, "keep_last": 1, "save_every": 3})
    assert run(again, nothing)[0].steps == STEPS


def test_lora_and_gradient_checkpointing_train_and_come_back(config: TrainConfig, tmp_path: Path) -> None:
    """Adapters move at their own rate, the rest of the language model stays; checkpointing changes no bit."""
    backbone = {**config.policy.backbone.config, "lora": {"rank": 2, "alpha": 4}, "freeze": "vision"}
    policy = {**config.policy.model_dump(), "backbone": {"config": backbone}}
    config = config.model_copy(update={"policy": PolicyConfig.model_validate(policy), "steps": 3, "save_every": 1})
    run(config, nothing)
    first, last = (load_file(path / "policy.safetensors") for path in checkpoints_of(config.out)[-2:])
    moved = {name for name in last if not torch.equal(first[name], last[name])}
    assert {name for name in moved if name.startswith("backbone.")} == {name for name in last if ".lora_" in name}
    assert {name.split(".")[0] for name in moved} == {"backbone", "compressor", "dit"}
    line = read_metrics(config.out / "metrics.jsonl")[-1]
    assert set(line["learning_rates"]) == {"lora", "head"}
    rebuilt = load_policy(checkpoints_of(config.out)[-1], read_card(checkpoints_of(config.out)[-1]), averaged=False)
    assert all(torch.equal(tensor, last[name]) for name, tensor in rebuilt.state_dict().items())
    again = config.model_copy(update={"out": tmp_path / "again", "gradient_checkpointing": True})
    run(again, nothing)
    assert _outcome(again.out) == _outcome(config.out)


def test_bfloat16_weights_are_not_trained(config: TrainConfig) -> None:
    policy = config.policy.model_dump()
    policy["backbone"]["config"]["dtype"] = "bfloat16"
    changed = config.model_copy(update={"policy": PolicyConfig.model_validate(policy)})
    with pytest.raises(ConfigError, match="mixed_precision=bf16"):
        run(changed, nothing)


def test_ranks_train_on_the_two_halves_of_each_batch(config: TrainConfig) -> None:
    """What two ranks see is what one process with twice the batch sees (test_launch.py runs both)."""
    data, policy = TrainingData(config), build_policy(config, TrainingData(config))
    normaliser = Normaliser.fit(data.states(), data.labels(np.arange(len(data))))
    two = config.model_copy(update={"processes": 2, "batch_size": 2})
    halves = [BatchMaker(data, policy.backbone.packer, normaliser, two, rank=rank)[1] for rank in (0, 1)]
    whole = BatchMaker(data, policy.backbone.packer, normaliser, config)[1]
    for name in ("actions_BTA", "proprio_BP", "pixel_values"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))


def test_training_images_are_augmented_by_their_place_in_the_step_and_measured_ones_never(config: TrainConfig) -> None:
    """Two ranks with two parts of a step each against the whole step, augmented at once."""
    augment = Augmentation(shift=2, brightness=0.3)
    config = config.model_copy(
        update={"augment": augment, "seed": 5, "batch_size": 2, "processes": 2, "gradient_accumulation_steps": 2}
    )
    data = TrainingData(config)
    normaliser = Normaliser.fit(data.states(), data.labels(np.arange(len(data))))
    packer = build_policy(config, data).backbone.packer
    makers = [BatchMaker(data, packer, normaliser, config, rank=rank) for rank in (0, 1)]
    rows = makers[0].rows(1)
    images = data.packs[0].images(rows.tolist())
    for part in (0, 1):
        for rank in (0, 1):
            first = 4 * part + 2 * rank
            wanted = augment.apply(images, seed=5, step=1, first=0)[first : first + 2]
            trained, measured = makers[rank][2 + part], makers[rank].batch(rows[first : first + 2])
            assert isinstance(trained, PolicyBatch)
            assert torch.equal(trained.pixel_values, packer(wanted, ["x"] * 2)["pixel_values"])
            assert torch.equal(measured.pixel_values, packer(images[first : first + 2], ["x"] * 2)["pixel_values"])
            assert not torch.equal(trained.pixel_values, measured.pixel_values)


def test_statistics_of_thinned_demonstrations_are_those_of_every_control_step(
    config: TrainConfig, tmp_path: Path
) -> None:
    path = thinned(tmp_path / "task_demo.hdf5", 4)
    policy = config.policy.model_copy(update={"geom_compression_type": "none"})
    data = (DataPair(pack=build_pack_at(path, tmp_path / "pack")),)
    run(config.model_copy(update={"data": data, "policy": policy, "steps": 1}), nothing)
    with h5py.File(path) as file:
        actions = file["data/demo_0/actions"][1:].astype(np.float32)  # row 0 is what was seen after action 0
    found = read_card(latest_checkpoint(config.out)).normaliser.action
    low, high = (np.array(found.offset) + sign * np.array(found.scale) for sign in (-1, 1))
    np.testing.assert_allclose(low[:6], actions.min(axis=0)[:6], rtol=1e-6)
    np.testing.assert_allclose(high[:6], actions.max(axis=0)[:6], rtol=1e-6)
    observed = actions[::4]
    assert not np.allclose(low[:6], observed.min(axis=0)[:6])


def test_statistics_are_those_of_the_rows_that_are_trained_on(config: TrainConfig) -> None:
    config = config.model_copy(update={"validation_share": 0.34, "steps": 1})
    run(config, nothing)
    data = TrainingData(config)
    trained, found = data.training_rows, read_card(latest_checkpoint(config.out)).normaliser
    assert 0 < len(trained) < len(data)
    assert found == Normaliser.fit(data.states()[trained], data.labels(trained))
    assert found != Normaliser.fit(data.states(), data.labels(np.arange(len(data))))


def test_a_result_without_its_checkpoints_answers_for_its_own_settings_only(config: TrainConfig) -> None:
    run(config, nothing)
    shutil.rmtree(config.out / "checkpoints")
    assert run(config, nothing)[1]
    with pytest.raises(InputError, match="seed: 0 != 5"):
        run(config.model_copy(update={"seed": 5}), nothing)


def test_the_launchers_environment_does_not_change_the_accumulation(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"gradient_accumulation_steps": 2, "steps": 2})
    run(config, nothing)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    other = config.model_copy(update={"out": tmp_path / "other"})
    run(other, nothing)
    assert _outcome(other.out) == _outcome(config.out)


def test_a_rank_names_what_is_wrong_with_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"a: [\xff")
    for arguments in ([], [str(tmp_path / "none.yaml")], [str(tmp_path / "bad.yaml")]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "RUN.yaml" in capsys.readouterr().err


def test_two_runs_in_one_folder_are_not_let_in(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geomcache.stages.train.run.LOCK_PATIENCE", 0.3)
    with locked_folder(config.out), pytest.raises(InputError, match="another process is writing"):
        run(config, nothing)
    assert run(config, nothing)[0].steps == STEPS


def test_a_checkpoint_rebuilds_the_policy_without_the_config_or_the_data(config: TrainConfig) -> None:
    run(config, nothing)
    checkpoint = latest_checkpoint(config.out)
    card = read_card(checkpoint)
    policy = load_policy(checkpoint, card)
    stored = load_file(checkpoint / "policy.safetensors")
    assert {name: tensor.shape for name, tensor in policy.state_dict().items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }
    assert card.recipe is not None
    assert card.recipe.spec.encoder == "oracle_pointmap"
    assert card.contract.camera_names == ("agentview", "robot0_eye_in_hand")
    assert len(checkpoints_of(config.out)) == config.keep_last
    np.testing.assert_allclose(stored["token_mean_D"], policy.token_mean_D)


def test_a_foreign_or_future_checkpoint_is_named(config: TrainConfig) -> None:
    run(config, nothing)
    checkpoint = latest_checkpoint(config.out)
    weights = load_file(checkpoint / "policy.safetensors")
    dropped = sorted(weights)[0]
    save_file({name: tensor for name, tensor in weights.items() if name != dropped}, checkpoint / "policy.safetensors")
    with pytest.raises(InputError, match=r"policy\.safetensors is damaged"):
        load_policy(checkpoint, read_card(checkpoint))
    card = json.loads((checkpoint / "card.json").read_text())
    card["digests"]["policy.safetensors"] = digest_file(checkpoint / "policy.safetensors")
    (checkpoint / "card.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=f"missing \\['{dropped}'\\]"):
        load_policy(checkpoint, read_card(checkpoint))
    card = json.loads((checkpoint / "card.json").read_text())
    (checkpoint / "card.json").write_text(json.dumps({**card, "schema_version": 7}))
    with pytest.raises(SchemaTooNew):
        read_card(checkpoint)
    with pytest.raises(InputError, match="geomcache train"):
        latest_checkpoint(config.out / "nowhere")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = BatchMaker.batch

    def poisoned(self: BatchMaker, rows: Any, **options: Any) -> Any:
        batch = original(self, rows, **options)
        batch.proprio_BP[0, 0] = math.nan
        return batch

    monkeypatch.setattr(BatchMaker, "batch", poisoned)
    with pytest.raises(TrainingFailed, match=r"the loss is nan[\s\S]*failed_step_00000000\.json"):
        run(config, nothing)
    rows = json.loads((config.out / "failed_step_00000000.json").read_text())["rows"]
    assert len(rows) == config.batch_size
    assert {"pack", "row", "suite", "task", "episode", "step"} == set(rows[0])


def test_every_group_warms_up_and_ends_at_the_floor() -> None:
    config = TrainConfig(out=Path("x"), data=(), steps=1000, warmup_steps=10, min_learning_rate=5e-7)
    for peak in (1e-5, 1e-4):
        rates = [learning_rate(step, peak, config) for step in range(1000)]
        assert rates[0] == pytest.approx(peak / 10)
        assert rates[10] == pytest.approx(peak)
        assert max(rates) == pytest.approx(peak)
        assert rates[505] == pytest.approx(5e-7 + (peak - 5e-7) / 2, rel=0.01)  # half way down a cosine
        assert rates[-1] == pytest.approx(5e-7)


def test_a_launch_with_another_number_of_processes_is_refused(config: TrainConfig) -> None:
    with pytest.raises(InputError, match="--processes 2"):
        run(config.model_copy(update={"processes": 2}), nothing)


def test_metrics_survive_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [0, 1]
