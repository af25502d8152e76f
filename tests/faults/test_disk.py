"""Disks that fill up or turn read-only in the middle of a shard: refused by name, nothing lost, resumed.

The small disks are real ones (tmpfs, bind mounts), which only root can make; the file-size limit works for everybody.
"""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from geomcache.pipeline.store.reader import CachedTokens
from tests.faults.conftest import Answer, Tally
from tests.faults.jobs import derive, differences, extract, unsound

SMALL_FILES = ["README.md", "config.yaml", "manifest.json", "tokens", "zarr.json"]


def _mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine lets nobody mount: {done.stderr.strip()}")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """An empty folder to mount on."""
    if os.geteuid() or sys.platform != "linux":
        pytest.skip("only root can mount")
    folder = tmp_path / "a disk"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", "-R", "-l", str(folder)], capture_output=True, check=False)


@pytest.fixture(scope="session")
def derived(undisturbed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``derive`` makes where nothing goes wrong: two arrays a shard."""
    out = tmp_path_factory.mktemp("derived") / "cache"
    derive(undisturbed["bf16"], out)
    return out


def test_a_full_disk_loses_nothing(
    size: Callable[[int, int], int],
    rng: np.random.Generator,
    tally: Tally,
    geomcache: Callable[..., Answer],
    undisturbed: dict[str, Path],
    derived: Path,
    mounted: Path,
) -> None:
    """The disk is full at any moment between the first file and the last; every file takes a page of 4 KiB."""
    needed, every = 28, []
    for pages in rng.permutation(np.arange(2, needed))[: size(4, needed)]:
        _mount("-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", mounted)
        cache, wrong = mounted / "cache", []
        command = ("cache", "derive", undisturbed["bf16"], "--out", cache, "--codec", "int8")
        full = geomcache(*command)
        if full.code != 2 or "the disk is full" not in full.err or "Traceback" in full.err:
            wrong.append(f"said {full}")
        wrong += unsound(cache, derived) if cache.exists() else []
        wrong += [f"left {path.name}" for path in cache.rglob("*.partial")]
        _mount("-o", "remount,size=4m", mounted)
        wrong += [f"resume: {again}" for again in [geomcache(*command)] if again.code]
        wrong += [f"other bytes: {name}" for name in differences(cache, derived)]
        subprocess.run(["umount", str(mounted)], check=True)
        lost = [f"disk of {pages} pages: {each}" for each in wrong]
        tally.add("disk full", tried=1, detected=not lost, lost=lost)
        every += lost
    assert every == []


def test_a_file_that_may_not_grow_loses_nothing(
    geomcache: Callable[..., Answer], pack: Path, tally: Tally, tmp_path: Path
) -> None:
    """The limit lets small files pass and cuts every shard."""
    source, cache = tmp_path / "large", tmp_path / "cache"
    extract(pack, source, "bf16", grid=(28, 28))  # shards of 38 KB, much more than the records
    command = ("cache", "derive", source, "--codec", "lossless", "--out", cache)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, hard))
    try:
        found = geomcache(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.code == 2, found
    assert "a file became larger than" in found.err
    assert sorted(path.name for path in cache.iterdir()) == SMALL_FILES
    assert not [path for path in cache.rglob("*/*") if path.is_file() and path.name != "zarr.json"]
    assert geomcache(*command).code == 0
    with CachedTokens(cache) as reader, CachedTokens(source) as true:
        assert torch.equal(reader.tokens(range(25)), true.tokens(range(25)))
    tally.add("file-size limit", tried=1, detected=1, lost=[])


@pytest.mark.parametrize("what", ["tokens", "scale", "commits"])
def test_a_file_system_that_turns_read_only_in_the_middle(
    what: str,
    tally: Tally,
    geomcache: Callable[..., Answer],
    undisturbed: dict[str, Path],
    derived: Path,
    mounted: Path,
) -> None:
    cache = mounted / "cache"

    def freeze(done: int, _: int) -> None:
        if done == 3:
            _mount("--bind", cache / what, cache / what)
            _mount("-o", "remount,bind,ro", cache / what)

    with pytest.raises(OSError, match="Read-only") as caught:
        derive(undisturbed["bf16"], cache, freeze)
    assert caught.value.errno == errno.EROFS
    assert unsound(cache, derived) == []
    with CachedTokens(cache, partial=True) as reader:
        assert sorted(reader.commits) == [0, 1, 2]
    command = ("cache", "derive", undisturbed["bf16"], "--out", cache, "--codec", "int8")
    refused = geomcache(*command)
    assert refused.code == 2
    assert "read-only" in refused.err
    subprocess.run(["umount", str(cache / what)], check=True)
    assert geomcache(*command).code == 0
    assert differences(cache, derived) == []
    tally.add("read-only in the middle of a shard", tried=1, detected=1, lost=[])


def test_a_read_only_cache_can_be_read_and_says_why_it_cannot_be_written(
    geomcache: Callable[..., Answer], undisturbed: dict[str, Path], pack: Path, mounted: Path, tmp_path: Path
) -> None:
    truth, settings = undisturbed["bf16"], ("--set", "encoder_config={grid: [4, 4], batch_size: 3}")
    _mount("--bind", truth, mounted)
    _mount("-o", "remount,bind,ro", mounted)
    with CachedTokens(mounted) as cache, CachedTokens(truth) as true:
        assert torch.equal(cache.tokens(range(25)), true.tokens(range(25)))
    for command in ("info", "verify", "stats"):
        assert geomcache("cache", command, mounted).code == 0
    extract_again = ("extract", "--pack", pack, "--out", mounted, "--codec", "bf16", *settings)
    assert geomcache(*extract_again).code == 0  # it is complete: there is nothing to write
    found = geomcache("cache", "verify", mounted, "--repair")
    assert (found.code, "read-only" in found.err) == (2, True), found

    subprocess.run(["umount", str(mounted)], check=True)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(truth, unfinished)
    (unfinished / "commits/000001.json").unlink()
    _mount("--bind", unfinished, mounted)
    _mount("-o", "remount,bind,ro", mounted)
    found = geomcache(*extract_again)
    assert (found.code, "read-only" in found.err) == (2, True), found


def test_names_with_spaces_and_letters_of_other_scripts(
    geomcache: Callable[..., Answer], tally: Tally, pack: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "Grüße an Ωmega, キャッシュ #1?%20 'x\" $HOME"
    extract(pack, folder / "full cache", "bf16")
    assert differences(folder / "full cache", undisturbed["bf16"]) == []
    found = geomcache("cache", "derive", folder / "full cache", "--out", folder / "петля 2", "--codec", "lossless")
    assert found.code == 0, found
    for name in ("full cache", "петля 2"):
        assert geomcache("cache", "verify", folder / name).code == 0
        assert geomcache("cache", "info", folder / name).code == 0
        with CachedTokens(folder / name) as cache, CachedTokens(undisturbed["bf16"]) as true:
            assert torch.equal(cache.tokens([24, 0]), true.tokens([24, 0]))
    assert geomcache("cache", "diff", folder / "full cache", folder / "петля 2").code in (0, 1)
    listed = json.loads(geomcache("cache", "ls", folder, "--json").out)["caches"]
    assert [each["cache"] for each in listed] == [str(folder / "full cache"), str(folder / "петля 2")]
    tally.add("paths with spaces and non-ASCII", tried=2, detected=2, lost=[])
