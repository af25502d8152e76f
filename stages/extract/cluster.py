"""What a Ray cluster has, and whether all of its machines share the folders of a run."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.devices import resolve_device
from geomcache.pipeline.files import TEMPORARY_SUFFIX, make_folder
from geomcache.pipeline.ray_workers import ray_session

_PROBE_SECONDS = 120.0
_MOST_CPUS = 8  # more threads than that do not decode faster than a GPU takes


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connected to the cluster at ``address`` for the length of a block; nothing happens without an address."""
    if address is None:
        yield
        return
    with ray_session(address, 1):
        yield


def device_of_cluster(name: str) -> str:
    """``auto`` -> ``cuda`` where the connected cluster has GPUs; this machine need not have one."""
    if name != "auto":
        return name if name.startswith("cuda") else resolve_device(name)
    return "cuda" if _resource("GPU") else "cpu"


def worker_shape(workers: int | None, cpus: int | None, gpus: float, device: str, *, local: bool) -> tuple[int, int]:
    """(workers, CPUs of each): what was asked for, or as many as there are GPUs.

    Args:
        workers: asked for; None: one for each GPU (or share of one), one on a CPU.
        cpus: asked for each; None: 1, and beside a GPU an equal part of all cores, at most 8.
        gpus: GPUs of a worker, if it has any.
        device: "cpu" or "cuda".
        local: on this machine, not on the connected cluster.
    """
    if not device.startswith("cuda"):
        return workers or 1, cpus or 1
    if local:
        import torch

        all_gpus, all_cpus = float(torch.cuda.device_count()), float(os.cpu_count() or 1)
    else:
        all_gpus, all_cpus = _resource("GPU"), _resource("CPU")
    workers = workers or max(1, int(all_gpus / gpus))
    return workers, cpus or max(1, min(_MOST_CPUS, int(all_cpus) // workers))


def _resource(name: str) -> float:
    return float(_ray().cluster_resources().get(name, 0.0))


def _ray() -> Any:
    import ray

    return ray


def require_shared_folders(out: Path, pack: Path) -> None:
    """Let every node of the connected cluster read a file in ``out``, write one beside it, and find the pack.

    Raises:
        InputError: a node sees another ``out``, cannot write there, or has not the pack; it is named.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray = _ray()
    make_folder(out)
    secret = uuid.uuid4().hex
    probe = out / f".probe.{secret}{TEMPORARY_SUFFIX}"
    probe.write_text(secret)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0, max_retries=2)(_look_from_node)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            str(probe.resolve()), secret, str(pack.resolve()), node["NodeID"]
        ): node
        for node in nodes
    }
    try:
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_PROBE_SECONDS)
        wrong = {asked[reference]["NodeID"]: "did not answer" for reference in late}
        for reference in done:
            node = asked[reference]["NodeID"]
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as problem:
                answer = str(problem).splitlines()[0]
            try:
                (out / _answer_name(secret, node)).unlink()
            except FileNotFoundError:
                answer = answer or "what it wrote there is not seen here"
            if answer is not None:
                wrong[node] = answer
    finally:
        probe.unlink(missing_ok=True)
    # A machine that left meanwhile is no matter; Ray takes a moment to notice.
    names = {node["NodeID"]: _address(node) for node in ray.nodes() if node["Alive"]}
    wrong = {names[node]: problem for node, problem in wrong.items() if node in names}
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(nodes)} machines of the cluster do not share the folders of this run",
            expected=f"{out} and {pack} on a file system that every machine mounts at the same path",
            found="; ".join(f"{node}: {problem}" for node, problem in sorted(wrong.items())),
            fix="choose folders on the shared file system, or take those machines out of the cluster",
        )


def _address(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def _answer_name(secret: str, node: str) -> str:
    return f".probe.{secret}.{node}{TEMPORARY_SUFFIX}"


def _look_from_node(probe: str, secret: str, pack: str, node: str) -> str | None:
    """Runs on a node: what is wrong with the folders as it sees them; None when nothing is."""
    try:
        if Path(probe).read_text() != secret:
            return "another file of the probe's name"
        Path(probe).with_name(_answer_name(secret, node)).write_text(secret)
    except OSError as problem:
        return str(problem)
    return None if Path(pack).is_dir() else f"there is no {pack}"
