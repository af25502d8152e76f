"""Stateful workers on Ray, with everything bounded: resources that are missing, starts that hang, workers that die.

Ray itself waits for ever for CPUs a cluster does not have and for actors that die at every start; here each is an error
that says what to do. One worker of a small job needs no Ray: it runs in the calling process.
"""

import logging
import os
import socket
import sys
import time
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
_WATCH_SECONDS = 1.0
_LOOK = "look"

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
    cpus_each: int = 1
    gpus_each: float = 0.0  # of one GPU, or several
    address: str | None = None  # an existing cluster; None: a local one for this run
    tasks_each: int = 2  # in flight per worker: one running, one waiting, so that no worker idles
    always_ray: bool = False  # also for a single local worker
    at_once: int = 1  # tasks a watched worker does side by side, in threads
    # Called about every second with what each worker's ``state()`` said last; None: it has not answered since it began.
    watch: Callable[[list[Any]], None] | None = None


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
    with ray_session(pool.address, pool.count * pool.cpus_each) as ray:
        yield from _on_ray(ray, worker_class, arguments, tasks, pool)


def _on_ray(
    ray: Any, worker_class: Callable[..., Worker[T, R]], arguments: tuple[Any, ...], tasks: list[T], pool: Pool
) -> Iterator[tuple[T, R]]:
    _require_resources(ray, pool)
    # Without a look at them, workers keep to one thread: a renderer's context belongs to the thread that made it.
    threads = {"max_concurrency": pool.at_once, "concurrency_groups": {_LOOK: 1}} if pool.watch is not None else {}
    actor_class = ray.remote(
        num_cpus=pool.cpus_each,
        num_gpus=pool.gpus_each,
        max_restarts=_WORKER_RESTARTS,
        max_task_retries=_TASK_RETRIES,
        **threads,
    )(worker_class)
    workers = [actor_class.remote(*arguments) for _ in range(pool.count)]
    idle = deque(workers * pool.tasks_each)
    running: dict[Any, tuple[Any, T]] = {}

    def hand_out() -> None:
        while tasks and idle:
            worker, task = idle.popleft(), tasks.pop(0)
            running[worker.run.remote(task)] = worker, task

    try:
        states = _start(ray, workers, pool)
        watch = _Watch(ray, workers, states, pool.watch) if pool.watch is not None else None
        hand_out()
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=_WATCH_SECONDS if watch else None)
            if watch:
                watch.look()
            if not done:
                continue
            (finished,) = done
            worker, task = running.pop(finished)
            idle.append(worker)
            if pool.tasks_each > 1:
                hand_out()
            yield task, _get(ray, finished, pool, task)
            hand_out()
    finally:
        # A local Ray ends with this block anyway; to kill workers in the middle of tasks makes it speak of retries.
        if pool.address is not None or not running:
            for worker in workers:
                ray.kill(worker)


class _Watch:
    """Asks workers how they are doing, and never waits for one that does not answer."""

    def __init__(self, ray: Any, workers: list[Any], said: list[Any], tell: Callable[[list[Any]], None]) -> None:
        self._ray, self._workers, self._said, self._tell = ray, workers, said, tell
        self._asked: dict[Any, int] = {}
        self._next = 0.0
        self._tell(list(said))

    def look(self) -> None:
        """Tell what was answered; about once a second, whenever it is called."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _WATCH_SECONDS
        answered, _ = (
            self._ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        )
        for reference in answered:
            number = self._asked.pop(reference)
            try:
                self._said[number] = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                self._said[number] = None  # it died; what it says of its task is told by that task
        for number in set(range(len(self._workers))) - set(self._asked.values()):
            asked = self._workers[number].state.options(concurrency_group=_LOOK, max_task_retries=0).remote()
            self._asked[asked] = number
        self._tell(list(self._said))


@contextmanager
def ray_session(address: str | None, cpus: int) -> Iterator[Any]:
    """Ray for the length of a block: an existing cluster by address, or a local one on loopback with these CPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    if address is not None:
        _require_reachable(address)
    local: dict[str, Any] = {"num_cpus": max(cpus, 1), "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
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
    for resource, each in (("CPU", pool.cpus_each), ("GPU", pool.gpus_each)):
        found = float(ray.cluster_resources().get(resource, 0))
        if found < pool.count * each:
            possible = int(found / each)
            raise InputError(
                f"the Ray cluster has too few {resource}s for {pool.count} workers",
                expected=f"{pool.count * each:g} {resource}s",
                found=f"{found:g}",
                fix=f"--workers {possible}"
                if possible
                else "use a machine or a cluster that has one, or --set device=cpu",
            )


def _start(ray: Any, workers: list[Any], pool: Pool) -> list[Any]:
    """Wait until every worker is ready, and what it says; a busy cluster must not look like a slow one."""
    ready = [worker.start.remote() for worker in workers]
    done, late = ray.wait(ready, num_returns=len(ready), timeout=_START_SECONDS)
    said = [_get(ray, reference, pool) for reference in done]
    if late:
        raise InputError(
            f"{len(late)} of {len(workers)} workers did not start within {_START_SECONDS:.0f} s",
            expected="free CPUs (and GPUs) for every worker",
            found=f"free now: {ray.available_resources()}",
            fix="wait until the cluster is free (ray status), or use fewer --workers",
        )
    return said


def _get(ray: Any, reference: Any, pool: Pool, task: object = None) -> Any:
    """A worker's result, or its error as it was raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as problem:
        if isinstance(problem.cause, GeomcacheError | OSError):
            raise problem.cause from problem
        raise
    except ray.exceptions.RayError as problem:
        raise InputError(
            f"{pool.what} died again and again" + (f" over task {task}" if task is not None else ""),
            expected=f"at most {_TASK_RETRIES} deaths over one task, {_WORKER_RESTARTS} in all",
            found=str(problem).splitlines()[0],
            fix=pool.advice,
        ) from problem
