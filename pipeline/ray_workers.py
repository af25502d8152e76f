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
from typing import Any, Generic, Protocol, TypeVar

from geomcache.cache_schemas.errors import GeomcacheError, InputError

_WORKER_RESTARTS = 5  # in all; a worker that the system kills at every start must end the run
_TASK_RETRIES = 3  # a task whose worker died is redone this often, so tasks must be harmless to repeat
_START_SECONDS = 900.0  # for loading weights on every machine
_CONNECT_SECONDS = 5.0
_WATCH_SECONDS = 1.0
_LOST_SECONDS = 300.0  # without an answer; a worker that only restarts answers much sooner
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
        require_resources(ray, pool)
        yield from _Crew(ray, worker_class, arguments, tasks, pool).results()


class _Crew(Generic[T]):
    """The workers of a pool: what each is doing, and who is away.

    Workers that are watched may be on other machines. When one dies, or its machine does, its tasks are put back for
    whoever is free, and it gets new ones once it answers again. Ray would retry them there, three times in a second,
    and would wait for ever for a machine with room to start the worker again.
    """

    def __init__(
        self,
        ray: Any,
        worker_class: Callable[..., Worker[T, Any]],
        arguments: tuple[Any, ...],
        tasks: list[T],
        pool: Pool,
    ) -> None:
        self._ray, self._tasks, self._pool = ray, tasks, pool
        options: dict[str, Any] = {"max_task_retries": _TASK_RETRIES}
        if pool.watch is not None:
            # Others keep to one thread: a renderer's context belongs to the thread that made it.
            options = {"max_concurrency": pool.at_once, "concurrency_groups": {_LOOK: 1}}
        actor_class = ray.remote(
            num_cpus=pool.cpus_each, num_gpus=pool.gpus_each, max_restarts=_WORKER_RESTARTS, **options
        )(worker_class)
        self._workers = [actor_class.remote(*arguments) for _ in range(pool.count)]
        self._idle = deque(self._workers * pool.tasks_each)
        self._running: dict[Any, tuple[Any, T]] = {}
        self._away: dict[Any, float] = {}  # worker -> since when
        self._strikes: list[T] = []  # a task for each time that its worker died
        self._watch: _Watch | None = None

    def results(self) -> Iterator[tuple[T, Any]]:
        """Work through the tasks, and those that are added meanwhile."""
        try:
            states = _start(self._ray, self._workers, self._pool)
            if self._pool.watch is not None:
                self._watch = _Watch(self._ray, self._workers, states, self._pool.watch)
            while self._tasks or self._running:
                self._hand_out()
                finished = self._next_finished()
                if finished is None:
                    continue
                worker, task = self._running.pop(finished)
                try:
                    result = _get(self._ray, finished, self._pool, task)
                except _Died as death:
                    self._strike(worker, task, death)
                    continue
                if worker not in self._away:
                    self._idle.append(worker)
                if self._pool.tasks_each > 1:
                    self._hand_out()
                yield task, result
        finally:
            # A local Ray ends with this anyway; to kill workers in the middle of tasks makes it speak of retries.
            if self._pool.address is not None or not self._running:
                for worker in self._workers:
                    self._ray.kill(worker)

    def _hand_out(self) -> None:
        while self._tasks and self._idle:
            worker, task = self._idle.popleft(), self._tasks.pop(0)
            self._running[worker.run.remote(task)] = worker, task

    def _next_finished(self) -> Any:
        """A reference to a result; None when there is none yet."""
        if self._watch is None:
            return self._ray.wait(list(self._running), num_returns=1)[0][0]
        done: list[Any] = []
        if self._running:
            done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_WATCH_SECONDS)
        else:
            time.sleep(_WATCH_SECONDS)  # all are away
        self._watch.look()
        for worker in self._watch.lost():
            self._give_up(worker)
        for worker, since in list(self._away.items()):
            if self._watch.answered(worker) > since:
                del self._away[worker]
                busy = sum(whose is worker for whose, _ in self._running.values())
                self._idle.extend([worker] * (self._pool.tasks_each - busy))
        return done[0] if done and done[0] in self._running else None

    def _strike(self, worker: Any, task: T, death: "_Died") -> None:
        """A worker died over a task: the task goes back, the worker is away until it answers."""
        self._strikes.append(task)
        if self._watch is None or self._strikes.count(task) > _TASK_RETRIES:
            raise death.error from death
        self._tasks.insert(0, task)
        if death.for_good:
            self._watch.forget(worker)
            self._give_up(worker, death)
        elif worker not in self._away:
            self._away[worker] = time.monotonic()
            self._idle = deque(each for each in self._idle if each is not worker)

    def _give_up(self, lost: Any, death: "_Died | None" = None) -> None:
        """It never comes back: the others do its tasks."""
        self._ray.kill(lost)
        theirs = [reference for reference, (worker, _) in self._running.items() if worker is lost]
        self._tasks.extend(self._running.pop(reference)[1] for reference in theirs)
        self._idle = deque(worker for worker in self._idle if worker is not lost)
        self._away.pop(lost, None)
        if not (self._idle or self._running or self._away):
            raise death.error if death is not None else _all_lost(self._pool)


class _Died(Exception):
    """A worker's process ended while it had a task."""

    def __init__(self, error: InputError, for_good: bool) -> None:
        super().__init__(str(error))
        self.error, self.for_good = error, for_good


