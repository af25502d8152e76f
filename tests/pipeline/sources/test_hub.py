"""Data sets of the hub: a local cache laid out as the hub's client lays it out, and no network."""

import os
from pathlib import Path

import pytest

from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.sources import _hub
from geomcache.pipeline.sources.lerobot import Config, Source
from tests.lerobot_files import write_data_set

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network; the client reads both when it is called."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put_in_cache(cache: Path, data_set: Path, commit: str, ref: str) -> Path:
    """Files as blobs, a snapshot of links to them, a reference to the commit."""
    repository = cache / "datasets--owner--libero_object"
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(path for path in data_set.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{commit[0]}{number:063d}"
        file.rename(blob)
        link = snapshot / file.relative_to(data_set)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return snapshot


def test_files_already_downloaded_are_used_and_named_by_owner_and_name(cache: Path, tmp_path: Path) -> None:
    main = write_data_set(tmp_path / "first", images="mp4", lengths=(4,))
    older = write_data_set(tmp_path / "second", "v2.1", lengths=(3, 2))
    put_in_cache(cache, main.root, COMMIT, "main")
    put_in_cache(cache, older.root, OTHER, "v2.1")
    path = _hub.resolve("owner/libero_object")
    assert path == cache / "datasets--owner--libero_object/snapshots" / COMMIT
    source = Source(Config(path=path))
    assert (source.location, source.head(0).suite) == ("owner/libero_object", "libero_object")
    assert _hub.commit_of(path) == COMMIT
    assert len(source.read(0, 0, 4)) == 4
    assert Source(Config(path=_hub.resolve("owner/libero_object@v2.1"))).episode_count == 2
    assert Source(Config(path=_hub.resolve(f"owner/libero_object@{OTHER}"))).episode_count == 2


def test_an_existing_path_is_itself(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "demo.hdf5").touch()
    assert _hub.resolve("owner/name") == Path("owner/name")  # the folder comes before the hub
    assert _hub.resolve(str(tmp_path / "demo.hdf5")) == tmp_path / "demo.hdf5"
    assert _hub.location_of(tmp_path / "owner/name") == "name"
    assert _hub.commit_of(tmp_path / "owner/name") is None
    assert _hub.location_of(cache / "models--owner--name/snapshots" / COMMIT) == COMMIT


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("text", ["owner/name", "owner/name@v2.1"])
def test_what_cannot_be_had_is_named_with_a_way_out(text: str) -> None:
    with pytest.raises(InputError, match="data set owner/name cannot be had") as caught:
        _hub.resolve(text)
    assert "no such file or folder; hub:" in caught.value.found
    assert "hf download --repo-type dataset owner/name" in caught.value.fix
    assert ("--revision v2.1" in caught.value.fix) == ("@" in text)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("text", ["owner/na--me", "no-slash", "a/b/c", "../up", "owner/name@", "", "/nowhere/at/all"])
def test_names_that_are_no_data_sets(text: str) -> None:
    with pytest.raises(InputError):
        _hub.resolve(text)
