"""``geomcache cache probe`` as a user meets it: words, JSON, mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from geomcache.cache_schemas.errors import CacheMissing, CacheStale, GeomcacheError, InputError
from geomcache.stages.cli import cache_probe
from tests.conftest import TASK, build_pack_at, extract_without_ray, write_demo_file

app = typer.Typer()
app.command("probe")(cache_probe.probe)


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


def test_one_cache_in_words_and_as_json(caches: dict[str, Path], pack_path: Path) -> None:
    shown = run(caches["oracle_pointmap"], "--pack", pack_path).stdout
    for said in (
        "oracle_pointmap xyz, 4 x 4 x 3",
        "25 rows of 3 episodes in 3 folds",
        "robot0_eye_in_hand",
        "all views",
    ):
        assert said in shown
    assert "tells more" not in shown
    found = parsed(caches["oracle_pointmap"], "--pack", pack_path, "--rows", 12)
    assert (found["against"], found["better"]) == (None, None)
    assert found["probe"]["rows"] == 12
    assert found["probe"]["r2"] > 0.99
    assert len(found["probe"]["fold_r2"]) == 3


def test_two_caches_and_which_tells_more(caches: dict[str, Path], pack_path: Path, tmp_path: Path) -> None:
    truth, other = caches["oracle_pointmap"], caches["depth_anything3"]
    shown = run(truth, "--pack", pack_path, "--against", other).stdout
    assert "the first tells more: R^2 0.99" in shown
    assert "in 3 of 3 folds; their grids differ, so these are not the same points" in shown
    assert "the second tells more" in run(other, "--pack", pack_path, "--against", truth).stdout
    assert "both tell the same" in run(truth, "--pack", pack_path, "--against", truth).stdout
    coarse = extract_without_ray(pack_path, "oracle_pointmap", tmp_path / "coarse", grid=[2, 2])
    same_grid = run(coarse, "--pack", pack_path, "--against", other).stdout
    assert "the first tells more" in same_grid
    assert "grids differ" not in same_grid
    found = parsed(other, "--pack", pack_path, "--against", truth)
    assert found["better"] == "against"
    assert found["against"]["r2"] > 0.99 > found["probe"]["r2"]
    assert parsed(truth, "--pack", pack_path, "--against", truth)["better"] == "equal"


@pytest.mark.parametrize("place", [0, 1])
def test_a_cache_of_another_pack_is_refused(
    place: int, caches: dict[str, Path], pack_path: Path, tmp_path: Path
) -> None:
    pack = build_pack_at(write_demo_file(tmp_path / f"{TASK}_demo.hdf5", seed=1), tmp_path / "pack")
    pair = [caches["oracle_pointmap"], caches["oracle_pointmap"]]
    pair[place] = extract_without_ray(pack, "oracle_pointmap", tmp_path / "cache")
    assert "another pack" in mistake(CacheStale, pair[0], "--pack", pack_path, "--against", pair[1])


def test_mistakes_are_named(caches: dict[str, Path], pack_path: Path, tmp_path: Path) -> None:
    mistake(CacheMissing, tmp_path / "none", "--pack", pack_path)
    assert "not a finished pack" in mistake(InputError, caches["oracle_pointmap"], "--pack", tmp_path)
    pooled = extract_without_ray(pack_path, "oracle_pointmap", tmp_path / "pooled", pool=4)
    assert "probe the cache it was derived from" in mistake(InputError, pooled, "--pack", pack_path)
