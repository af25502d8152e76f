"""The rules of the house, held by a test: file length, no print, the command's options, presets, the link folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.configs.load import load_config, preset_names, read_yaml
from geomcache.configs.schema import PRESET_CLASSES
from geomcache.stages.cli.app import app
from geomcache.stages.train.checkpoint import load_policy, read_card
from geomcache.stages.train.export_record import read_record

ROOT = Path(__file__).parent.parent
ROOMS = ("cache_schemas", "pipeline", "stages", "configs")
LINES = 400


def _python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_no_file_is_longer_than_400_lines() -> None:
    files = _python_files(*ROOMS, "tests", "benchmarks")
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > LINES}
    assert len(files) > 40
    assert long == {}


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(p.relative_to(ROOT)) for p in _python_files(*ROOMS) if not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert silent == []


def test_the_link_folder_leads_to_the_rooms() -> None:
    for room in ROOMS:
        assert (ROOT / "geomcache" / room).resolve() == ROOT / room


def test_importing_the_command_line_stays_cheap() -> None:
    heavy = "torch, transformers, ray, zarr, numpy, pydantic, h5py, matplotlib"
    code = (
        f"import sys, geomcache.stages.cli.app\nprint([name for name in '{heavy}'.split(', ') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_cache_schemas_import_no_torch_ray_or_zarr() -> None:
    modules = [f"geomcache.cache_schemas.{path.stem}" for path in _python_files("cache_schemas")]
    code = f"import sys, {', '.join(modules)}\nprint({{'torch', 'ray', 'zarr'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    kind = name.split("/")[0]
    if kind in ("extract", "train", "eval"):  # their data and run come from the command line
        options = {
            "extract": {"pack": "p", "out": "x"},
            "train": {"out": "x", "data": [{"pack": "p", "cache": "c"}]},
            "eval": {"run": "r", "out": "x"},
        }[kind]
    else:
        options = {}
    assert load_config(PRESET_CLASSES[kind], name, [], options)
    assert isinstance(read_yaml(name), dict)


SHIPPED = ROOT / "configs" / "checkpoints"
SHIPPED_BYTES = 5_000_000


@pytest.mark.parametrize("folder", sorted(SHIPPED.iterdir()) if SHIPPED.exists() else [], ids=lambda path: path.name)
def test_every_shipped_policy_is_small_and_whole(folder: Path) -> None:
    """Exactly what ``geomcache export`` writes, of the bytes that its card names, loaded strictly."""
    checkpoint = read_card(folder)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {*checkpoint.digests, "card.json", "README.md"}
    tokenizer = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
    assert checkpoint.digests.keys() == {
        "policy.safetensors",
        "export.json",
        *(f"backbone/{name}" for name in tokenizer),
    }
    assert {name: digest_file(folder / name) for name in checkpoint.digests} == checkpoint.digests
    assert (folder / "policy.safetensors").stat().st_size <= SHIPPED_BYTES
    assert read_record(folder).name == folder.name
    assert load_policy(folder, checkpoint)


OPTIONS = {
    "encoders": "--json",
    "demos": "--suite --task --episodes --out --seed --noise --perturb --every --workers --replay --config --set "
    "--json",
    "pack build": "SOURCES --out --workers --kind --on-error --drop-no-ops --rows-per-shard --config --set --json",
    "pack info": "PACK --verify --json",
    "pack check": "SOURCE --kind --episodes --set --json",
    "pack show": "PACK --row --out",
    "extract": "--pack --encoder --out --codec --pool --statistics-from --workers --on-error --ray-address --dry-run "
    "--rows --assume-tflops --unlock --config --set --json",
    "train": "--pack --cache --out --compressor --steps --seed --processes --ablation --describe --config --set --json",
    "diagnose": "RUN --rows --out --json",
    "check": "RUN --episodes --demos --out --device --set --json",
    "export": "RUN --out --evaluation --dtype --json",
    "eval": "RUN --checkpoint --suite --tasks --episodes --seeds --workers --video-fps --control --out --resume "
    "--encoder --cameras --image-orientation --config --set --json",
    "serve": "RUN --host --port --token --without-geometry --config --set --json",
    "cache ls": "FOLDER --json",
    "cache info": "CACHE --json",
    "cache verify": "CACHE --repair --pack --unlock --json",
    "cache derive": "CACHE --out --pool --codec --statistics-from --unlock --json",
    "cache stats": "CACHE --rows --out --json",
    "cache show": "CACHE --pack --row --episode --every --out --json",
    "cache diff": "A B --rows --json",
    "cache bench": "CACHE --batch --rows --seconds --json",
    "cache probe": "CACHE --pack --against --rows --json",
    "report": "FOLDERS --out --title --json",
    "quickstart": "--out --config --set --json",
    "proof": "--out --arms --dry-run --config --set --json",
}


def test_the_list_of_options_is_what_users_know() -> None:
    """Changing an option breaks scripts: change this list only on purpose, and say so in the commit."""
    found = {}
    root = typer.main.get_command(app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        subcommands = getattr(command, "commands", None)
        for full, each in (
            {f"{name} {sub}": c for sub, c in subcommands.items()}.items() if subcommands else [(name, command)]
        ):
            options = [p.opts[0] if p.opts[0].startswith("--") else p.opts[0].upper() for p in each.params]
            found[full] = " ".join(option for option in options if option != "--help")
    assert found == OPTIONS
