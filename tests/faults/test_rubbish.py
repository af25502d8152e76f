"""Manifests, records and metadata that nobody wrote: refused by name, at once, and nothing outside is touched."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geomcache.cache_schemas.errors import CacheDamaged, CacheStale, GeomcacheError, SchemaTooNew
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.verify import verify_cache
from geomcache.stages.extract.plan import make_plan
from tests.conftest import nothing
from tests.faults.conftest import Answer, Tally
from tests.faults.jobs import differences, extract, extract_config, repair

TEN_GB = 10 * 10**9
NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.fixture
def cache(undisturbed: dict[str, Path], tmp_path: Path) -> Path:
    """A complete cache in a folder that holds something else too."""
    shutil.copytree(undisturbed["bf16"], tmp_path / "around" / "cache")
    (tmp_path / "around" / "precious.txt").write_text("not ours")
    (tmp_path / "around" / "tokens").mkdir()
    (tmp_path / "around" / "tokens" / "zarr.json").write_text("not ours")
    return tmp_path / "around" / "cache"


def _outside(cache: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in cache.parent.rglob("*") if path.is_file() and cache not in path.parents]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def sealed(values: dict[str, Any]) -> bytes:
    """A record with a seal that holds, as somebody makes it who knows how."""
    text = json.dumps(values, indent=2)
    return f'{text[:-2]},\n  "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'.encode()


def _values(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_bytes())
    del values["sha256"]
    return values


def _changed(values: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    *parents, last = where.split("/")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return values


def _forged(where: str, value: Any) -> Callable[[Path], bytes]:
    return lambda path: sealed(_changed(_values(path), where, value))


def _version_1(where: str, value: Any) -> Callable[[Path], bytes]:
    """Schema version 1 had no seal, so anybody may have edited it."""
    return lambda path: json.dumps(_changed({**_values(path), "schema_version": 1}, where, value)).encode()


ARRAY = {"dtype": "uint16", "row_shape": [2, 16, 3], "logical_dtype": "bfloat16"}
MANIFESTS: dict[str, tuple[Callable[[Path], bytes], type[GeomcacheError]]] = {
    "empty": (lambda _: b"", CacheDamaged),
    "binary garbage": (lambda _: bytes(range(256)) * 16, CacheDamaged),
    "a JSON array": (lambda _: b"[]", CacheDamaged),
    "a JSON string": (lambda _: b'"manifest"', CacheDamaged),
    "another program's manifest": (lambda _: b'{"name": "app", "version": "1.0"}', CacheDamaged),
    "100,000 brackets": (lambda _: NESTED, CacheDamaged),
    "100,000 brackets inside": (lambda _: b'{"schema_version": 1, "recipe": ' + NESTED + b"}", CacheDamaged),
    "cut": (lambda path: path.read_bytes()[:-100], CacheDamaged),
    "edited by hand": (lambda path: path.read_bytes().replace(b'"rows": 25', b'"rows": 24'), CacheDamaged),
    "without its seal": (lambda path: json.dumps(_values(path)).encode(), CacheDamaged),
    "a future schema": (_forged("schema_version", 3), SchemaTooNew),
    "a far future schema": (_forged("schema_version", 10**30), SchemaTooNew),
    "schema version 0": (_forged("schema_version", 0), CacheDamaged),
    "an unknown key": (_forged("checkpoint", "x"), CacheDamaged),
    "an array that climbs": (_forged("arrays", {"../../precious": ARRAY}), CacheDamaged),
    "an absolute array": (_forged("arrays", {"/etc/passwd": ARRAY}), CacheDamaged),
    "a second array": (_forged("arrays", {"tokens": ARRAY, "more": ARRAY}), CacheDamaged),
    "no array": (_forged("arrays", {}), CacheDamaged),
    "another row shape": (_forged("arrays/tokens/row_shape", [2, 16, 4]), CacheDamaged),
    "another dtype": (_forged("arrays/tokens/dtype", "object"), CacheDamaged),
    "NaN rows": (lambda path: path.read_bytes().replace(b'"rows": 25', b'"rows": NaN'), CacheDamaged),
    "negative rows": (_forged("rows", -1), CacheDamaged),
    "more rows than there can be": (_version_1("rows", 10**400), CacheDamaged),
    "more rows a shard than there can be": (_version_1("rows_per_shard", 10**12), CacheDamaged),
    "negative dim": (_version_1("recipe/spec/dim", -3), CacheDamaged),
    "a codec that climbs": (_forged("recipe/spec/codec", "../../bf16"), GeomcacheError),
    "an unknown codec": (_forged("recipe/spec/codec", "zip"), GeomcacheError),
    "more pooled tokens than tokens": (_forged("recipe/spec/pooled_to", 10**9), CacheDamaged),
    "other rows": (_forged("rows", 24), CacheDamaged),
    "other rows per shard": (_forged("rows_per_shard", 5), CacheDamaged),
    "another encoder": (_forged("recipe/fingerprint/encoder_config", "0" * 64), CacheStale),
    "another pack": (_forged("recipe/fingerprint/pack", "0" * 64), CacheStale),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_strange_manifest_is_refused_by_name(
    what: str, geomcache: Callable[..., Answer], tally: Tally, cache: Path, pack: Path
) -> None:
    make, error = MANIFESTS[what]
    (cache / "manifest.json").write_bytes(make(cache / "manifest.json"))
    before, inside = _outside(cache), {**_inside(cache)}
    with pytest.raises(error), CachedTokens(cache) as reader:
        reader.tokens(range(len(reader)))
    with pytest.raises(GeomcacheError):
        make_plan(extract_config(pack, cache, "bf16"))
    for arguments in (
        ("verify", cache),
        ("derive", cache, "--pool", 4, "--out", cache.parent.parent / "derived"),
    ):
        found = geomcache("cache", *arguments)
        assert found.code in (1, 2), found
        assert "fix:" in found.err or "geomcache" in found.err
    assert geomcache("cache", "ls", cache.parent).code == 0  # one bad cache does not hide the others
    tally.add("rubbish: manifest", tried=1, detected=1, lost=[])
    assert _inside(cache) == inside
    assert _outside(cache) == before


def _inside(cache: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["another encoder", "cut"])
def test_repair_does_not_touch_what_it_cannot_read(what: str, geomcache: Callable[..., Answer], cache: Path) -> None:
    """A strange manifest makes every record look strange: dropping them all would lose a whole cache."""
    make, _ = MANIFESTS[what]
    (cache / "manifest.json").write_bytes(make(cache / "manifest.json"))
    inside = _inside(cache)
    found = geomcache("cache", "verify", cache, "--repair")
    assert found.code in (1, 2)
    assert _inside(cache) == inside


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_lost_manifest_is_no_invitation_to_write_another(codec: str, cache: Path, pack: Path) -> None:
    """Shards and records without their manifest stay as they are; the same extraction may write it again."""
    (cache / "manifest.json").unlink()
    inside = _inside(cache)
    with contextlib.suppress(GeomcacheError):
        extract(pack, cache, codec)
        assert codec == "bf16", "another cache was begun in its folder"
    after = _inside(cache)
    after.pop(str(cache / "config.yaml"))
    assert after.items() >= {name: data for name, data in inside.items() if "config.yaml" not in name}.items()
    assert codec == "bf16" or str(cache / "manifest.json") not in after


RECORDS: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda _: b"",
    "binary garbage": lambda _: bytes(range(256)),
    "a JSON array": lambda _: b"[]",
    "100,000 brackets": lambda _: NESTED,
    "cut": lambda path: path.read_bytes()[:-9],
    "a shard that does not exist": _forged("shard", 99),
    "a negative shard": _forged("shard", -1),
    "rows that do not exist": _forged("first_row", 100),
    "too many rows": _forged("rows", 400),
    "no rows": _forged("rows", 0),
    "a negative size": _forged("sizes", {"tokens": -1}),
    "another size": _forged("sizes/tokens", 10**15),
    "an array that climbs": _forged("sizes", {"../../precious": 1}),
    "checksums that are no numbers": _forged("row_crc32c/tokens", "zz" * 16),
    "a mask that is no number": _forged("statistics/valid_rows", "no"),
    "no checksums": _forged("row_crc32c", {}),
    "other checksums": _forged("row_crc32c/tokens", "00" * 16),
    "another digest": _forged("digests/tokens", "0" * 64),
    "NaN": lambda path: path.read_bytes().replace(b'"rows": 4', b'"rows": NaN'),
    "an unknown key": _forged("checkpoint", "x"),
}


# A record that was forged with its seal, and lies about nothing that a reader uses: only verify compares these.
ONLY_VERIFY = {"another digest", "a mask that is no number"}


@pytest.mark.parametrize("what", RECORDS)
def test_a_strange_commit_record_is_refused_and_healed(
    what: str,
    geomcache: Callable[..., Answer],
    tally: Tally,
    cache: Path,
    pack: Path,
    undisturbed: dict[str, Path],
) -> None:
    record, before = cache / "commits/000002.json", _outside(cache)
    record.write_bytes(RECORDS[what](record))
    if what not in ONLY_VERIFY:
        with pytest.raises(GeomcacheError), CachedTokens(cache) as reader:
            reader.tokens(range(len(reader)))
    found = geomcache("cache", "verify", cache, "--json")
    assert found.code == 1, found
    assert json.loads(found.out)["damaged"].keys() == {"2"}
    assert geomcache("cache", "info", cache).code in (0, 2)
    repair(cache)
    extract(pack, cache, "bf16")
    assert differences(cache, undisturbed["bf16"]) == []
    assert _outside(cache) == before
    tally.add("rubbish: commit record", tried=1, detected=1, lost=[])


@pytest.mark.parametrize("text", [b"", b"[]", NESTED, b"\xff\xfe", b"NaN", b'"' * 3, b"1" * 10_000], ids=str)
def test_strange_zarr_metadata_is_refused_and_healed(
    text: bytes, tally: Tally, cache: Path, undisturbed: dict[str, Path]
) -> None:
    (cache / "tokens" / "zarr.json").write_bytes(text)
    with pytest.raises(CacheDamaged, match=r"tokens/zarr\.json"):
        CachedTokens(cache)
    assert verify_cache(cache, repair=True, progress=nothing).metadata == ("tokens/zarr.json",)
    assert differences(cache, undisturbed["bf16"]) == []
    tally.add("rubbish: Zarr metadata", tried=1, detected=1, lost=[])


def test_other_files_between_the_records_do_no_harm(
    geomcache: Callable[..., Answer], cache: Path, undisturbed: dict[str, Path]
) -> None:
    commits = cache / "commits"
    for name in ("1.json", "999999.json", "-1.json", "٣.json", "x.json", ".json", "notes.txt", "000001.json.bak"):
        (commits / name).write_text("{")
    (commits / "000009.json").mkdir()
    (commits / "folder").mkdir()
    with CachedTokens(cache) as reader, CachedTokens(undisturbed["bf16"]) as true:
        assert reader.tokens(range(25)).equal(true.tokens(range(25)))
    assert geomcache("cache", "verify", cache).code == 0


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["manifest.json", "commits/000002.json", "tokens/zarr.json"])
@pytest.mark.parametrize("instead", ["a folder", "a pipe", "a dangling link"])
def test_something_else_than_a_file_is_refused_at_once(
    name: str, instead: str, geomcache: Callable[..., Answer], cache: Path
) -> None:
    """A named pipe would let a careless reader wait for ever."""
    (cache / name).unlink()
    if instead == "a folder":
        (cache / name).mkdir()
    elif instead == "a pipe":
        os.mkfifo(cache / name)
    else:
        (cache / name).symlink_to("nowhere")
    with pytest.raises(GeomcacheError):
        CachedTokens(cache)
    assert geomcache("cache", "verify", cache).code in (1, 2)


@pytest.mark.parametrize("name", ["commits", "tokens", "tokens/c", "tokens/c/2/0/0"])
def test_nothing_is_written_or_deleted_through_a_link_that_leads_out(
    name: str, geomcache: Callable[..., Answer], cache: Path, pack: Path
) -> None:
    """A link that somebody put into a cache must not make repair or extract change other people's files."""
    target = cache.parent / "elsewhere"
    shutil.move(cache / name, target)
    (cache / name).symlink_to(target)
    (cache / "tokens/c/2/0/0/0").write_bytes(b"damaged")
    before = _outside(cache)
    geomcache("cache", "verify", cache, "--repair")
    with contextlib.suppress(GeomcacheError):
        extract(pack, cache, "bf16")
    assert _outside(cache) == before


