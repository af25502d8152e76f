"""Who does the work of an evaluation, and how calls reach them: simulators and one policy, on Ray or in this process.

Calls are started and their answers collected later. A crew hides where its members run; what to ask whom is play.py's.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from geomcache.cache_schemas.errors import GeomcacheError
from geomcache.pipeline.ray_workers import Pool, ray_session, require_resources

POLICY = -1  # its number; simulators count from 0

Make = Callable[[], Any]  # builds a member cheaply, in the process where it works


class Broken(Exception):
    """A member died, was lost or raised what is no error of ours; it must be replaced."""


class Crew(Protocol):
    """Members by number; each does one call at a time."""

    @property
    def simulators(self) -> int: ...

    @property
    def can_replace(self) -> bool: ...  # a simulator that broke or hangs

    def call(self, who: int, method: str, *arguments: Any) -> None: ...  # starts it

    def answers(self, timeout: float) -> list[tuple[int, Any]]: ...  # what has arrived; an error is a value

    def replace(self, who: int) -> None: ...  # its call will not be answered


class LocalCrew:
    """One simulator and the policy in this process: no Ray, nobody replaces them."""

    simulators = 1
    can_replace = False

    def __init__(self, make_simulator: Make, make_policy: Make) -> None:
        self._members = {0: make_simulator(), POLICY: make_policy()}
        self._calls: deque[tuple[int, str, tuple[Any, ...]]] = deque()

    def call(self, who: int, method: str, *arguments: Any) -> None:
        """Keep it until somebody waits for answers."""
        self._calls.append((who, method, arguments))

    def answers(self, timeout: float) -> list[tuple[int, Any]]:  # noqa: ARG002 - the other crew waits
        """Do the oldest call now; its errors are raised as they are."""
        if not self._calls:
            return []
        who, method, arguments = self._calls.popleft()
        return [(who, getattr(self._members[who], method)(*arguments))]

    def replace(self, who: int) -> None:
        """Cannot be."""
        raise AssertionError(f"member {who} works in this process")

    def close(self) -> None:
        """Free the simulator and the weights."""
        for member in self._members.values():
            member.close()


class RayCrew:
    """Every member a Ray actor of its own. Use ``ray_crew``."""

    can_replace = True

    def __init__(self, ray: Any, simulators: int, make_simulator: Make, make_policy: Make, policy_gpus: float) -> None:
        self._ray, self.simulators = ray, simulators
        self._makes = {**dict.fromkeys(range(simulators), (make_simulator, 0.0)), POLICY: (make_policy, policy_gpus)}
        self._actors = {who: self._started(*how) for who, how in self._makes.items()}
        self._calls: dict[Any, int] = {}  # reference -> who

    def call(self, who: int, method: str, *arguments: Any) -> None:
        """Start a call."""
        self._calls[self._actors[who].call.remote(method, *arguments)] = who

    def answers(self, timeout: float) -> list[tuple[int, Any]]:
        """Wait for at least one; errors of ours as they were raised, ``Broken`` for everything else."""
        if not self._calls:
            return []
        ready, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=timeout)
        if ready:
            ready, _ = self._ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        return [(self._calls.pop(reference), self._value(reference)) for reference in ready]

    def replace(self, who: int) -> None:
        """End a process, hung or dead, and start another."""
        self._ray.kill(self._actors[who])
        self._calls = {reference: whose for reference, whose in self._calls.items() if whose != who}
        self._actors[who] = self._started(*self._makes[who])

    def close(self) -> None:
        """End every process."""
        for actor in self._actors.values():
            self._ray.kill(actor)

    def _started(self, make: Make, gpus: float) -> Any:
        return self._ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Member).remote(make)

    def _value(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as problem:
            if isinstance(problem.cause, GeomcacheError | OSError):
                return problem.cause
            where = re.findall(r'File "[^"]*?([^"/]+)", line (\d+)', str(problem))[-1:]
            told = f" ({':'.join(where[0])})" if where else ""
            return Broken(f"{type(problem.cause).__name__}: {problem.cause}{told}")
        except self._ray.exceptions.RayError as problem:
            return Broken(str(problem).splitlines()[0])


class _Member:
    """The actor: builds its member at the first call, so that errors arrive as they are."""

    def __init__(self, make: Make) -> None:
        self._make, self._member = make, None

    def call(self, method: str, *arguments: Any) -> Any:
        if self._member is None:
            self._member = self._make()
        return getattr(self._member, method)(*arguments)


@contextmanager
def ray_crew(
    simulators: int, make_simulator: Make, make_policy: Make, *, policy_gpus: float, address: str | None
) -> Iterator[RayCrew]:
    """A crew on a local Ray, or on the cluster at ``address``.

    Raises:
        InputError: no such cluster, or it has too few CPUs or GPUs.
    """
    with ray_session(address, simulators + 1) as ray:
        members = Pool(count=simulators + 1, what="an evaluation worker", advice="")
        require_resources(ray, members)
        if policy_gpus:
            require_resources(ray, Pool(count=1, what="the policy", advice="", cpus_each=0, gpus_each=policy_gpus))
        crew = RayCrew(ray, simulators, make_simulator, make_policy, policy_gpus)
        try:
            yield crew
        finally:
            crew.close()
