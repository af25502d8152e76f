"""Stateful workers on Ray, with everything bounded: resources that are missing, starts that hang, workers that die.

Ray itself waits for ever for CPUs a cluster does not have and for actors that die at every start; here each is an error
that says what to do. One worker of a small job needs no Ray: it runs in the calling process.
"""

import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from geomcache.cache_schemas.errors import GeomcacheError, InputError

_WORKER_RESTARTS = 5  # in all; a worker that the system kills at every start must end the run
_TASK_RETRIES = 3  # a task whose worker died is redone this often, so tasks must be harmless to repeat
_START_SECONDS = 900.0  # for loading weights on every machine
_CONNECT_SECONDS = 5.0

T = TypeVar("T")
R = TypeVar("R")
TaskT = TypeVar("TaskT", contravariant=True)
ResultT = TypeVar("ResultT", covariant=True)


class Worker(Protocol[TaskT, ResultT]):
    """What does the work. Everything heavy happens in ``start``, so that its errors arrive as they are."""

    def start(self) -> object: ...

    def run(self, task: TaskT) -> ResultT: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Pool:
    """How many workers, and where."""

    count: int
    what: str  # a worker's name in messages: "an extraction worker"
    advice: str  # what helps when workers die
    gpus: bool = False  # one for each worker
    address: str | None = None  # an existing cluster; None: a local one for this run
    tasks_each: int = 2  # in flight per worker: one running, one waiting, so that no worker idles
    always_ray: bool = False  # also for a single local worker


def run_tasks(
    worker_class: Callable[..., Worker[T, R]], arguments: tuple[Any, ...], tasks: list[T], pool: Pool
) -> Iterator[tuple[T, R]]:
    """Yield (task, result) as results arrive.

    Args:
        worker_class: built as ``worker_class(*arguments)`` in each worker's process.
        arguments: picklable.
        tasks: taken from the front; the consumer may insert more while it iterates.
        pool: see ``Pool``.

    Raises:
        InputError: no such cluster, too few CPUs or GPUs, workers that die again and again.
        GeomcacheError, OSError: what a worker raised.
    """
    if not tasks:
        return
    if pool.count == 1 and pool.address is None and not pool.always_ray:
        worker = worker_class(*arguments)
        try:
            worker.start()
            while tasks:
                task = tasks.pop(0)
                yield task, worker.run(task)
        finally:
            worker.close()
        return
    with ray_session(pool.address, pool.count) as ray:
        yield from _on_ray(ray, worker_class, arguments, tasks, pool)


def _on_ray(
    ray: Any, worker_class: Callable[..., Worker[T, R]], arguments: tuple[Any, ...], tasks: list[T], pool: Pool
) -> Iterator[tuple[T, R]]:
    _require_resources(ray, pool)
    actor_class = ray.remote(
        num_cpus=1, num_gpus=1 if pool.gpus else 0, max_restarts=_WORKER_RESTARTS, max_task_retries=_TASK_RETRIES
    )(worker_class)
    workers = [actor_class.remote(*arguments) for _ in range(pool.count)]
    idle = deque(workers * pool.tasks_each)
    running: dict[Any, tuple[Any, T]] = {}

    def hand_out() -> None:
        while tasks and idle:
            worker, task = idle.popleft(), tasks.pop(0)
            running[worker.run.remote(task)] = worker, task

    try:
        _start(ray, workers, pool)
        hand_out()
        while running:
            (finished,), _ = ray.wait(list(running), num_returns=1)
            worker, task = running.pop(finished)
            idle.append(worker)
            if pool.tasks_each > 1:
                hand_out()
            yield task, _get(ray, finished, pool)
            hand_out()
    finally:
        for worker in workers:
            ray.kill(worker)


@contextmanager
def ray_session(address: str | None, workers: int) -> Iterator[Any]:
    """Ray for the length of a block: an existing cluster by address, or a local one on loopback."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    if address is not None:
        _require_reachable(address)
    local: dict[str, Any] = {"num_cpus": max(workers, 1), "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    with redirect_stdout(sys.stderr):  # Ray prints its notices; standard output belongs to --json
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **({} if address else local))
        try:
            yield ray
        finally:
            ray.shutdown()


def _require_reachable(address: str) -> None:
    """Ray tries an address for minutes; ask once whether anything listens there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as problem:
        raise InputError(
            f"there is no Ray cluster at {address}",
            expected="HOST:PORT of a running cluster's head",
            found=str(problem),
            fix="ray start --head on that host, or leave ray_address out for a local one",
        ) from problem


def _require_resources(ray: Any, pool: Pool) -> None:
    """Ray waits for ever for what a cluster does not have; say so instead."""
    for resource, needed in (("CPU", pool.count), ("GPU", pool.count if pool.gpus else 0)):
        found = int(ray.cluster_resources().get(resource, 0))
        if found < needed:
            raise InputError(
                f"the Ray cluster has too few {resource}s for {pool.count} workers",
                expected=f"{needed} {resource}s",
                found=str(found),
                fix=f"--workers {found}" if found else "use a machine or a cluster that has one, or --set device=cpu",
            )


def _start(ray: Any, workers: list[Any], pool: Pool) -> None:
    """Wait until every worker is ready; a busy cluster must not look like a slow one."""
    ready = [worker.start.remote() for worker in workers]
    done, late = ray.wait(ready, num_returns=len(ready), timeout=_START_SECONDS)
    for reference in done:
        _get(ray, reference, pool)
    if late:
        raise InputError(
            f"{len(late)} of {len(workers)} workers did not start within {_START_SECONDS:.0f} s",
            expected="free CPUs (and GPUs) for every worker",
            found=f"free now: {ray.available_resources()}",
            fix="wait until the cluster is free (ray status), or use fewer --workers",
        )


def _get(ray: Any, reference: Any, pool: Pool) -> Any:
    """A worker's result, or its error as it was raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as problem:
        if isinstance(problem.cause, GeomcacheError | OSError):
            raise problem.cause from problem
        raise
    except ray.exceptions.RayError as problem:
        raise InputError(
            f"{pool.what} died again and again",
            expected=f"at most {_WORKER_RESTARTS} deaths",
            found=str(problem).splitlines()[0],
            fix=pool.advice,
        ) from problem
