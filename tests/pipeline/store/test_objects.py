"""Caches behind URLs: the same bytes as on disk, few requests, and every fault of a network named in bounded time."""

import os
import pickle
import re
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr

from geomcache.cache_schemas.errors import CacheDamaged, InputError, MissingDependency
from geomcache.cache_schemas.layout import CRC_BYTES, INDEX_ENTRY_BYTES, shard_path
from geomcache.pipeline.store.objects import GAP_BYTES, REQUEST_BYTES, ObjectStore, is_remote, open_objects
from tests.object_server import Server, ranges

MIB = 1 << 20


@pytest.fixture
def big(tmp_path: Path) -> bytes:
    """21 MiB of noise, also as the file ``big``."""
    data = np.random.default_rng(0).bytes(21 * MIB)
    (tmp_path / "big").write_bytes(data)
    return data


def quick(url: str) -> ObjectStore:
    return open_objects(url, timeout=0.2)


def test_what_is_a_url_and_what_a_path() -> None:
    urls = ("s3://b/c", "HTTPS://host/c", "memory://c", "zip://::https://host/c.zip", "simplecache::s3://b/c")
    paths = ("file:///data/c", "/data/c", "caches/a::b", "C:/cache", "cache", Path("cache"))
    assert [is_remote(location) for location in (*urls, *paths)] == [True] * len(urls) + [False] * len(paths)


def test_every_row_over_http_is_what_zarr_python_reads_from_disk(
    caches: dict[str, Path], server: Server, tmp_path: Path
) -> None:
    for name, cache in caches.items():
        (tmp_path / name).symlink_to(cache)
        store = open_objects(f"{server.url}/{name}/")
        rows = zarr.open_group(str(cache), mode="r")["tokens"][:]
        assert len(rows) == 25
        slots, shards = 8, 4
        for shard in range(shards):
            path = shard_path("tokens", shard, rows.ndim - 1)
            length = slots * INDEX_ENTRY_BYTES + CRC_BYTES
            tail, total = store.tail(path, length)
            assert (total, tail) == ((cache / path).stat().st_size, (cache / path).read_bytes()[-length:])
            index = np.frombuffer(tail[:-CRC_BYTES], "<u8").reshape(slots, 2)
            expected = rows[shard * slots : (shard + 1) * slots]
            got = np.empty_like(expected)
            order = list(reversed(range(len(expected))))
            store.read_ranges(path, index[order, 0].tolist(), [memoryview(got[slot]).cast("B") for slot in order])
            np.testing.assert_array_equal(got, expected)
            assert index[0, 1] == rows[0].nbytes + CRC_BYTES
        assert len(server.ranges()) == 2 * shards  # a tail and one range each


def test_neighbours_become_one_request_and_a_row_asked_twice_is_sent_once(server: Server, big: bytes) -> None:
    store = open_objects(server.url)

    def asked(offsets: Sequence[int], length: int) -> list[str | None]:
        assert ranges(store, "big", offsets, [length] * len(offsets)) == [big[i : i + length] for i in offsets]
        return server.ranges()

    assert asked([2000, 0, 1000], 1000) == ["bytes=0-2999"]
    assert asked([500, 0, 500, 0, 700], 1000) == ["bytes=0-1699"]
    assert ranges(store, "big", [0, 100], [1000, 10]) == [big[:1000], big[100:110]]
    assert server.ranges() == ["bytes=0-999"]
    assert asked([0, GAP_BYTES + 9], 10) == [f"bytes=0-{GAP_BYTES + 18}"]
    assert asked([0, GAP_BYTES + 10], 10) == ["bytes=0-9", f"bytes={GAP_BYTES + 10}-{GAP_BYTES + 19}"]


def test_a_long_run_becomes_requests_of_bounded_size_that_travel_side_by_side(server: Server, big: bytes) -> None:
    server.hold(3)
    got = ranges(open_objects(server.url), "big", [i * MIB for i in range(20)], [MIB] * 20)
    assert b"".join(got) == big[: 20 * MIB]
    stops = [REQUEST_BYTES, 2 * REQUEST_BYTES, 20 * MIB]
    assert server.ranges() == [f"bytes={i * REQUEST_BYTES}-{stop - 1}" for i, stop in enumerate(stops)]
    assert server.most_busy == 3