_LIMITED = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a mistake must not take the machine's memory
from geomcache.stages.cli.app import main

for cache in sys.argv[1:]:
    sys.argv, started = ["geomcache", "cache", "verify", cache], time.perf_counter()
    try:
        main()
    except SystemExit as ending:
        code = ending.code
    except BaseException as problem:
        code = repr(problem)
    print("code", code, "seconds", round(time.perf_counter() - started, 2), file=sys.stderr)
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]  # ru_maxrss counts the parent's, too
print("megabytes", int(peak[0].split()[1]) >> 10, file=sys.stderr)
"""


def test_ten_gigabytes_are_refused_fast_and_with_little_memory(
    tally: Tally, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    """Sparse files: the true content, then zeros."""
    names = ["manifest.json", "commits/000002.json", "tokens/zarr.json", "tokens/c/2/0/0/0", "writer.lock"]
    for number, name in enumerate(names):
        cache = shutil.copytree(undisturbed["bf16"], tmp_path / str(number))
        (cache / name).touch()
        os.truncate(cache / name, TEN_GB)
    command = [sys.executable, "-c", _LIMITED, *(str(tmp_path / str(number)) for number in range(len(names)))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    said = [line.split() for line in found.stderr.splitlines() if line.startswith("code")]
    assert [line[1] for line in said] == ["2", "1", "1", "1", "0"], found.stderr
    assert max(float(line[3]) for line in said[1:]) < 5, found.stderr
    assert int(found.stderr.split()[-1]) < 700, found.stderr  # MB; torch alone takes 300
    tally.add("rubbish: 10 GB file", tried=len(names), detected=len(names), lost=[])