class _Watch:
    """Asks workers how they are doing, and never waits for one that does not answer."""

    def __init__(self, ray: Any, workers: list[Any], said: list[Any], tell: Callable[[list[Any]], None]) -> None:
        self._ray, self._tell = ray, tell
        self._said = dict(zip(workers, said, strict=True))
        self._answered = dict.fromkeys(workers, time.monotonic())  # when last; without those that were given up
        self._asked: dict[Any, Any] = {}  # reference -> worker
        self._next = 0.0
        tell(list(self._said.values()))

    def look(self) -> None:
        """Tell what was answered; about once a second, whenever it is called."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _WATCH_SECONDS
        ready = self._ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0] if self._asked else []
        for reference in ready:
            worker = self._asked.pop(reference)
            try:
                self._said[worker] = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                self._said[worker] = None  # it died; what becomes of its tasks they tell themselves
            else:
                if worker in self._answered:
                    self._answered[worker] = time.monotonic()
        for worker in self._answered.keys() - set(self._asked.values()):
            asked = worker.state.options(concurrency_group=_LOOK, max_task_retries=0).remote()
            self._asked[asked] = worker
        self._tell(list(self._said.values()))

    def answered(self, worker: Any) -> float:
        """When it answered last."""
        return self._answered.get(worker, 0.0)

    def lost(self) -> list[Any]:
        """Workers that have not answered for too long, each told once."""
        late = time.monotonic() - _LOST_SECONDS
        found = [worker for worker, when in self._answered.items() if when < late]
        for worker in found:
            self.forget(worker)
        return found

    def forget(self, worker: Any) -> None:
        """Ask it no more."""
        self._answered.pop(worker, None)
        self._said[worker] = None


@contextmanager
def ray_session(address: str | None, cpus: int) -> Iterator[Any]:
    """Ray for the length of a block: an existing cluster by address, or a local one on loopback with these CPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # it takes SIGTERM and Python's fault handler away
    import ray

    if ray.is_initialized():
        yield ray
        return
    if address is not None:
        _require_reachable(address)
    # "local": without an address Ray would join whatever cluster runs on this machine.
    local: dict[str, Any] = {"address": "local", "num_cpus": max(cpus, 1), "include_dashboard": False}
    local["_node_ip_address"] = "127.0.0.1"
    with redirect_stdout(sys.stderr):  # Ray prints its notices; standard output belongs to --json
        where = {"address": address} if address else local
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
        except (ValueError, ConnectionError, RuntimeError) as problem:
            if address is None:
                raise
            raise InputError(
                f"the Ray cluster at {address} cannot be joined",
                expected="HOST:PORT of a running cluster's head, or auto on one of its machines",
                found=f"{type(problem).__name__}: {str(problem).splitlines()[0]}",
                fix="ray status on that host; a cluster with tokens (Ray's default) needs RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH here",
            ) from problem
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


def require_resources(ray: Any, pool: Pool) -> None:
    """Ray waits for ever for what a cluster does not have; say so instead."""
    for resource, each in (("CPU", pool.cpus_each), ("GPU", pool.gpus_each)):
        found = float(ray.cluster_resources().get(resource, 0))
        if found < pool.count * each:
            possible = int(found / each)
            raise InputError(
                f"the Ray cluster has too few {resource}s for {pool.count} workers",
                expected=f"{pool.count * each:g} {resource}s",
                found=f"{found:g}",
                fix=f"--workers {possible}" if possible else _without(resource),
            )


def _without(resource: str) -> str:
    if resource == "GPU":
        return "use a machine or a cluster that has one, or --set device=cpu"
    return "--set cpus_per_worker=1, or a machine with more"


def _start(ray: Any, workers: list[Any], pool: Pool) -> list[Any]:
    """Wait until every worker is ready, and what it says; a busy cluster must not look like a slow one."""
    ready = [worker.start.options(max_task_retries=_TASK_RETRIES).remote() for worker in workers]
    done, late = ray.wait(ready, num_returns=len(ready), timeout=_START_SECONDS)
    try:
        said = [_get(ray, reference, pool) for reference in done]
    except _Died as death:
        raise death.error from death
    if late:
        raise InputError(
            f"{len(late)} of {len(workers)} workers did not start within {_START_SECONDS:.0f} s",
            expected="free CPUs (and GPUs) for every worker",
            found=f"free now: {ray.available_resources()}",
            fix="wait until the cluster is free (ray status), or use fewer --workers",
        )
    return said


def _all_lost(pool: Pool) -> InputError:
    return InputError(
        f"{pool.what} was lost, and there is no other",
        expected=f"an answer within {_LOST_SECONDS:.0f} s",
        found="none: its machine is gone, or the cluster has no room to start it again",
        fix="ray status says what the cluster has; the same command continues with what is finished",
    )


def _get(ray: Any, reference: Any, pool: Pool, task: object = None) -> Any:
    """A worker's result, or its error as it was raised; ``_Died`` when it ended instead."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as problem:
        if isinstance(problem.cause, GeomcacheError | OSError):
            raise problem.cause from problem
        raise
    except ray.exceptions.RayError as problem:
        error = InputError(
            f"{pool.what} died again and again" + (f" over task {task}" if task is not None else ""),
            expected=f"at most {_TASK_RETRIES} deaths over one task, {_WORKER_RESTARTS} of one worker",
            found=str(problem).splitlines()[0],
            fix=pool.advice,
        )
        raise _Died(error, for_good=isinstance(problem, ray.exceptions.ActorDiedError)) from problem
