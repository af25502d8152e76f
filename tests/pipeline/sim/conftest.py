"""One simulator for every test of this folder; each test resets it."""

from collections.abc import Iterator

import pytest

from geomcache.pipeline.sim.libero_env import LiberoEnv


@pytest.fixture(scope="session")
def env() -> Iterator[LiberoEnv]:
    """The first task of libero_object, 128 x 128, two cameras, depth."""
    with LiberoEnv("libero_object", 0) as made:
        yield made
