"""The blind control: what it is trained from, that it is blind, and what its success is said to mean."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from geomcache.cache_schemas.errors import InputError, UnknownName
from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.stages.cli.app import app
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.controls import blind_training, control_evaluation, is_trained, judge
from geomcache.stages.evaluate.corruption import CorruptedObservation, Corruption
from geomcache.stages.evaluate.live_policy import LivePolicy, is_shown_images
from geomcache.stages.evaluate.report.inputs import open_evaluation
from geomcache.stages.train.checkpoint import read_card, weights_digest
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.run import read_config
from geomcache.stages.train.run import run as train
from tests.conftest import SIDE, nothing
from tests.stages.evaluate.evaluation_folders import keys, write_folder


@pytest.fixture(scope="module")
def run(pack_path: Path, caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of the oracle's policy, and its control beside it."""
    out = tmp_path_factory.mktemp("control") / "run"
    config = {
        "out": out,
        "data": [{"pack": pack_path, "cache": caches["oracle_pointmap"]}],
        "policy": {
            "geom_dit_tokens": 4,
            "dit": {"width": 32, "blocks": 2, "heads": 2},
            "backbone": {"config": {"image_size": 28, "stem": {}}},
        },
        "steps": 2,
        "batch_size": 2,
        "open_loop_rows": 2,
        "validation_share": 0.0,
        "device": "cpu",
        "seed": 3,
    }
    train(TrainConfig.model_validate(config), nothing)
    wanted = blind_training(out)
    assert not is_trained(wanted)
    train(wanted, nothing)
    return out


def test_the_control_is_the_run_less_sight(run: Path) -> None:
    mine, control = read_config(run), read_config(run / "controls" / "blind")
    differences = [line.split(":")[0] for line in mine.describe_difference(control)]
    assert sorted(differences) == [
        "out",
        "policy.backbone.config.images",
        "policy.backbone.config.stem",
        "policy.geom_compression_type",
        "policy.geom_inject_to_dit",
    ]
    assert is_trained(blind_training(run))


def test_the_control_is_blind(run: Path) -> None:
    """Other pictures, the same answer; another state, another answer."""
    policy = LivePolicy(run / "controls" / "blind", "cpu")
    assert not is_shown_images(policy.card)
    random = np.random.default_rng(0)

    def seen(state: float) -> Observation:
        frame = FrameBatch(random.integers(0, 256, (1, 2, SIDE, SIDE, 3), dtype=np.uint8))
        return Observation(frame, np.full(8, state, np.float32), "pick up the soup")

    first, other, moved = (policy.act([seen(state)], [5]) for state in (0.0, 0.0, 0.5))
    np.testing.assert_array_equal(first, other)
    assert np.abs(first - moved)[..., :6].max() > 1e-4


def test_a_ruler_reaches_the_tokens_and_leaves_the_images(run: Path) -> None:
    """The encoder is given row 11's frame in place of row 3's; what its tokens are, the cache says."""
    data, policy = read_config(run).data[0], LivePolicy(run, "cpu")
    with PackReader(data.pack) as pack:
        true, false = (pack.frames([row]) for row in (3, 11))
    plain = Observation(true, np.zeros(8, np.float32), "pick up the soup")
    ruled = policy.prepare([CorruptedObservation(plain.frame, plain.state_S, plain.instruction, false), plain])
    with CachedTokens(Path(str(data.cache))) as cache:
        torch.testing.assert_close(ruled.tokens_BVGD, cache.tokens([11, 3]))
    assert torch.equal(ruled.pixel_values, policy.prepare([plain, plain]).pixel_values)


