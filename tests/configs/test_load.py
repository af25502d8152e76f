"""How a command's settings come together, and what is said when they cannot."""

from pathlib import Path

import pytest

from geomcache.cache_schemas.errors import ConfigError
from geomcache.configs.load import load_config, preset_names
from geomcache.stages.train.config import TrainConfig

DATA = {"out": "runs/x", "data": [{"pack": "p"}]}


def test_options_beat_set_and_set_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("steps: 10\nseed: 1\nbatch_size: 2\n")
    config = load_config(TrainConfig, str(file), ["steps=20", "seed=2"], {**DATA, "steps": 30, "seed": None})
    assert (config.steps, config.seed, config.batch_size) == (30, 2, 2)


def test_set_reaches_nested_keys_and_reads_yaml() -> None:
    sets = ["policy.dit.width=64", "policy.geom_compression_type=none", "betas=[0.8, 0.9]", "learning_rate.vlm=1e-3"]
    config = load_config(TrainConfig, None, sets, DATA)
    assert config.policy.dit.width == 64
    assert config.betas == (0.8, 0.9)
    assert config.learning_rate.vlm == 1e-3


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["stepz=3"], "did you mean 'steps'"),
        (["policy.dit.widht=3"], "did you mean 'width'"),
        (["steps"], "--set key.subkey=value"),
        (["steps=many"], "'steps' has a wrong value"),
        (["steps=[1"], "not valid YAML"),
        (["policy=3", "policy.seed=1"], "not a group of settings"),
    ],
)
def test_mistakes_are_named(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, None, sets, DATA)
    assert said in str(caught.value)


def test_a_missing_file_lists_the_presets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quickstart/quickstart"):
        load_config(TrainConfig, "quickstart/nope", [], DATA)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_config(TrainConfig, str(tmp_path / "list.yaml"), [], DATA)


def test_yaml_objects_are_not_built(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("out: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(TrainConfig, str(tmp_path / "evil.yaml"), [], DATA)


def test_presets_are_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"quickstart/quickstart", "quickstart/smallest"} <= set(preset_names())


def test_set_changes_one_place_where_yaml_anchors_share_a_mapping(tmp_path: Path) -> None:
    from geomcache.configs.schema import QuickstartConfig

    sets = ["train.pool.settings.learning_rate.head=7"]
    config = load_config(QuickstartConfig, "quickstart/quickstart", sets, {"out": tmp_path})
    assert config.train["pool"].settings["learning_rate"]["head"] == 7
    assert config.train["none"].settings["learning_rate"]["head"] == 1e-3
