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
from geomcache.pipeline.tokens import build_encoder
from geomcache.stages.extract import estimate as estimate_module
from geomcache.stages.extract.estimate import estimate, require_bytes, require_room
from geomcache.stages.extract.plan import ExtractConfig, begin, make_plan
from geomcache.stages.extract.report import LOG_NAME, RunLog
from geomcache.stages.extract.stream import Ahead
from geomcache.stages.extract.worker import ShardWorker
from geomcache.stages.train.config import DataPair, TrainConfig
from geomcache.stages.train.data import TrainingData
from tests.conftest import ENCODERS, build_pack_at, nothing


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
    """A real encoder that refuses frames by their content, as the oracle refuses frames without depth."""

    def __init__(self, encoder: Any, refused: list[bytes]) -> None:
        self._encoder, self._refused, self.spec = encoder, refused, encoder.spec

    def encode(self, frames: Any) -> torch.Tensor:
        if any(image.tobytes() in self._refused for image in frames.images_BVHWC):
            raise RuntimeError("no surface\nsecond line")
        tokens: torch.Tensor = self._encoder.encode(frames)
        return tokens


def test_a_frame_the_encoder_refuses_is_found_among_its_neighbours(
    pack_path: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    for on_error in ("stop", "mask"):
        config = _config(pack_path, tmp_path / on_error, on_error=on_error)
        plan = begin(make_plan(config))
        worker = ShardWorker(pack_path, config.out, plan.manifest, "cpu", config.on_error)
        parts = worker._ready()
        with PackReader(pack_path) as pack:
            refused = [pack.images([row])[0].tobytes() for row in (9, 10)]
        parts.tokens._encoder = _Picky(parts.encoder, refused)  # type: ignore[assignment]
        if on_error == "stop":
            with pytest.raises(InputError, match=r"fails on row 9 .*step 1\), also by itself[^$]*no surface"):
                worker.run(1)
            assert not list(config.out.glob("commits/*"))
            assert not [path for path in config.out.glob("tokens/c/**/*") if path.is_file()]
        else:
            report = worker.run(1)
            assert report.masked == {9: "RuntimeError: no surface", 10: "RuntimeError: no surface"}
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
    parts.tokens._encoder = _Picky(parts.encoder, refused)  # type: ignore[assignment]
    with pytest.raises(InputError, match="no row of shard 0 can be read and encoded"):
        worker.run(0)
    worker.close()
    assert not list(config.out.glob("commits/*"))


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


def _commit(shard: int, rows: int) -> ShardCommit:
    statistics = ShardStatistics(min=0.0, max=1.0, mean_norm=1.0, non_finite=0)
    return ShardCommit(
        shard=shard, first_row=0, rows=rows, cache_id="", digests={}, sizes={}, statistics=statistics, seconds={}
    )


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
    log.shard(_commit(2, 20), {23: "bad"}, "a:1")
    assert seen[-1][0] == 40
    log.watch([{**state, "worker": "a:9", "shards": {}, "slot_deviation": 0.5}, None])
    assert log.slot_deviation == 0.5
    events = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [event["event"] for event in events] == ["worker", "shard", "masked", "worker", "worker lost"]
    assert (events[-1]["worker"], events[-1]["shards"]) == ("a:1", [2])
    assert log.busy_seconds["encode"] == 6.0  # of both workers


@pytest.fixture
def estimates(pack_path: Path, tmp_path: Path) -> Any:
    def of(codec: str | None, **settings: Any) -> Any:
        config = _config(pack_path, tmp_path / f"cache {codec}", codec=codec, **settings)
        return config, estimate(make_plan(config, rough=True))

    return of


@pytest.mark.parametrize("codec", ["bf16", "int8", "lossless"])
def test_the_estimate_of_bytes_is_what_extraction_writes(estimates: Any, codec: str) -> None:
    config, found = estimates(codec)
    assert not config.out.exists()
    assert not list(config.out.parent.glob(".probe*"))
    _work(config)
    written = sum(file.stat().st_size for file in config.out.glob("*/c/**/*") if file.is_file())
    # a few bytes of each shard's index; what compresses is only sampled
    assert found.bytes_to_write == pytest.approx(written, rel=0.1 if codec == "lossless" else 0.02)
    assert found.token_bytes == 25 * 4 * 2 * 4 * 64
    assert found.gflop_per_row > 0
    assert found.hours[8] == pytest.approx(found.hours[1] / 8, abs=1e-4)
    again = estimate(make_plan(config, rough=True))
    assert (again.shards_done, again.bytes_to_write) == (4, 0)


def test_the_estimate_reckons_with_other_rows_and_devices(pack_path: Path, tmp_path: Path) -> None:
    plan = make_plan(_config(pack_path, tmp_path / "cache"), rough=True)
    found = estimate(plan, rows=273465, tflops=0.001)
    assert (found.rows, found.shards) == (273465, 34184)
    assert found.device_hours == pytest.approx(273465 * found.gflop_per_row / 3600, rel=0.01)  # 1 GFLOP/s sustained


def test_what_cannot_fit_is_refused_before_anything_is_written(
    pack_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(_config(pack_path, tmp_path / "cache"))
    require_room(plan)
    monkeypatch.setattr(estimate_module, "free_bytes", lambda _: 10_000)
    with pytest.raises(InputError, match=r"cannot fit on the disk[^$]*26\.1 kB free[^$]*10 kB"):
        require_room(plan)
    with pytest.raises(InputError, match="cannot fit"):
        require_bytes(tmp_path / "not/there", 10_001)
    assert not (tmp_path / "cache").exists()
