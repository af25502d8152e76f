"""The cache's bench: it reads what it says, no more than it says, writes nothing, and knows when cold is not cold."""

import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from geomcache.cache_schemas.errors import CacheDamaged, CacheMissing
from geomcache.pipeline.store.bench import BenchResult, Measured, RawRows, bench_cache, evict, read_raw, resident_share
from geomcache.pipeline.store.local_files import LocalFiles
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.stages.cli.cache_bench import bench
from tests.conftest import extract_without_ray, nothing
from tests.object_server import Server


def _in_memory(path: Path) -> bool:
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True).stdout
    return kind.strip() in ("tmpfs", "ramfs", "overlayfs")


def _cached(handle: int, offset: int) -> bool:
    """Whether a page can be read without waiting for a disk: asks the kernel in another way than ``mincore``."""
    try:
        return os.preadv(handle, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


@pytest.mark.parametrize("codec", ["bf16", "fp32", "int8", "lossless"])
def test_bare_reading_gives_the_stored_bytes(codec: str, pack_path: Path, tmp_path: Path) -> None:
    path = extract_without_ray(pack_path, "depth_anything3", tmp_path / codec, codec=codec)
    rows = [20, 3, 3, 11, 24]
    with CachedTokens(path) as cache:
        raw = RawRows(cache, LocalFiles(path))
        jobs = raw.jobs(raw.places(rows))
        read_raw(jobs)
        found = b"".join(bytes(view) for _, view, _ in jobs)
        raw.close()
        if codec == "lossless":
            expected = 0
            for row in rows:
                shard, slot = divmod(row, 8)
                data = (path / f"tokens/c/{shard}/0/0/0").read_bytes()
                expected += int(np.frombuffer(data[-(16 * 8 + 4) : -4], "<u8").reshape(8, 2)[slot, 1]) - 4
            assert len(found) == expected
        else:
            assert found == b"".join(array.tobytes() for array in cache.arrays(rows).values())


def test_a_tiny_cache_is_measured_and_left_as_it_was(caches: dict[str, Path]) -> None:
    path = caches["depth_anything3"]

    def look() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in [path, *path.rglob("*")]}

    before, seen = look(), []
    result = bench_cache(path, seconds=0.2, progress=lambda done, bound: seen.append((done, bound)))
    assert look() == before
    assert (result.rows, result.batch) == (25, 25)
    assert result.rounds == len(seen) >= 1
    with CachedTokens(path) as cache:
        assert result.row_bytes == cache.arrays([0])["tokens"].nbytes
    for one in result.measured:
        assert one.raw is not None
        assert min(one.raw, one.unchecked, one.checked) > 0
    assert {one.access for one in result.measured} == {"sequential", "single rows", "batches"}
    assert all("nan" not in line and "inf" not in line for line in result.findings())


