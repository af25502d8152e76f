"""Exporting a policy: the weights that act, loaded by the code of any checkpoint, without a trace of this machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.stages.train.checkpoint import (
    latest_checkpoint,
    load_policy,
    read_card,
    weights_digest,
)
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.export_record import Measured, read_record
from geomcache.stages.train.run import read_config
from geomcache.stages.train.run import run as train
from geomcache.stages.train.shipping import export_policy
from tests.conftest import TASK, nothing

BACKBONE = {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
FILES = {"README.md", "card.json", "export.json", "policy.safetensors", *(f"backbone/{name}" for name in BACKBONE)}


def train_briefly(out: Path, pack: Path, cache: Path, **settings: Any) -> Path:
    """A run of a few steps, long enough that its averages differ from its last weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = {
        "out": out,
        "data": [{"pack": pack, "cache": cache}],
        "policy": {
            "geom_dit_tokens": 4,
            "dit": {"width": 32, "blocks": 2, "heads": 2, "horizon": 4},
            "backbone": {"config": {"image_size": 28, "stem": {}}},
        },
        "steps": 8,
        "batch_size": 4,
        "learning_rate": {"vlm": 1e-3, "head": 1e-3},
        "warmup_steps": 1,
        "open_loop_rows": 2,
        "validation_share": 0.0,
        "device": "cpu",
        "seed": 3,
        "trackers": (),
        **settings,
    }
    train(TrainConfig.model_validate(config), nothing)
    return out