def test_what_has_no_control_is_refused_before_anything_is_played(run: Path, tmp_path: Path) -> None:
    blind = run / "controls" / "blind"
    with pytest.raises(InputError, match="sees nothing itself"):
        blind_training(blind)
    other = shutil.copytree(run, tmp_path / "run")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("steps: 2", "steps: 9"))
    with pytest.raises(InputError, match="not the end of its training"):
        blind_training(other)
    (other / "config.yaml").write_text(config.replace("seed: 3", "seed: 4"))
    with pytest.raises(InputError, match="seed: 3 != 4"):
        blind_training(other)
    (other / "config.yaml").write_text(config)
    path = other / "checkpoints" / "step_00000002"
    card, digest = (path / "card.json").read_text(), read_card(path).packs[0]
    (path / "card.json").write_text(card.replace(digest, "0" * len(digest)))
    with pytest.raises(InputError, match="of different data"):
        blind_training(other)  # as after another training in the same folder
    shutil.rmtree(other / "controls")
    with pytest.raises(InputError, match="no longer those that it was trained on"):
        blind_training(other)
    (path / "card.json").write_text(card)
    (other / "config.yaml").write_text(config.replace("/pack\n", "/gone\n"))
    with pytest.raises(InputError, match="are gone"):
        blind_training(other)
    found = CliRunner().invoke(app, ["eval", str(run), "--control", "deaf"])
    assert isinstance(found.exception, UnknownName)
    assert "one of blind" in str(found.exception)


def test_the_control_plays_the_same_episodes(run: Path, tmp_path: Path) -> None:
    rulers = Corruption(depth_scale=0.1, shuffle_instructions=True)
    config = EvalConfig(
        run=run, out=tmp_path, tasks=(2,), seeds=(5, 6), camera_orbit=9, corruption=rulers, encoder="oracle_pointmap"
    )
    control = control_evaluation(config, run / "controls" / "blind")
    assert control.out == tmp_path / "controls" / "blind"
    assert control.corruption == Corruption(shuffle_instructions=True)  # depth is nothing to it
    same = {"tasks", "seeds", "camera_orbit", "episodes", "horizon", "execute_steps", "settle_steps"}
    assert config.model_dump(include=same) == control.model_dump(include=same)
    assert control.encoder is None


def test_it_is_judged_over_pairs_and_named_in_reports(run: Path, tmp_path: Path) -> None:
    """19 of 20 for the blind policy, 20 of 20 for the run: one discordant pair, p = 1."""
    episodes = keys(tasks=(0,), states=range(20))
    blind = tmp_path / "controls" / "blind"
    digests = [
        weights_digest(read_card(path / "checkpoints" / "step_00000002")) for path in (run, run / "controls/blind")
    ]
    write_folder(tmp_path, episodes, lambda _: True, run=run, checkpoint_weights=digests[0])
    write_folder(blind, episodes, lambda key: key[2] > 0, run=run / "controls" / "blind", checkpoint_weights=digests[1])
    found = judge(EvalConfig(run=run, out=tmp_path))
    assert (found.blind.successes, found.run.successes, found.comparison.p) == (19, 20, 1.0)
    assert found.meaning == (
        "a policy that sees nothing succeeds in 19 of 20: on these states success says little about perception"
    )
    assert [open_evaluation(folder).arm for folder in (tmp_path, blind)] == ["pool of oracle_pointmap", "blind"]


@pytest.mark.parametrize(
    ("blind", "both", "only_blind", "only_run", "said"),
    [
        (19, 18, 1, 0, "success says little about perception"),
        (12, 12, 0, 8, r"only the difference \(\+40 pp\) can be owed to perception"),
        (1, 1, 0, 17, r"in 1 of 20: on these states success takes perception \(\+85 pp"),
        (0, 0, 0, 3, "no evidence of perception yet"),
        (18, 2, 16, 0, "does harm"),
    ],
)
def test_the_sentence_fits_the_figures(
    tmp_path: Path, blind: int, both: int, only_blind: int, only_run: int, said: str
) -> None:
    episodes = keys(tasks=(0,), states=range(20))
    wins: dict[str, Any] = {"blind": range(both + only_blind), "run": [*range(both), *range(20 - only_run, 20)]}
    assert len(wins["blind"]) == blind
    write_folder(tmp_path, episodes, lambda key: key[2] in wins["run"])
    write_folder(tmp_path / "controls" / "blind", episodes, lambda key: key[2] in wins["blind"])
    found = judge(EvalConfig(run=Path("run"), out=tmp_path))
    assert re.search(said, found.meaning), found.meaning