def test_no_more_is_read_than_allowed(caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, read, preadv = caches["oracle_pointmap"], [0], os.preadv

    def counting(handle: int, buffers: Sequence[Any], offset: int) -> int:
        read[0] += (got := preadv(handle, buffers, offset))
        return got

    monkeypatch.setattr(os, "preadv", counting)
    for rows in (30, 200, 1000):
        read[0] = 0
        result = bench_cache(path, rows=rows, seconds=60, progress=nothing)
        assert result.rows_read <= rows
        assert read[0] <= rows * (result.row_bytes + 4)  # 4: a checksum
        assert read[0] >= rows * result.row_bytes * 0.3  # and it is not idle either


def test_time_ends_it(caches: dict[str, Path]) -> None:
    started = time.perf_counter()
    assert bench_cache(caches["oracle_pointmap"], seconds=0, progress=nothing).rounds == 1
    assert time.perf_counter() - started < 5


def test_evicted_pages_are_gone_and_far_ones_stay(tmp_path: Path) -> None:
    if _in_memory(tmp_path):
        pytest.skip("this file system keeps everything in memory")
    path, mebibyte = tmp_path / "file", 1 << 20
    with path.open("wb") as file:
        file.write(os.urandom(16 * mebibyte))
        os.fsync(file.fileno())
    handle = os.open(path, os.O_RDONLY)
    try:
        os.pread(handle, 16 * mebibyte, 0)
        assert resident_share(handle, 5, 16 * mebibyte - 5) == 1.0
        evict(handle, 9 * mebibyte + 123, mebibyte)  # inside large folios that other rows share
        assert resident_share(handle, 9 * mebibyte + 123, mebibyte) == 0.0
        assert not any(_cached(handle, 9 * mebibyte + at) for at in (123, mebibyte // 2, mebibyte))
        assert _cached(handle, 0)
        assert resident_share(handle, 0, 4 * mebibyte) == 1.0
        evict(handle)
        assert resident_share(handle, 0, 16 * mebibyte) == 0.0
    finally:
        os.close(handle)


def test_rows_that_stay_in_memory_are_not_called_cold(caches: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(caches["depth_anything3"], tmp_path / "cache")
    os.sync()
    if not _in_memory(tmp_path):
        result = bench_cache(path, seconds=0, progress=nothing)
        assert result.cold_remark is None
        assert {one.state for one in result.measured} == {"cold", "warm"}
    maps = []
    for shard in path.glob("tokens/c/*/0/0/0"):  # as numpy.memmap in a training process would
        with shard.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        assert maps[-1][:].count(0) >= 0  # touch every page
    result = bench_cache(path, seconds=0, progress=nothing)
    assert {one.state for one in result.measured} == {"warm"}
    assert result.cold_remark is not None
    assert result.cold_remark in result.findings()
    for mapped in maps:
        mapped.close()


def test_damage_is_an_error_and_no_figure(caches: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(caches["depth_anything3"], tmp_path / "cache")
    for shard in path.glob("tokens/c/*/0/0/0"):
        data = bytearray(shard.read_bytes())
        for at in range(100, len(data) - 16 * 8 - 4, 1000):
            data[at] ^= 1
        shard.write_bytes(data)
    with pytest.raises(CacheDamaged):
        bench_cache(path, seconds=0, progress=nothing)
    with pytest.raises(CacheMissing):
        bench_cache(tmp_path / "none", progress=nothing)


def test_behind_a_url_there_is_no_disk_to_compare_with(caches: dict[str, Path], server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(caches["depth_anything3"])
    result = bench_cache(f"{server.url}/cache", batch=4, seconds=0, progress=nothing)
    assert {(one.state, one.raw) for one in result.measured} == {("warm", None)}
    assert len(result.measured) == 3
    assert any("URL" in line for line in result.findings())
    assert not any("bare" in line for line in result.findings())


def test_the_words_say_what_the_numbers_mean() -> None:
    def measured(access: Any, state: Any, checked: float) -> Measured:
        return Measured(access=access, state=state, raw=2 * checked, unchecked=1.5 * checked, checked=checked)

    result = BenchResult(
        cache="c",
        rows=300_000,
        row_bytes=1e6,
        batch=64,
        threads=8,
        rounds=1,
        rows_read=1,
        seconds=1,
        cold_remark=None,
        measured=(
            measured("batches", "warm", 5000),
            measured("batches", "cold", 1200),
            measured("sequential", "warm", 6000),
            measured("sequential", "cold", 1250),
            measured("single rows", "warm", 4000),
            measured("single rows", "cold", 500),
        ),
    )
    assert result.findings() == [
        "64-row random batches: 5 GB/s warm = 78.1 steps/s (0.50 of bare preadv); "
        "1.2 GB/s cold = 18.8 steps/s (0.50 of bare preadv)",
        "in order: 6 GB/s warm (0.50 of bare preadv); 1.25 GB/s cold (0.50 of bare preadv)",
        "a single row: 0.25 ms warm; 2 ms cold",
        "without checksums: warm batches at 7.5 GB/s",
        "one pass over the whole cache, 300 GB: 4 min cold",
    ]


def test_the_command_shows_a_table_words_and_json(caches: dict[str, Path]) -> None:
    app = typer.Typer()
    app.command()(bench)
    arguments = [str(caches["depth_anything3"]), "--batch", "4", "--rows", "100", "--seconds", "0"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "bare preadv" in shown.stdout
    assert "4-row random batches: " in shown.stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["batch"] == 4
    assert found["findings"][0].startswith("4-row random batches: ")
