"""The quickstart's judgement: exit 1 when a policy has not learned, and a second run that skips."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from geomcache.cache_schemas.errors import ConfigError
from geomcache.configs.load import read_yaml
from geomcache.pipeline.ray_workers import ray_session
from geomcache.pipeline.sim import recorder
from geomcache.stages.cli import quickstart as module
from geomcache.stages.cli.app import app
from tests.conftest import write_demo_file

TINY = {
    "policy.dit.width": 32,
    "policy.dit.blocks": 2,
    "policy.dit.heads": 2,
    "policy.backbone.config.image_size": 28,
    "batch_size": 4,
    "open_loop_rows": 8,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_skips_what_is_finished_and_exits_1_when_nothing_was_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Demonstrations stand already, closed loop is left to the end-to-end test; the rest of the chain is real."""
    out = tmp_path / "quickstart"
    (out / "demos").mkdir(parents=True)
    write_demo_file(out / "demos" / "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo.hdf5")
    finished = recorder.RecordSummary(attempted=0, succeeded=0, failed=0, frames=0, seconds=0.0, files=())
    monkeypatch.setattr(recorder, "record", lambda *_: finished)
    monkeypatch.setattr(module, "_evaluate", lambda _: None)
    train = "train.pool.settings."
    sets = [f"{train}{key}={value}" for key, value in TINY.items()] + [f"{train}steps=3"]
    encoder = ["extract.depth_anything3.encoder_config.process_size=[28, 28]"]
    command = ["quickstart", "--config", "quickstart/smallest", "--out", str(out)]
    command += [part for text in [*sets, *encoder] for part in ("--set", text)]
    with ray_session(None, 1):  # one for both extractions
        untrained = CliRunner().invoke(app, command)
    assert untrained.exit_code == 1, untrained.output
    assert "not learned: pool" in untrained.output
    again = CliRunner().invoke(app, [*command, "--set", "largest_open_loop_ratio=1000"])
    assert again.exit_code == 0, again.output
    assert again.output.count("finished before with the same inputs, skipped") == 5
    assert (out / "report.html").exists()


def test_the_gate_is_half_of_the_mean_actions_error() -> None:
    for preset in ("quickstart/quickstart", "quickstart/smallest"):
        assert "largest_open_loop_ratio" not in read_yaml(preset)  # the class's 0.5 holds


def test_a_wrong_setting_of_a_late_stage_is_refused_before_the_first(tmp_path: Path) -> None:
    for wrong, said in (
        ("train.pool.settings.stepz=2", "did you mean 'steps'"),
        ("extract.depth_anything3.encoder_config.modle=tiny", "did you mean 'model'"),
        ("eval.episodes=0", "'episodes' has a wrong value"),
    ):
        command = ["quickstart", "--config", "quickstart/smallest", "--out", str(tmp_path / "q"), "--set", wrong]
        with pytest.raises(ConfigError) as caught:
            CliRunner().invoke(app, command, catch_exceptions=False)
        assert said in str(caught.value)
        assert not (tmp_path / "q").exists()