def test_many_small_objects_are_read_side_by_side(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a b ü").mkdir()
    for number in range(12):
        (tmp_path / "a b ü" / f"{number}.json").write_text(str(number))
    server.hold(14)
    store = open_objects(f"{server.url}/a b ü")
    assert store.read_many([f"{number}.json" for number in (3, 99, *range(12))]) == [
        b"3",
        None,
        *[str(number).encode() for number in range(12)],
    ]
    assert server.most_busy == 14
    assert store.read("7.json") == b"7"
    with pytest.raises(FileNotFoundError, match=r"http://127.0.0.1:\d+/a b ü/99.json"):
        store.read("99.json")
    with pytest.raises(FileNotFoundError, match=r"99\.json"):
        store.tail("99.json", 5)


def test_a_tail_is_one_request_and_knows_shorter_and_empty_objects(server: Server, big: bytes, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"hello")
    (tmp_path / "empty").write_bytes(b"")
    store = open_objects(server.url)
    assert store.tail("big", 100) == (big[-100:], len(big))
    assert server.ranges() == ["bytes=-100"]
    assert store.tail("small", 100) == (b"hello", 5)
    assert store.tail("empty", 100) == (b"", 0)


@pytest.mark.parametrize(
    ("variables", "url", "tail_requests"),
    [
        ({"AWS_ENDPOINT_URL": "URL", "AWS_SKIP_SIGNATURE": "true"}, "s3://bucket/pre fix", 1),
        (
            {"AWS_ENDPOINT_URL": "URL", "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "x"},
            "s3a://bucket/pre fix",
            1,
        ),
        ({"GOOGLE_BASE_URL": "URL", "GOOGLE_SKIP_SIGNATURE": "true"}, "gcs://bucket/pre fix", 1),
        (
            {"AZURE_STORAGE_ENDPOINT": "URL", "AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_SKIP_SIGNATURE": "true"},
            "az://bucket/pre fix",
            2,
        ),
    ],
)
def test_cloud_clients_take_their_settings_from_the_environment(
    variables: dict[str, str],
    url: str,
    tail_requests: int,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, server.url if value == "URL" else value)
    for folder in ("bucket/pre fix", "bucket/pre%20fix"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "row").write_bytes(bytes(range(100)))
    store = open_objects(url)
    assert ranges(store, "row", [90, 3], [5, 4]) == [bytes(range(90, 95)), bytes(range(3, 7))]
    server.requests.clear()
    assert store.tail("row", 10) == (bytes(range(90, 100)), 100)
    assert len(server.requests) == tail_requests
    signed = [(request[3] or "").startswith("AWS4-HMAC-SHA256 Credential=me/") for request in server.requests]
    assert signed == ["AWS_ACCESS_KEY_ID" in variables] * tail_requests
    with pytest.raises(FileNotFoundError, match="nothing"):
        store.tail("nothing", 10)
    with pytest.raises(CacheDamaged, match="ends too early"):
        ranges(store, "row", [98], [5])
    with pytest.raises(CacheDamaged, match="ends too early"):
        ranges(store, "row", [200], [5])
    server.status = 403
    with pytest.raises(InputError, match=r"(?s)pre fix/row cannot be read.*403 Forbidden.*fix: .*_SKIP_SIGNATURE"):
        store.read("row")


def test_missing_credentials_are_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", server.url)  # what a machine of Amazon's would ask; here 501 and 404
    with pytest.raises(InputError, match=r"(?s)no credentials in the environment.*export AWS_ACCESS_KEY_ID"):
        quick("s3://bucket/cache").read("manifest.json")
    assert server.requests == []


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("ranges ignored", r"(?s)big cannot be read.*answers range requests.*python -m http.server"),
        ("another range", r"(?s)big cannot be read.*Requested \d+\.\.\d+, got 0\.\.10"),
        ("fewer bytes", r"(?s)big ends too early.*expected: .*bytes"),
        ("breaks off", r"(?s)big cannot be read.*fix: .*curl"),
        ("stalls", r"(?s)big cannot be read.*no answer within 0.2 seconds"),
    ],
)
def test_a_server_that_misbehaves_gives_an_error_and_never_other_bytes(
    fault: str, expected: str, server: Server, big: bytes
) -> None:
    store = quick(server.url)
    assert ranges(store, "big", [5], [100]) == [big[5:105]]
    server.fault = fault
    start = time.monotonic()
    for read in (
        lambda: ranges(store, "big", [5], [100]),
        lambda: ranges(store, "big", [5, 1010, 1010 + 3 * MIB], [1000] * 3),
        lambda: store.tail("big", 100),
    ):
        with pytest.raises((InputError, CacheDamaged), match=expected):
            read()
    assert time.monotonic() - start < 10
    server.fault = ""
    assert ranges(store, "big", [5], [100]) == [big[5:105]]  # the store is as good as before