@pytest.fixture(scope="module")
def run(pack_path: Path, caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the oracle's tokens."""
    return train_briefly(tmp_path_factory.mktemp("shipping") / "run", pack_path, caches["oracle_pointmap"])


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _figures(weights: str, **changes: Any) -> Measured:
    values: dict[str, Any] = {
        "weights": weights,
        "suite": "libero_object",
        "tasks": (0,),
        "init_states": (0, 19),
        "seeds": (7,),
        "execute_steps": 8,
        "changes": (),
        "episodes": 20,
        "successes": 17,
        "low": 0.64,
        "high": 0.95,
    }
    return Measured(**{**values, **changes})


def test_an_export_is_a_checkpoint_with_the_weights_that_act(run: Path, tmp_path: Path) -> None:
    """One set of weights: the averages, rounded; statistics of the tokens keep their digits."""
    checkpoint, out = latest_checkpoint(run), tmp_path / "soup"
    record = export_policy(run, out)
    assert _files(out) == FILES
    stored, averages = load_file(out / "policy.safetensors"), load_file(checkpoint / "ema.safetensors")
    last = load_file(checkpoint / "policy.safetensors")
    assert any(not torch.equal(averages[name], last[name]) for name in averages)
    assert stored.keys() == last.keys()
    for name, tensor in stored.items():
        buffer = name in ("token_mean_D", "token_std_D")
        expected = last[name] if buffer else averages.get(name, last[name]).to(torch.bfloat16)
        assert torch.equal(tensor, expected), name
        assert tensor.dtype == (torch.float32 if buffer else torch.bfloat16)
    card, before = read_card(latest_checkpoint(out)), read_card(checkpoint)
    assert {name: digest_file(out / name) for name in card.digests} == card.digests
    assert weights_digest(card) not in (weights_digest(before), "")
    kept = {"digests": {}, "geomcache_version": ""}
    assert card.model_copy(update=kept) == before.model_copy(update=kept)
    policy = load_policy(out, card)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert torch.equal(policy.state_dict()["dit.out.weight"], stored["dit.out.weight"].float())
    assert (record.name, record.parameters, record.averaged) == (
        "soup",
        sum(p.numel() for p in policy.parameters()),
        True,
    )
    assert record.tasks == {"libero_object": (TASK,)}
    (pack,) = record.trained_on
    assert (pack.scripted, pack.episodes, pack.rows) == (False, 3, 25)
    assert read_record(out) == record


def test_a_checkpoint_on_the_way_is_called_unfinished(
    run: Path, pack_path: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    longer = train_briefly(tmp_path / "run", pack_path, caches["oracle_pointmap"], save_every=4)
    record = export_policy(longer / "checkpoints" / "step_00000004", tmp_path / "half_way")
    assert record.unfinished == "step 4 of 8"
    assert "seed 3; unfinished: step 4 of 8 |" in (tmp_path / "half_way" / "README.md").read_text()
    assert export_policy(run, tmp_path / "soup").unfinished is None
    assert "unfinished" not in (tmp_path / "soup" / "README.md").read_text()


def test_rounded_weights_act_almost_as_the_original(run: Path, tmp_path: Path) -> None:
    """On the pack's own rows, with the same noise; the space of normalised actions is about -1..1."""
    export_policy(run, tmp_path / "half")
    export_policy(run, tmp_path / "whole", dtype="fp32")
    config = read_config(run)
    data = TrainingData(config)
    card = read_card(latest_checkpoint(run))
    found = []
    for folder in (latest_checkpoint(run), tmp_path / "whole", tmp_path / "half"):
        policy = load_policy(folder, read_card(folder)).eval()
        batch = BatchMaker(data, policy.backbone.packer, card.normaliser, config).batch(np.arange(25))
        found.append(policy.sample(batch, torch.Generator().manual_seed(0)))
    original, whole, half = found
    assert torch.equal(original, whole)
    assert 0 < float((original - half).abs().max()) < 0.03
    assert float((original - half).abs().mean()) < 0.005


def test_nothing_names_this_machine(run: Path, tmp_path: Path) -> None:
    """Also where the VLM and the encoder's weights came from folders; hub ids stay."""
    other = shutil.copytree(run, tmp_path / "moved")
    path = latest_checkpoint(other) / "card.json"
    card = json.loads(path.read_text())
    card["policy"]["backbone"]["config"]["base_vlm"] = "/models/of/mine/Qwen2.5-VL-3B"
    card["recipe"]["encoder"]["config"]["weights"] = "~/weights/of/mine/DA3-BASE"
    path.write_text(json.dumps(card))
    export_policy(other, tmp_path / "a" / "policy")
    exported = read_card(tmp_path / "a" / "policy")
    assert exported.policy.backbone.config["base_vlm"] == "Qwen2.5-VL-3B"
    assert exported.recipe is not None
    assert exported.recipe.encoder.config["weights"] == "DA3-BASE"
    for path in (tmp_path / "a" / "policy").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [
                text for text in (b"of/mine", str(tmp_path).encode(), str(run.parents[1]).encode()) if text in data
            ]
    card["recipe"]["encoder"]["config"]["weights"] = "depth-anything/DA3-BASE"
    (latest_checkpoint(other) / "card.json").write_text(json.dumps(card))
    export_policy(other, tmp_path / "b")
    recipe = read_card(tmp_path / "b").recipe
    assert recipe is not None
    assert recipe.encoder.config["weights"] == "depth-anything/DA3-BASE"


def test_its_card_says_what_these_weights_score(run: Path, tmp_path: Path) -> None:
    """Figures of the run, then of the export itself, which is made again for them and has the same weights."""
    out = tmp_path / "soup"
    export_policy(run, out, measured=[_figures(weights_digest(read_card(latest_checkpoint(run))))])
    digest, readme = weights_digest(read_card(out)), (out / "README.md").read_text()
    assert "| 17/20 | [0.64, 0.95] | as trained, before they were rounded |" in readme
    assert "objects hardly move" in readme
    assert "8 optimiser steps of 4 samples, seed 3" in readme
    assert "pick up the alphabet soup and place it in the basket" in readme
    export_policy(run, out, measured=[_figures(digest, suite="libero_object_spread", changes=("camera orbit ±10°",))])
    assert weights_digest(read_card(out)) == digest
    readme = (out / "README.md").read_text()
    assert "| libero_object_spread | 0 | 0 to 19 | 7 | 8 actions a query, camera orbit ±10° | 17/20 |" in readme
    assert "| these |" in readme
    assert "drawn at random" in readme
    with pytest.raises(InputError, match="of other weights"):
        export_policy(run, out, measured=[_figures("0" * 64)])
    assert weights_digest(read_card(out)) == digest  # what stood there stands
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]


def test_an_export_cannot_be_trained_or_exported(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "soup"
    export_policy(run, out)
    with pytest.raises(InputError, match="an export already"):
        export_policy(out, tmp_path / "again")
    config = read_config(run)
    with pytest.raises(InputError, match="already holds something else"):
        train(config.model_copy(update={"out": out}), nothing)
    other = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(latest_checkpoint(other))
    (other / "result.json").unlink()
    shutil.copytree(out, other / "checkpoints" / "step_00000008")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(InputError, match="cannot be trained further"):
        train(config.model_copy(update={"out": other}), nothing)


def test_what_stands_beside_an_export_is_not_deleted(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "soup"
    export_policy(run, out)
    (out / "eval").mkdir()
    with pytest.raises(InputError, match="already holds something else"):
        export_policy(run, out)
    assert (out / "eval").exists()


def test_without_its_packs_nobody_knows_what_it_was_trained_on(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("/pack\n", "/gone\n"))
    with pytest.raises(InputError, match=r"are gone[\s\S]*put them back"):
        export_policy(other, tmp_path / "soup")
    (other / "config.yaml").write_text(config)
    path = latest_checkpoint(other) / "card.json"
    digest = read_card(latest_checkpoint(other)).packs[0]
    path.write_text(path.read_text().replace(digest, "0" * len(digest)))
    with pytest.raises(InputError, match="no longer those"):
        export_policy(other, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_damage_is_named_with_its_own_way_out(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "soup"
    export_policy(run, out)
    data = bytearray((out / "policy.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "policy.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"is damaged[\s\S]*export it again"):
        load_policy(out, read_card(out))
    (out / "export.json").write_text((out / "export.json").read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(InputError, match=r"export\.json is damaged"):
        read_record(out)
