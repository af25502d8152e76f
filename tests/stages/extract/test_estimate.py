"""What an extraction will take, against what it then takes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from geomcache.cache_schemas.errors import InputError
from geomcache.stages.extract import estimate as estimate_module
from geomcache.stages.extract.estimate import estimate, require_bytes, require_room
from geomcache.stages.extract.plan import make_plan
from tests.conftest import ENCODERS
from tests.stages.extract.test_engine import _config as engine_config
from tests.stages.extract.test_engine import _work as work


@pytest.fixture
def estimates(pack_path: Path, tmp_path: Path) -> Any:
    def of(codec: str | None, **settings: Any) -> Any:
        config = engine_config(pack_path, tmp_path / f"cache {codec}", codec=codec, **settings)
        return config, estimate(make_plan(config, rough=True))

    return of


@pytest.mark.parametrize("codec", ["bf16", "int8", "lossless"])
def test_the_estimate_of_bytes_is_what_extraction_writes(estimates: Any, codec: str) -> None:
    config, found = estimates(codec)
    assert not config.out.exists()
    assert not list(config.out.parent.glob(".probe*"))
    work(config)
    written = sum(file.stat().st_size for file in config.out.glob("*/c/**/*") if file.is_file())
    # a few bytes of each shard's index; what compresses is only sampled
    assert found.bytes_to_write == pytest.approx(written, rel=0.1 if codec == "lossless" else 0.02)
    assert found.token_bytes == 25 * 4 * 2 * 4 * 64
    assert found.gflop_per_row > 0
    assert found.rows_per_second < 1000 / found.encode_ms  # a core does the rest too
    again = estimate(make_plan(config, rough=True))
    assert (again.shards_done, again.bytes_to_write) == (4, 0)


def test_the_estimate_reckons_with_other_rows_and_devices(pack_path: Path, tmp_path: Path) -> None:
    plan = make_plan(engine_config(pack_path, tmp_path / "cache"), rough=True)
    found = estimate(plan, rows=273465, tflops=0.001)
    assert (found.rows, found.shards) == (273465, 34184)
    assert found.device_hours == pytest.approx(273465 * found.gflop_per_row / 3600, rel=0.01)  # 1 GFLOP/s sustained
    assert found.hours[8] == pytest.approx(found.hours[1] / 8, rel=1e-3)
    few = estimate(plan, tflops=1e-6)  # 4 shards: more workers than that have nothing to do
    assert few.hours[64] == few.hours[8] == pytest.approx(few.hours[1] * 8 / 25, rel=1e-3)


def test_only_what_is_missing_must_fit(pack_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last shard has one row: a resume needs room for one."""
    config = engine_config(pack_path, tmp_path / "cache")
    work(config)
    (config.out / "commits/000003.json").unlink()
    plan = make_plan(config)
    assert estimate(plan).bytes_to_write == 1044
    monkeypatch.setattr(estimate_module, "free_bytes", lambda _: 1044)
    require_room(plan)


def test_a_pack_smaller_than_a_batch_and_a_compiled_encoder_can_be_estimated(
    pack_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(pack_path, tmp_path / "cache")
    large = {**ENCODERS["depth_anything3"], "batch_size": 40}
    found = estimate(make_plan(config.model_copy(update={"encoder_config": large})))
    assert found.probe_rows == 25
    assert found.decode_ms > 0
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: real(function, backend="eager", **settings))
    compiled = {**ENCODERS["depth_anything3"], "compile": True}
    assert estimate(make_plan(config.model_copy(update={"encoder_config": compiled}))).gflop_per_row > 0


def test_what_cannot_fit_is_refused_before_anything_is_written(
    pack_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(engine_config(pack_path, tmp_path / "cache"))
    require_room(plan)
    monkeypatch.setattr(estimate_module, "free_bytes", lambda _: 10_000)
    with pytest.raises(InputError, match=r"cannot fit on the disk[^$]*26\.1 kB free[^$]*10 kB"):
        require_room(plan)
    with pytest.raises(InputError, match="cannot fit"):
        require_bytes(tmp_path / "not/there", 10_001)
    assert not (tmp_path / "cache").exists()