def test_objects_that_are_gone_or_cut_are_damage(server: Server, big: bytes) -> None:
    store = open_objects(server.url)
    with pytest.raises(CacheDamaged, match=r"(?s)gone is missing.*fix: .*copy the cache there again"):
        ranges(store, "gone", [0], [10])
    for offset in (len(big) - 5, len(big), len(big) + 5):
        with pytest.raises(CacheDamaged, match="big ends too early"):
            ranges(store, "big", [0, offset], [10, 10])


def test_an_endless_record_is_not_read_into_memory(server: Server, big: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geomcache.pipeline.store.objects.MAX_JSON_BYTES", MIB)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/endless/big", big)
    for url in (server.url, "memory://endless"):
        with pytest.raises(CacheDamaged, match=r"(?s)big is too large.*at most 1 MiB"):
            open_objects(url).read("big")
    memory.rm("/endless", recursive=True)


@pytest.mark.parametrize(("status", "reason"), [(401, "Unauthorized"), (403, "Forbidden"), (503, "Unavailable")])
def test_refusals_name_the_url_and_the_reason(status: int, reason: str, server: Server) -> None:
    server.status = status
    store = quick(server.url)
    for read in (
        lambda: store.read("a"),
        lambda: store.read_many(["a", "b"]),
        lambda: store.tail("a", 9),
        lambda: ranges(store, "a", [0], [9]),
    ):
        with pytest.raises(InputError, match=rf"(?s)^http://127.0.0.1:\d+/a cannot.*{status} [\w ]*{reason}.*fix: "):
            read()


@pytest.mark.usefixtures("big")
def test_servers_that_are_not_there_or_never_answer_are_given_up(server: Server) -> None:
    with pytest.raises(InputError, match="Connection refused"):
        quick("http://127.0.0.1:1/cache").read("manifest.json")
    server.hold(1000)
    for read in (
        lambda: quick(server.url).read("big"),
        lambda: quick(server.url).read_many(["big"] * 40),
        lambda: quick(server.url).tail("big", 10),
        lambda: ranges(quick(server.url), "big", [0, 5 * MIB], [10, 10]),
    ):
        start = time.monotonic()
        with pytest.raises(InputError, match=r"(?s)/big cannot be read.*no answer within 0.2 seconds"):
            read()
        assert time.monotonic() - start < 4


def test_a_password_is_sent_and_never_shown(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    secret = server.url.replace("//", "//me:geh%20eim@") + "?sig=geheim"
    store = pickle.loads(pickle.dumps(quick(secret)))
    assert store.location == server.url
    assert store.read("file") == b"hello"
    assert server.requests[-1][1:] == ("/file?sig=geheim", None, "Basic bWU6Z2VoIGVpbQ==")
    for status, path in ((500, "file"), (0, "nothing")):
        server.status = status
        with pytest.raises((InputError, FileNotFoundError)) as caught:
            store.read(path)
        shown = "".join(traceback.format_exception(caught.value)) + repr(store)
        assert f"{server.url}/{path}" in shown
        assert not re.search("geh.*eim", shown)
    assert open_objects("abfs://container@account.dfs.core.windows.net/x").location.endswith(
        "@account.dfs.core.windows.net/x"
    )
    with pytest.raises(
        InputError, match=r"(?s)^az://container/x was given with a query.*AZURE_STORAGE_SAS_TOKEN"
    ) as error:
        open_objects("az://container/x?sig=geheim")
    assert "geheim" not in str(error.value)


def test_unknown_urls_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)s4://bucket/x: this kind of URL.*s3, s3a, gs.*Protocol not known: s4"):
        open_objects("s4://bucket/x")
    for url in ("s3://", "http://", f"zip://::{tmp_path}/nothing.zip"):
        with pytest.raises(InputError, match="cannot be"):
            open_objects(url)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(InputError, match=r"(?s)Account must be specified.*AZURE_STORAGE_ACCOUNT_NAME"):
        open_objects("az://container/x")
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(MissingDependency, match=r"(?s)sftp://host/x.*paramiko"):
        open_objects("sftp://me:geheim@host/x")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingDependency, match=r"(?s)s3://bucket/x.*pip install 'geomcache\[remote\]'"):
        open_objects("s3://bucket/x")


