"""The parts of the engine: work ahead in order, bad rows, bounded memory, what a run tells, what it will take."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.errors import InputError, PackDamaged
from geomcache.cache_schemas.manifest import ShardCommit, ShardStatistics
from geomcache.pipeline.encoding import slot_deviation
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.verify import verify_cache
from geomcache.pipeline.store.writer import ShardSink
from geomcache.pipeline.tokens import build_encoder
from geomcache.stages.extract import report as report_module
from geomcache.stages.extract.plan import ExtractConfig, begin, make_plan
from geomcache.stages.extract.report import LOG_NAME, RunLog
from geomcache.stages.extract.stream import Ahead
from geomcache.stages.extract.worker import ShardWorker
from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.data import TrainingData
from tests.conftest import ENCODERS, TASK, build_pack_at, nothing, write_demo_file


def _config(pack: Path, out: Path, encoder: str = "depth_anything3", **settings: Any) -> ExtractConfig:
    return ExtractConfig(
        pack=pack, out=out, encoder=encoder, encoder_config=ENCODERS[encoder], device="cpu", **settings
    )


def _work(config: ExtractConfig, threads: int = 1) -> dict[int, str]:
    """Every missing shard, in this process; the masked rows."""
    plan = begin(make_plan(config))
    worker = ShardWorker(config.pack, config.out, plan.manifest, "cpu", config.on_error, threads)
    masked: dict[int, str] = {}
    try:
        for shard in plan.remaining:
            masked |= worker.run(shard).masked
    finally:
        worker.close()
    return masked


@pytest.fixture
def damaged_pack(demo_file: Path, tmp_path: Path) -> Path:
    """A pack of 25 rows whose row 11 has a flipped bit in the picture of its second camera."""
    pack = build_pack_at(demo_file, tmp_path / "damaged")
    with PackReader(pack) as reader:
        offset = int(reader._offsets[11, 1]) + int(reader._sizes[11, 1]) // 2
    with (pack / "shards/000001.tar").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    return pack


def test_a_damaged_frame_stops_the_run_by_name(damaged_pack: Path, tmp_path: Path) -> None:
    with pytest.raises(PackDamaged, match=r"000001\.tar"):
        _work(_config(damaged_pack, tmp_path / "cache"))


def test_a_damaged_frame_can_be_masked_and_nothing_else_changes(
    damaged_pack: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    """Its neighbours in the batch keep their bits; the cache says which row it is; training leaves its tokens out."""
    config = _config(damaged_pack, tmp_path / "cache", on_error="mask")
    masked = _work(config)
    assert list(masked) == [11]
    assert "row 11" in masked[11]
    with CachedTokens(config.out) as cache, CachedTokens(caches["depth_anything3"]) as good:
        tokens, true = cache.tokens(range(25)), good.tokens(range(25))
        others = [row for row in range(25) if row != 11]
        assert torch.equal(tokens[others], true[others])
        assert tokens[11].isnan().all()
        valid = np.unpackbits(np.frombuffer(bytes.fromhex(cache.commits[1].statistics.valid_rows or ""), np.uint8))
        assert valid[:8].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    found = verify_cache(config.out, repair=False, progress=nothing)
    assert (found.complete, found.rows_with_non_finite) == (True, 1)
    pair = DataPair(pack=damaged_pack, cache=str(config.out))
    statistics = TrainingData(TrainConfig(out=Path("unused"), data=(pair,))).token_statistics()
    assert statistics is not None
    assert np.isfinite(statistics.mean).all()


@pytest.mark.parametrize("codec", ["int8", "lossless", "fp32"])
def test_masked_rows_survive_every_codec(damaged_pack: Path, tmp_path: Path, codec: str) -> None:
    config = _config(damaged_pack, tmp_path / "cache", on_error="mask", codec=codec)
    _work(config)
    with CachedTokens(config.out) as cache:
        assert cache.tokens([11]).isnan().all()
        assert cache.tokens([10, 12]).isfinite().all()


class _Picky:
    """A real encoder that fails on frames by their content, as the oracle refuses frames without depth."""

    def __init__(self, encoder: Any, refused: list[bytes], fault: Exception | None) -> None:
        self._encoder, self._refused, self._fault, self.spec = encoder, refused, fault, encoder.spec

    def encode(self, frames: Any) -> torch.Tensor:
        bad = [image.tobytes() in self._refused for image in frames.images_BVHWC]
        if any(bad) and self._fault is not None:
            raise self._fault
        tokens: torch.Tensor = self._encoder.encode(frames)
        tokens[torch.tensor(bad)] = float("nan")  # as half precision overflows
        return tokens


FAULTS = [InputError("no surface\nsecond line"), None]


@pytest.mark.parametrize("fault", FAULTS, ids=["refused", "no finite token"])
def test_a_frame_the_encoder_fails_on_is_found_among_its_neighbours(
    pack_path: Path, caches: dict[str, Path], tmp_path: Path, fault: Exception | None
) -> None:
    said = "no surface" if fault else "no token is finite"
    for on_error in ("stop", "mask"):
        config = _config(pack_path, tmp_path / on_error, on_error=on_error)
        plan = begin(make_plan(config))
        worker = ShardWorker(pack_path, config.out, plan.manifest, "cpu", config.on_error)
        parts = worker._ready()
        with PackReader(pack_path) as pack:
            refused = [pack.images([row])[0].tobytes() for row in (9, 10)]
        parts.tokens._encoder = _Picky(parts.encoder, refused, fault)  # type: ignore[assignment]
        if on_error == "stop":
            with pytest.raises(InputError, match=rf"fails on row 9 .*step 1\), also by itself[^$]*{said}"):
                worker.run(1)
            assert not list(config.out.glob("commits/*"))
            assert not [path for path in config.out.glob("tokens/c/**/*") if path.is_file()]
        else:
            report = worker.run(1)
            assert report.masked == {9: said, 10: said}
            true = CachedTokens(caches["depth_anything3"]).tokens(range(8, 16))
            found = CachedTokens(config.out, partial=True).tokens(range(8, 16))
            assert found.isnan().flatten(1).all(1).tolist() == [False, True, True] + [False] * 5
            assert torch.equal(found[3:], true[3:])
        worker.close()


def test_a_fault_of_every_frame_is_not_masked(pack_path: Path, tmp_path: Path) -> None:
    config = _config(pack_path, tmp_path / "cache", on_error="mask")
    plan = begin(make_plan(config))
    worker = ShardWorker(pack_path, config.out, plan.manifest, "cpu", config.on_error)
    parts = worker._ready()
    with PackReader(pack_path) as pack:
        refused = [image.tobytes() for image in pack.images(range(25))]
    parts.tokens._encoder = _Picky(parts.encoder, refused, FAULTS[0])  # type: ignore[assignment]
    with pytest.raises(InputError, match="no row of shard 0 can be read and encoded"):
        worker.run(0)
    worker.close()
    assert not list(config.out.glob("commits/*"))


@pytest.mark.parametrize(
    ("fault", "raised"),
    [(RuntimeError("CUDA error: an illegal memory access"), RuntimeError), (torch.OutOfMemoryError("x"), InputError)],
)
def test_a_fault_of_the_device_is_no_frames_fault(
    pack_path: Path, tmp_path: Path, fault: Exception, raised: type[Exception]
) -> None:
    """A shard of NaN under a good cache's id would never be made again."""
    config = _config(pack_path, tmp_path / "cache", on_error="mask")
    plan = begin(make_plan(config))
    worker = ShardWorker(pack_path, config.out, plan.manifest, "cpu", config.on_error)
    parts = worker._ready()
    with PackReader(pack_path) as pack:
        refused = [pack.images([5])[0].tobytes()]
    parts.tokens._encoder = _Picky(parts.encoder, refused, fault)  # type: ignore[assignment]
    with pytest.raises(raised):
        worker.run(0)
    worker.close()
    assert not list(config.out.glob("commits/*"))


