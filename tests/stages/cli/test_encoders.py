"""``geomcache encoders`` and the licence in data cards: every checkpoint is there, non-commercial weights by name."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from geomcache.pipeline import plugins
from geomcache.pipeline.store.card import data_card, names_non_commercial
from geomcache.pipeline.store.reader import open_manifest
from geomcache.stages.cli import encoders

app = typer.Typer()
app.command("encoders")(encoders.encoders)


def listed() -> dict[str, dict[str, Any]]:
    found = CliRunner().invoke(app, ["--json"])
    assert found.exit_code == 0, found.output
    return {encoder["name"]: encoder for encoder in json.loads(found.stdout)["encoders"]}


def test_every_encoder_is_listed_with_what_it_needs_and_its_checkpoints() -> None:
    found = listed()
    assert sorted(found) == plugins.names("encoder")
    assert {name: encoder["problem"] for name, encoder in found.items() if encoder["problem"] is not None} == {}
    for name, encoder in found.items():
        assert encoder["needs"], name
        assert encoder["about"].endswith("."), name  # the whole of its first paragraph
        assert bool(encoder["packages"]) == bool(encoder["install"]), name
        assert set(encoder["missing"]) <= set(encoder["packages"]), name
    assert found["oracle_pointmap"]["needs"] == ["cameras", "depth"]
    assert found["oracle_pointmap"]["checkpoints"] == []
    assert "upper bound" in found["oracle_pointmap"]["about"]
    by_id = {one["name"]: one for one in found["depth_anything3"]["checkpoints"]}
    commercial = {name: not one["non_commercial"] for name, one in by_id.items()}  # as their publisher says
    assert commercial == {
        "depth-anything/DA3-SMALL": True,
        "depth-anything/DA3-BASE": True,
        "depth-anything/DA3-LARGE-1.1": False,
        "depth-anything/DA3-GIANT-1.1": False,
    }


@pytest.mark.parametrize("name", plugins.names("encoder"))
def test_a_checkpoints_licence_says_itself_whether_it_is_non_commercial(name: str) -> None:
    """Data cards know the licence's text only."""
    for checkpoint in plugins.module("encoder", name).CHECKPOINTS:
        assert names_non_commercial(checkpoint.license) == checkpoint.non_commercial, checkpoint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CC BY-NC 4.0 (non-commercial)", True),
        ("cc-by-nc-4.0", True),
        ("CC-BY-NC-SA-4.0", True),
        ("Some Noncommercial Licence", True),
        ("Apache-2.0", False),
        ("none (no weights)", False),
        ("NCSA", False),
        ("unknown (not a published model)", False),
    ],
)
def test_licence_names(text: str, expected: bool) -> None:
    assert names_non_commercial(text) is expected


def test_the_table_marks_non_commercial_weights_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = plugins.module("encoder", "xfeat")
    monkeypatch.setattr(module, "PACKAGES", ("json", "no_such_package"))
    shown = CliRunner().invoke(app, []).stdout
    lines = shown.splitlines()
    marked = [line for line in lines if "NON-COMMERCIAL" in line]
    assert any("DA3-LARGE-1.1" in line for line in marked)
    assert not any("DA3-BASE" in line for line in marked)
    for name in ("depth_anything3", "map_anything"):  # whole ids, to be copied
        assert all(checkpoint.name in shown for checkpoint in plugins.module("encoder", name).CHECKPOINTS)
    assert f"xfeat needs no_such_package, not installed: {module.INSTALL}" in shown


def test_a_broken_encoder_file_is_named_and_the_others_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    real = plugins.module

    def with_a_broken_one(kind: str, name: str) -> ModuleType:
        if name == "broken":
            raise ImportError("libfoo.so: cannot open shared object file")
        return real(kind, name)

    monkeypatch.setattr(plugins, "module", with_a_broken_one)
    monkeypatch.setattr(plugins, "names", lambda _: ["broken", "oracle_pointmap"])
    found = listed()
    assert found["broken"]["problem"] == "ImportError: libfoo.so: cannot open shared object file"
    assert found["oracle_pointmap"]["problem"] is None
    assert "broken cannot be used: ImportError" in CliRunner().invoke(app, []).stdout


def test_the_data_card_marks_non_commercial_weights(caches: dict[str, Path]) -> None:
    manifest = open_manifest(str(caches["depth_anything3"]))
    assert "NON-COMMERCIAL" not in data_card(manifest)
    encoder = manifest.recipe.encoder.model_copy(update={"license": "CC BY-NC 4.0"})
    recipe = manifest.recipe.model_copy(update={"encoder": encoder})
    card = data_card(manifest.model_copy(update={"recipe": recipe}))
    assert "licence of its weights: CC BY-NC 4.0." in card
    assert "**NON-COMMERCIAL**" in card