def test_anything_else_goes_through_fsspec(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = caches["oracle_pointmap"]
    paths = [str(file.relative_to(cache)) for file in sorted(cache.rglob("*")) if file.is_file()]
    memory = fsspec.filesystem("memory")
    for path in paths:
        memory.pipe_file(f"/objects/cache/{path}", (cache / path).read_bytes())
    with zipfile.ZipFile(tmp_path / "cache.zip", "w") as archive:
        for path in paths:
            archive.write(cache / path, path)
    shard = (cache / "tokens/c/1/0/0/0").read_bytes()
    for url in ("memory://objects/cache", f"zip://::{tmp_path}/cache.zip"):
        store = pickle.loads(pickle.dumps(open_objects(url)))
        assert store.read_many([*paths, "nothing"]) == [*[(cache / path).read_bytes() for path in paths], None]
        assert store.tail("tokens/c/1/0/0/0", 60) == (shard[-60:], len(shard))
        assert ranges(store, "tokens/c/1/0/0/0", [70, 0], [30, 20]) == [shard[70:100], shard[:20]]
        with pytest.raises(CacheDamaged, match="ends too early"):
            ranges(store, "tokens/c/1/0/0/0", [len(shard) - 5], [10])
        with pytest.raises(FileNotFoundError, match="nothing"):
            store.tail("nothing", 5)
        with pytest.raises(CacheDamaged, match="is missing"):
            ranges(store, "nothing", [0], [1])
    memory.rm("/objects", recursive=True)


def test_threads_of_one_process_share_a_store(server: Server, big: bytes) -> None:
    fsspec.filesystem("memory").pipe_file("/shared/big", big)
    places = [[number * 1000, number * 90_000] for number in range(60)]
    for url in (server.url, "memory://shared"):
        store = open_objects(url)
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda starts, store=store: ranges(store, "big", starts, [1000, 1000]), places))
        assert got == [[big[start : start + 1000] for start in starts] for starts in places]
    fsspec.filesystem("memory").rm("/shared", recursive=True)


_FORKS = """
import multiprocessing, os, signal, sys
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.store.objects import open_objects

def child(name, store):
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        signal.alarm(20)
        try:
            print(name, store.read("file"))
        except InputError as problem:
            print(name, problem)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0, name + " was killed by its alarm"

def spawned(store, answers):
    answers.put(store.read("file"))

if __name__ == "__main__":
    store = open_objects(sys.argv[1])
    child("before:", store)
    print("parent:", store.read("file"))
    child("after:", store)
    child("new:", open_objects(sys.argv[1]))
    memory = open_objects("memory://forked")
    import fsspec
    fsspec.filesystem("memory").pipe_file("/forked/file", b"memory")
    memory.read("file")
    child("fsspec:", memory)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=spawned, args=(store, answers), daemon=True)
    process.start()
    print("spawned:", answers.get(timeout=30))
    process.join(20)
"""


def test_a_fork_either_reads_or_is_refused_and_nothing_hangs(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    (tmp_path / "forks.py").write_text(_FORKS)
    process = subprocess.run(
        [sys.executable, str(tmp_path / "forks.py"), server.url],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    said = process.stdout
    assert "before: b'hello'" in said
    assert "parent: b'hello'" in said
    assert "fsspec: b'memory'" in said
    assert "spawned: b'hello'" in said
    for name in ("after", "new"):
        assert re.search(rf"{name}: {server.url} cannot be read in this process", said)
    assert said.count("multiprocessing.get_context('spawn')") == 2
