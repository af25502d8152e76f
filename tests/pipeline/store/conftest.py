"""A web server for caches behind URLs."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_server import Server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server over ``tmp_path``."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(tmp_path) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield running
        running.hold(0)
        running.shutdown()
        thread.join()
