"""``geomcache diagnose`` as a user meets it: words, JSON, a picture, mistakes by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from accelerate.state import AcceleratorState
from PIL import Image
from typer.testing import CliRunner, Result

from geomcache.cache_schemas.errors import CacheStale, GeomcacheError, InputError
from geomcache.stages.cli import diagnose
from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.policy import PolicyConfig
from geomcache.stages.train.run import run as train
from tests.conftest import TASK, build_pack_at, extract_without_ray, nothing, write_demo_file

app = typer.Typer()
app.command("diagnose")(diagnose.diagnose)


def run(*arguments: object) -> Result:
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exit_code == 0, found.output
    return found


def parsed(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(run(*arguments, "--json").stdout))


def mistake(kind: type[GeomcacheError], *arguments: object) -> str:
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(found.exception, kind), found.exception
    return str(found.exception)


def train_at(out: Path, pack: Path, cache: Path, compressor: str = "pool", share: float = 0.4) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainConfig(
        out=out,
        data=(DataPair(pack=pack, cache=cache),),
        policy=PolicyConfig.model_validate(
            {
                "dit": {"width": 32, "blocks": 2, "heads": 2, "future_tokens": 2},
                "backbone": {"config": {"image_size": 28}},
                "geom_compression_type": compressor,
            }
        ),
        steps=2,
        batch_size=4,
        save_every=1,
        validation_share=share,
        trackers=(),
        device="cpu",
    )
    train(config, nothing)
    return out


@pytest.fixture(scope="module")
def trained(pack_path: Path, caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with one of the three episodes held out."""
    return train_at(tmp_path_factory.mktemp("runs") / "pool", pack_path, caches["oracle_pointmap"])


def test_words_picture_and_verdict(trained: Path) -> None:
    found = run(trained)
    picture = trained / "diagnosis.png"
    for said in ("held out", "shuffled", "masked", "zeroed", "other noise", "of uniform", "compressor", str(picture)):
        assert said in found.stdout
    assert found.stdout.splitlines()[-1] == json.loads((trained / "diagnosis.json").read_text())["verdict"]
    assert "only: neighbours are alike" in found.stderr
    with Image.open(picture) as shown:
        assert shown.format == "PNG"
        assert min(shown.size) > 500


def test_json_rows_and_one_checkpoint(trained: Path, tmp_path: Path) -> None:
    found = parsed(trained, "--rows", 4, "--out", tmp_path)
    assert json.loads((tmp_path / "diagnosis.json").read_text()) == found
    assert (found["checkpoint"], found["step"], found["held_out"], found["episodes"]) == ("step_00000002", 2, True, 1)
    assert len(found["rows"]) == found["measured"]["samples"] == 4
    first = parsed(trained / "checkpoints" / "step_00000001", "--rows", 4, "--out", tmp_path)
    assert first["step"] == 1
    assert first["rows"] == found["rows"]
    assert first["measured"]["loss"] != found["measured"]["loss"]
    assert parsed(trained, "--rows", 4, "--out", tmp_path) == found
    assert parsed(trained, "--rows", 1, "--out", tmp_path)["measured"]["shuffled"] is None


def test_rows_it_was_trained_on_are_called_so(pack_path: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    trained = train_at(tmp_path / "run", pack_path, caches["oracle_pointmap"], share=0.0)
    found = run(trained)
    assert "trained on" in found.stdout
    assert "holds no episode out" in found.stderr
    assert parsed(trained)["held_out"] is False


def test_a_run_without_geometry_is_named(pack_path: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    trained = train_at(tmp_path / "run", pack_path, caches["oracle_pointmap"], "none")
    assert "without geometry" in mistake(InputError, trained)
    assert not (trained / "diagnosis.json").exists()


def test_other_data_where_the_runs_lay_is_named(tmp_path: Path) -> None:
    pack, cache = tmp_path / "pack", tmp_path / "cache"

    def make(seed: int, **settings: Any) -> None:
        for folder in (pack, cache):
            shutil.rmtree(folder, ignore_errors=True)
        build_pack_at(write_demo_file(tmp_path / f"{TASK}_demo.hdf5", seed=seed), pack)
        extract_without_ray(pack, "oracle_pointmap", cache, **settings)

    make(0)
    trained = train_at(tmp_path / "run", pack, cache)
    make(1)  # another pack and its cache at the same places
    assert "packs: their digests differ" in mistake(InputError, trained)
    make(0, grid=[2, 2])  # the same pack, another cache of it
    assert "no longer those that it was trained on" in mistake(InputError, trained)
    build = tmp_path / "other"
    build_pack_at(write_demo_file(tmp_path / f"{TASK}_demo.hdf5", seed=2), build)
    shutil.rmtree(pack)
    build.rename(pack)  # a pack that the cache was not made from
    assert "another pack" in mistake(CacheStale, trained)
    shutil.rmtree(pack)
    assert str(pack) in mistake(InputError, trained)


def test_what_is_no_run_is_named(trained: Path, tmp_path: Path) -> None:
    assert "holds no checkpoint" in mistake(InputError, tmp_path)
    lonely = tmp_path / "step_00000002"
    shutil.copytree(trained / "checkpoints" / lonely.name, lonely)
    assert "does not say which data" in mistake(InputError, lonely)