def test_a_slow_store_bounds_what_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one row, a shard of 25: encoded ones that wait to be written never pile up."""
    config = ExtractConfig(
        pack=build_pack_at(write_demo_file(tmp_path / f"{TASK}_demo.hdf5"), tmp_path / "pack", rows_per_shard=25),
        out=tmp_path / "cache",
        encoder="depth_anything3",
        encoder_config={**ENCODERS["depth_anything3"], "batch_size": 1},
        device="cpu",
    )
    plan = begin(make_plan(config))
    worker = ShardWorker(config.pack, config.out, plan.manifest, "cpu")
    encoded, written, most, append = 0, 0, 0, ShardSink.append
    tokens = worker._ready().tokens
    encode = tokens.encode

    def count(block: Any) -> torch.Tensor:
        nonlocal encoded, most
        encoded += 1
        most = max(most, encoded - written)
        return encode(block)

    def slow(sink: ShardSink, arrays: Any) -> None:
        nonlocal written
        time.sleep(0.02)
        append(sink, arrays)
        written += 1

    monkeypatch.setattr(tokens, "encode", count)
    monkeypatch.setattr(ShardSink, "append", slow)
    worker.run(0)
    worker.close()
    assert (encoded, written) == (25, 25)
    assert most < 12


@pytest.mark.parametrize("threads", [1, 3])
def test_shards_side_by_side_give_the_same_bytes(
    pack_path: Path, caches: dict[str, Path], tmp_path: Path, threads: int
) -> None:
    """Two shards at once in one worker, as Ray runs it."""
    config = _config(pack_path, tmp_path / "cache")
    plan = begin(make_plan(config))
    worker = ShardWorker(config.pack, config.out, plan.manifest, "cpu", threads=threads)
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(worker.run, range(4)))
    state = worker.state()
    worker.close()
    assert state["shards"] == {}
    assert set(state["seconds"]) == {"decode", "encode", "store", "write"}
    assert [report.commit.shard for report in reports] == [0, 1, 2, 3]
    for shard in range(4):
        name = f"tokens/c/{shard}/0/0/0"
        assert (config.out / name).read_bytes() == (caches["depth_anything3"] / name).read_bytes()


def test_ahead_keeps_order_and_bounds_what_is_in_memory() -> None:
    alive, most, lock = 0, 0, threading.Lock()

    def work(item: int) -> int:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        time.sleep(0.002 * (item % 3))
        return item

    with ThreadPoolExecutor(4) as pool:
        seen = []
        for item in Ahead(pool, work, range(40), 3):
            seen.append(item)
            with lock:
                alive -= 1
    assert seen == list(range(40))
    assert 1 < most <= 4  # three begun, one in the consumer's hands


def test_ahead_raises_what_the_work_raised_and_begins_no_more() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise OSError("disk")
        return item

    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="disk"):
        list(Ahead(pool, work, range(100), 2))
    assert max(begun) <= 5


def test_slots_and_neighbours_do_not_matter_on_a_cpu(pack_path: Path) -> None:
    """What a GPU worker measures when it starts; here it must be nothing."""
    with PackReader(pack_path) as pack:
        encoder = build_encoder("depth_anything3", ENCODERS["depth_anything3"], pack.info.contract)
        assert slot_deviation(encoder, pack.frames([0, 7, 20])) == 0.0
        honest = encoder.encode

        def leaky(frames: Any) -> torch.Tensor:  # a slot that changes its token
            tokens = honest(frames)
            tokens[1] += 0.25
            return tokens

        encoder.encode = leaky  # type: ignore[method-assign]
        assert slot_deviation(encoder, pack.frames([0, 7, 20])) == pytest.approx(0.25, rel=1e-4)

        def broken(frames: Any) -> torch.Tensor:  # a slot that gives no number
            tokens = honest(frames)
            tokens[1, 0, 0] = float("nan")
            return tokens

        encoder.encode = broken  # type: ignore[method-assign]
        assert slot_deviation(encoder, pack.frames([0, 7, 20])) > 1e38


def _commit(shard: int, rows: int, **seconds: float) -> ShardCommit:
    statistics = ShardStatistics(min=0.0, max=1.0, mean_norm=1.0, non_finite=0)
    nothing: dict[str, Any] = {"cache_id": "", "digests": {}, "sizes": {}}
    return ShardCommit(shard=shard, first_row=0, rows=rows, statistics=statistics, seconds=seconds, **nothing)


def test_what_a_run_tells(tmp_path: Path) -> None:
    """Rows of unfinished shards count once; a worker that is replaced is named; the log is JSON line by line."""
    seen: list[tuple[int, int, str]] = []
    log = RunLog(tmp_path, lambda done, rows, text="": seen.append((done, rows, text)), rows=100, done=20)
    state = {"worker": "a:1", "shards": {2: 7, 3: 0}, "seconds": {"decode": 1.0, "encode": 3.0}, "slot_deviation": None}
    log.watch([state, None])
    assert seen[-1][:2] == (27, 100)
    assert "encode 75%" in seen[-1][2]
    assert "2:7 3:0" in seen[-1][2]
    log.watch([{**state, "shards": {2: 20}}, None])
    log.shard(_commit(2, 20, encode=4.0), {23: "bad"}, "a:1")
    assert seen[-1][0] == 40
    log.watch([{**state, "worker": "a:9", "shards": {}, "slot_deviation": 0.5}, None])
    assert log.slot_deviation == 0.5
    log.watch(
        [{**state, "worker": "a:9", "shards": {}, "slot_deviation": 0.75}, None]
    )  # measured after it was heard of
    assert log.slot_deviation == 0.75
    events = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [event["event"] for event in events] == ["worker", "shard", "masked", "worker", "worker lost"]
    assert (events[-1]["worker"], events[-1]["shards"]) == ("a:1", [2])
    assert log.busy_seconds["encode"] == 4.0  # of finished shards, whatever was polled last


def test_the_rate_counts_every_row_once_and_no_shutdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards in work; what a worker says is older than the shards that are finished."""
    clock = 100.0
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: clock)
    log = RunLog(tmp_path, nothing, rows=48, done=0)
    said = {"worker": "a:1", "shards": {0: 0, 1: 0}, "seconds": {}, "slot_deviation": None}
    log.watch([said])
    clock = 104.0
    log.watch([{**said, "shards": {0: 20, 1: 20}}])
    assert log.rows_per_second == 10.0
    log.shard(_commit(0, 24), {}, "a:1")
    log.watch([{**said, "shards": {0: 22, 1: 20}}])
    assert log.rows_per_second == 11.0
    clock = 106.0
    log.shard(_commit(1, 24), {}, "a:1")
    log.watch([{**said, "shards": {1: 23}}])
    clock = 109.0  # Ray is shut down
    assert log.rows_per_second == 8.0
