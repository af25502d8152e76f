"""``geomcache cache stats``, ``show`` and ``diff`` as a user meets them: words, JSON, exit codes, pictures."""

import json
from pathlib import Path
from typing import Any

import av
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from geomcache.cache_schemas.errors import CacheMissing, CacheStale, GeomcacheError, InputError
from geomcache.stages.cli import cache_look
from tests.conftest import build_pack_at, extract_without_ray, write_demo_file

app = typer.Typer()
for _command in (cache_look.stats, cache_look.show, cache_look.diff):
    app.command(_command.__name__)(_command)


def run(*arguments: object, code: int = 0) -> Result:
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exit_code == code, found.output
    return found


def parsed(*arguments: object, code: int = 0) -> dict[str, Any]:
    return dict(json.loads(run(*arguments, "--json", code=code).stdout))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


def mistake(kind: type[GeomcacheError], *arguments: object) -> str:
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(found.exception, kind), found.exception
    return str(found.exception)


def test_stats_in_words_json_and_as_a_picture(caches: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "folder" / "stats.png"
    shown = run("stats", caches["depth_anything3"], "--out", out).stdout
    for said in ("25 of 25 rows, from 4 shards", "agentview", "norms of tokens", f"picture: {out}"):
        assert said in shown
    assert min(size(out)) > 500
    found = parsed("stats", caches["oracle_pointmap"], "--rows", 8)
    assert (found["sampled_rows"], found["rows"], found["picture"]) == (
        10,
        25,
        None,
    )  # 3 of each full shard, 1 of the last
    assert len(found["channels"]["mean"]) == 3
    assert found["findings"] == []
    assert "folder" in mistake(InputError, "stats", caches["oracle_pointmap"], "--out", tmp_path / "folder")
    mistake(CacheMissing, "stats", tmp_path / "none")


def test_show_draws_a_row_an_episode_and_tokens_alone(caches: dict[str, Path], pack_path: Path, tmp_path: Path) -> None:
    cache, out = caches["oracle_pointmap"], tmp_path / "tokens.png"
    sizes = []
    for options in (["--row", 3], ["--pack", pack_path, "--row", 3], ["--pack", pack_path, "--episode", 2], []):
        assert parsed("show", cache, "--out", out, *options) == {"picture": str(out)}
        sizes.append(size(out))
        out.unlink()
    assert sizes[0][0] < sizes[1][0] < sizes[2][0]
    assert sizes[3] == sizes[0]
    assert "leave one out" in mistake(InputError, "show", cache, "--row", 1, "--episode", 1, "--out", out)
    assert "--pack PACK --episode 1" in mistake(InputError, "show", cache, "--episode", 1, "--out", out)
    assert "0 to 24" in mistake(InputError, "show", cache, "--row", -1, "--out", out)
    other = build_pack_at(write_demo_file(tmp_path / "x_demo.hdf5", seed=1), tmp_path / "pack")
    assert "another pack" in mistake(CacheStale, "show", cache, "--pack", other, "--out", out)
    assert not out.exists()


def test_show_writes_a_film_of_an_episode(caches: dict[str, Path], pack_path: Path, tmp_path: Path) -> None:
    cache, film = caches["oracle_pointmap"], tmp_path / "new" / "Film.MP4"
    shown = ["show", cache, "--pack", pack_path, "--episode", 2, "--out", film]
    assert parsed(*shown, "--every", 2) == {"video": str(film), "frames": 3}  # 6 rows
    assert [path.name for path in film.parent.iterdir()] == ["Film.MP4"]
    with av.open(str(film)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3
    other = tmp_path / "other.mp4"
    assert f"--episode 0 --out {other}" in mistake(InputError, "show", cache, "--pack", pack_path, "--out", other)
    assert "--pack PACK --episode 1" in mistake(InputError, "show", cache, "--episode", 1, "--out", other)
    assert "0 to 2" in mistake(InputError, "show", cache, "--pack", pack_path, "--episode", 3, "--out", other)
    assert list(tmp_path.glob("*")) == [film.parent]


@pytest.mark.parametrize("rows", [0, 512])
def test_diff_says_which_setting_differs_and_by_how_much(
    caches: dict[str, Path], pack_path: Path, tmp_path: Path, rows: int
) -> None:
    cache = caches["depth_anything3"]
    again = extract_without_ray(pack_path, "depth_anything3", tmp_path / "again")
    assert "4 of 4 shards hold the same bytes" in run("diff", cache, again, "--rows", rows).stdout
    assert parsed("diff", cache, again, "--rows", rows)["equal"] is True
    seeded = extract_without_ray(pack_path, "depth_anything3", tmp_path / "seeded", seed=1)
    shown = run("diff", cache, seeded, "--rows", rows, code=1).stdout
    for said in ("config.seed: 0 != 1", "weights:", "0 of 4 shards", "the caches differ"):
        assert said in shown
    found = parsed("diff", cache, seeded, "--rows", rows, code=1)
    assert found["equal"] is False
    assert (found["tokens"] is None) == (rows == 0)
    if rows:
        assert found["tokens"]["rows"] == 25
        assert 0.1 < found["tokens"]["normalised_rms"] < 10
    assert "other shapes" in run("diff", cache, caches["oracle_pointmap"], code=1).stdout
