"""The command as a user meets it: exit codes, messages without tracebacks, JSON, a full disk."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ENCODERS, write_demo_file


def geomcache(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "geomcache.stages.cli.app", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


def _mistake(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in done.stderr


def test_help_teaches_every_command() -> None:
    shown = geomcache("--help").stdout
    for command in ("demos", "pack", "extract", "train", "eval", "cache", "report", "quickstart"):
        assert command in shown
    assert geomcache("--version").stdout.startswith("0.")


def test_pack_extract_and_cache_commands_speak_json(demo_file: Path, tmp_path: Path) -> None:
    pack, cache = tmp_path / "a pack", tmp_path / "ä cache"
    built = geomcache("pack", "build", demo_file, "--out", pack, "--rows-per-shard", 8, "--json")
    assert json.loads(built.stdout)["rows"] == 25
    assert (pack / "config.yaml").exists()
    encoder = [f"encoder_config.{key}={json.dumps(value)}" for key, value in ENCODERS["oracle_pointmap"].items()]
    sets = [part for text in encoder for part in ("--set", text)]
    extract = ["extract", "--pack", pack, "--encoder", "oracle_pointmap", "--out", cache, *sets, "--json"]
    assert json.loads(geomcache(*extract).stdout)["rows_encoded"] == 25
    again = geomcache(*extract)
    assert json.loads(again.stdout)["rows_encoded"] == 0
    assert "nothing to do" in again.stderr
    assert json.loads(geomcache("cache", "info", cache, "--json").stdout)["spec"]["encoder"] == "oracle_pointmap"
    assert json.loads(geomcache("cache", "ls", tmp_path, "--json").stdout)["caches"][0]["complete"]
    assert json.loads(geomcache("pack", "info", pack, "--verify", "--json").stdout)["problems"] == []
    assert geomcache("cache", "verify", cache).returncode == 0
    shard = cache / "tokens/c/1/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    verified = geomcache("cache", "verify", cache, "--json")
    assert verified.returncode == 1
    assert list(json.loads(verified.stdout)["damaged"]) == ["1"]


def test_mistakes_exit_2_with_one_clear_message(demo_file: Path, pack_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _mistake(geomcache("pack", "build", tmp_path / "none", "--out", out), "there is no data set")
    _mistake(geomcache("pack", "build", demo_file, "--out", out, "--set", "row_per_shard=3"), "did you mean")
    _mistake(geomcache("extract", "--pack", tmp_path, "--out", out), "not a finished pack", "geomcache pack build")
    _mistake(geomcache("extract", "--pack", pack_path, "--encoder", "oracle", "--out", out), "did you mean")
    _mistake(geomcache("extract", "--pack", pack_path), "'out' is missing")
    _mistake(geomcache("train", "--pack", pack_path, "--out", out), "reads a token cache", "geomcache extract")
    _mistake(geomcache("cache", "verify", tmp_path), "no token cache")
    _mistake(geomcache("report", tmp_path), "nothing to report")
    assert not out.exists()


def test_a_missing_camera_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = write_demo_file(tmp_path / "x_demo.hdf5")
    build = ["pack", "build", path, "--out", tmp_path / "pack", "--set", "source.cameras=[agentview, sideview]"]
    _mistake(geomcache(*build), "sideview_rgb is missing", "source.cameras")
    one = geomcache(*build[:-1], "source.cameras=[agentview]", "--json")
    assert json.loads(one.stdout)["cameras"] == ["agentview 28x28"]


def test_a_full_disk_is_named_and_what_was_written_stays_valid(demo_file: Path, tmp_path: Path) -> None:
    """The system refuses to let a file grow, as a full disk would, in the middle of the pack."""
    out = tmp_path / "pack"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    build = ["pack", "build", demo_file, "--out", out, "--rows-per-shard", 16]
    _mistake(geomcache(*build, preexec_fn=small_files), "became larger than", "run the same command again")
    assert not list(out.rglob("*.partial"))
    assert not (out / "pack.json").exists()
    assert geomcache(*build).returncode == 0
    assert geomcache("pack", "info", out, "--verify").returncode == 0


def test_an_unwritable_folder_is_named(demo_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    _mistake(geomcache("pack", "build", demo_file, "--out", tmp_path / "file"), "is a file")
    _mistake(geomcache("pack", "build", demo_file, "--out", tmp_path / "file" / "pack"), "a file stands where")


def test_training_twice_is_recognised(pack_path: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    tiny = ["policy.dit.width=32", "policy.dit.blocks=2", "policy.dit.heads=2", "batch_size=2", "open_loop_rows=4"]
    sets = [part for text in [*tiny, "policy.backbone.config.image_size=28", "device=cpu"] for part in ("--set", text)]
    train = [
        "train",
        "--pack",
        pack_path,
        "--cache",
        caches["oracle_pointmap"],
        "--out",
        tmp_path / "run",
        "--steps",
        1,
    ]
    first = geomcache(*train, *sets, "--json")
    assert json.loads(first.stdout)["steps"] == 1, first.stderr
    assert "finished already" in geomcache(*train, *sets).stderr
    _mistake(geomcache(*train, *sets, "--seed", 4), "seed: 0 != 4")


@pytest.mark.slow
def test_the_wheel_brings_the_command_its_presets_and_its_page(tmp_path: Path) -> None:
    import zipfile

    root = Path(__file__).parents[3]
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", ".*_cache")
    shutil.copytree(root, copy, symlinks=True, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy]
    subprocess.run(list(map(str, build)), check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "geomcache/configs/quickstart/quickstart.yaml",
        "geomcache/stages/evaluate/report/report.html.j2",
        "geomcache/stages/evaluate/report/report_parts.html.j2",
        "geomcache/cache_schemas/manifest.py",
        "geomcache/py.typed",
    } <= names
    assert not [name for name in names if name.startswith(("tests", "stages", "pipeline", "configs"))]


def test_ctrl_c_says_that_nothing_is_lost_and_the_same_command_goes_on(
    pack_path: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    sets = ["batch_size=2", "open_loop_rows=4", "save_every=1", "device=cpu", "policy.backbone.config.image_size=28"]
    train = ["train", "--pack", pack_path, "--cache", caches["oracle_pointmap"], "--out", tmp_path / "run"]
    command = [*train, "--steps", 10_000, *(part for text in sets for part in ("--set", text))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        [sys.executable, "-m", "geomcache.stages.cli.app", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("run/checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command continues" in said
    assert "Traceback" not in said
    assert list(tmp_path.glob("run/checkpoints/step_*/card.json"))
