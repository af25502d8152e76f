"""A real Ray cluster of two nodes on this machine: the same bytes as alone, folders that are not shared are named.

Non-obvious: the second node's processes see another, empty folder where the first one's output is: they run in a mount
namespace of their own, with a tmpfs over it. That needs the right to mount, which CI has; without it the test says so.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline import ray_workers
from geomcache.pipeline.ray_workers import Pool, ray_session, run_tasks
from geomcache.stages.extract.plan import ExtractConfig
from geomcache.stages.extract.run import run
from tests.conftest import ENCODERS, nothing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _can_mount() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-m", "true"]).returncode == 0


def _config(pack: Path, out: Path, address: str) -> ExtractConfig:
    return ExtractConfig(
        pack=pack,
        out=out,
        encoder="depth_anything3",
        encoder_config=ENCODERS["depth_anything3"],
        device="cpu",
        workers=2,
        ray_address=address,
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Head and one more node, one CPU each."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.skipif(not _can_mount(), reason="needs the right to mount")
def test_a_node_that_does_not_share_the_output_is_named(cluster: Any, pack_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    out.mkdir()
    ray = Path(sys.executable).with_name("ray")
    start = f"mount -t tmpfs none {out} && exec {ray} start --address={cluster.address} --num-cpus=1 --block"
    node = subprocess.Popen(["unshare", "-m", "sh", "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_nodes(cluster, 2)
        with pytest.raises(InputError, match=r"1 of 2 machines[^$]*No such file or directory"):
            run(_config(pack_path, out, cluster.address), nothing)
        assert not (out / "manifest.json").exists()
    finally:
        node.terminate()
        node.wait(20)
        _wait_for_nodes(cluster, 1)


class _Slow:
    """A worker whose tasks take a moment."""

    def start(self) -> dict[str, Any]:
        return self.state()

    def state(self) -> dict[str, Any]:
        return {}

    def run(self, task: int) -> int:
        time.sleep(0.5)
        return task

    def close(self) -> None: ...


def test_what_a_lost_machine_had_is_done_by_the_others(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker cannot start again anywhere: the other machine has one CPU. Ray alone would wait for ever."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(ray_workers, "_LOST_SECONDS", 4.0)
    node = cluster.add_node(num_cpus=1)
    with ray_session(cluster.address, 1):
        pool = Pool(count=2, what="a worker", advice="", address=cluster.address, at_once=2, watch=nothing)
        done = []
        for task, result in run_tasks(_Slow, (), list(range(16)), pool):
            assert task == result
            done.append(task)
            if len(done) == 4:
                cluster.remove_node(node, allow_graceful=False)
        assert sorted(done) == list(range(16))
    _wait_for_nodes(cluster, 1)


def test_two_nodes_that_share_the_folders(
    cluster: Any, pack_path: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1)
    out = tmp_path / "cache"
    result = run(_config(pack_path, out, cluster.address), nothing)
    assert (result.workers, result.rows_encoded) == (2, 25)
    assert not list(out.glob(".probe*"))
    nodes = {json.loads(line).get("worker") for line in (out / "extract.jsonl").read_text().splitlines()}
    assert len(nodes - {None}) == 2
    for shard in range(4):
        name = f"tokens/c/{shard}/0/0/0"
        assert (out / name).read_bytes() == (caches["depth_anything3"] / name).read_bytes()


def _wait_for_nodes(cluster: Any, count: int) -> None:
    import ray

    with ray_session(cluster.address, 1):
        for _ in range(100):
            if sum(node["Alive"] for node in ray.nodes()) == count:
                return
            time.sleep(0.2)
    raise AssertionError(f"the cluster does not come to {count} nodes")
