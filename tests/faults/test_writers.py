"""One writer at a time, and the second is told who; a dead writer's lock needs no hand; readers see what stands."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.errors import CacheIncomplete, CacheMissing, GeomcacheError
from geomcache.cache_schemas.layout import shard_rows
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.verify import verify_cache
from tests.conftest import nothing
from tests.faults.conftest import Answer, Tally
from tests.faults.jobs import Child, derive, derive_slowly, differences, extract

FOREIGN = {"host": "another-host", "process": 1, "since": "2020-01-01 00:00:00 UTC", "command": "geomcache extract"}


@pytest.fixture(scope="session")
def derived(undisturbed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("derived") / "cache"
    derive(undisturbed["bf16"], out)
    return out


def test_the_second_writer_is_refused_and_takes_over_after_a_kill(
    geomcache: Callable[..., Answer], tally: Tally, undisturbed: dict[str, Path], derived: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = Child(derive_slowly, undisturbed["bf16"], cache, 60.0)
    _wait(lambda: (cache / "commits/000000.json").exists())
    command = ("cache", "derive", undisturbed["bf16"], "--out", cache, "--codec", "int8")
    for arguments in (command, (*command, "--unlock"), ("cache", "verify", cache, "--repair")):
        refused = geomcache(*arguments)
        assert refused.code == 2
        assert f"process {first.process.pid} on {os.uname().nodename}" in refused.err
        assert "(geomcache cache derive)" in refused.err
        assert "--unlock" not in refused.err  # its owner lives
    assert geomcache("cache", "verify", cache).code == 1  # looking is allowed; it is not complete
    assert first.kill()
    assert geomcache(*command).code == 0
    assert differences(cache, derived) == []
    tally.add("second writer refused", tried=3, detected=3, lost=[])
    tally.add("takeover after a kill", tried=1, detected=1, lost=[])


def test_the_lock_of_another_machine_needs_a_hand(
    geomcache: Callable[..., Answer], tally: Tally, undisturbed: dict[str, Path], derived: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(derived, cache)
    (cache / "commits/000004.json").unlink()
    (cache / "writer.lock").write_text(json.dumps(FOREIGN))
    command = ("cache", "derive", undisturbed["bf16"], "--out", cache, "--codec", "int8")
    refused = geomcache(*command)
    assert refused.code == 2
    assert "process 1 on another-host since 2020-01-01" in refused.err
    assert "--unlock" in refused.err
    assert not (cache / "commits/000004.json").exists()
    assert geomcache(*command, "--unlock").code == 0
    assert differences(cache, derived) == []
    tally.add("lock of another host", tried=1, detected=1, lost=[])


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"[" * 5000, bytes(range(256)), b"1" * 5000, json.dumps(FOREIGN).encode()[:50]]
)
def test_a_lock_file_that_nobody_wrote_whole_stops_nobody(
    text: bytes, undisturbed: dict[str, Path], derived: Path, tmp_path: Path
) -> None:
    """Its writer died while it wrote its name; nobody holds it."""
    cache = tmp_path / "cache"
    shutil.copytree(derived, cache)
    (cache / "commits/000004.json").unlink()
    (cache / "writer.lock").write_bytes(text)
    derive(undisturbed["bf16"], cache)
    assert differences(cache, derived) == []


@pytest.mark.parametrize("name", ["writer.lock", "config.yaml", "README.md", "commits/000004.json", "tokens/c/4/0/0/0"])
def test_a_link_in_the_place_of_a_file_leads_no_writer_out(
    name: str, undisturbed: dict[str, Path], derived: Path, tmp_path: Path
) -> None:
    cache, precious = tmp_path / "cache", tmp_path / "precious.txt"
    shutil.copytree(derived, cache)
    precious.write_text("not ours")
    (cache / name).unlink(missing_ok=True)
    (cache / "commits/000004.json").unlink(missing_ok=True)
    (cache / name).symlink_to(precious)
    with contextlib.suppress(GeomcacheError):
        derive(undisturbed["bf16"], cache)
    assert precious.read_text() == "not ours"


def test_many_writers_at_once_make_one_cache(
    size: Callable[[int, int], int], tally: Tally, undisturbed: dict[str, Path], derived: Path, tmp_path: Path
) -> None:
    for attempt in range(size(2, 40)):
        cache = tmp_path / f"cache {attempt}"
        children = [Child(derive, undisturbed["bf16"], cache) for _ in range(4)]
        answers = [child.answer() for child in children]
        refused = [answer for answer in answers if isinstance(answer, str)]
        assert len(refused) < len(answers)  # one at least does it
        assert all("another run is writing" in answer for answer in refused)
        assert differences(cache, derived) == []
        tally.add("writers at once", tried=4, detected=4, lost=[])


def test_a_reader_beside_a_writer_sees_true_rows_or_a_named_refusal(
    size: Callable[[int, int], int],
    rng: np.random.Generator,
    tally: Tally,
    undisturbed: dict[str, Path],
    derived: Path,
    tmp_path: Path,
) -> None:
    cache, reads, grown = tmp_path / "cache", 0, set()
    with CachedTokens(derived) as reader:
        truth = reader.tokens(range(25))
    writer = Child(derive_slowly, undisturbed["bf16"], cache, size(1, 10) * 0.1)
    while writer.process.is_alive():
        try:
            with CachedTokens(cache, partial=True) as reader:
                done = set(reader.commits)
                for row in rng.permutation(25)[:6].tolist():
                    if row // 4 in done:
                        assert torch.equal(reader.tokens([row])[0], truth[row])
                    else:
                        with pytest.raises(CacheIncomplete, match=f"shard {row // 4} of 7"):
                            reader.tokens([row])
                    reads += 1
                grown.add(len(done))
            if len(done) < 6:
                with pytest.raises(CacheIncomplete, match="cache derive again"):
                    CachedTokens(cache)
            assert verify_cache(cache, repair=False, progress=nothing).damaged == {}
        except CacheMissing:
            pass
    assert isinstance(writer.answer(), int)
    assert len(grown) >= 3  # it really was read while it grew
    assert differences(cache, derived) == []
    tally.add("reads beside a writer", tried=reads, detected=reads, lost=[])


def test_a_reader_keeps_its_rows_while_shards_are_made_again(
    pack: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    """Repair and resume under an open reader: it sees the old file or the new one, never half of one."""
    cache = tmp_path / "cache"
    shutil.copytree(undisturbed["bf16"], cache)
    with CachedTokens(cache) as reader:
        truth = reader.tokens(range(25))
        for shard in (1, 4):
            (cache / f"commits/{shard:06d}.json").unlink()
        again = Child(extract, pack, cache, "bf16")
        while again.process.is_alive():
            assert torch.equal(reader.tokens(range(25)), truth)
        assert isinstance(again.answer(), int)
        assert torch.equal(reader.tokens(range(25)), truth)
    rows = [row for shard in (1, 4) for row in shard_rows(shard, 25, 4)]
    with CachedTokens(cache) as reader:
        assert torch.equal(reader.tokens(rows), truth[rows])


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.01)
