"""Faults on purpose: options, sizes, and the table of what was tried, detected and lost.

``pytest tests/faults`` is the size for every change; ``pytest tests/faults --torture`` (``make torture``) that of a
release. ``--seed`` repeats a run; another seed tries other places and moments.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import build_pack_at
from tests.faults.jobs import ROOT, extract

TORTURE_SECONDS = 3600  # for one test
LOSSES_SHOWN = 20
REPORT = ROOT / "runs" / "torture" / "faults.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", default=False, help="hundreds of faults instead of a few")
    parser.addoption("--seed", type=int, default=0, help="of the places and moments of faults")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("torture", default=False):
        for item in items:
            item.add_marker(pytest.mark.timeout(TORTURE_SECONDS))


@dataclass
class Line:
    """One kind of fault."""

    tried: int = 0
    detected: int = 0  # noticed by name, or healed; whichever the fault calls for
    lost: list[str] = field(default_factory=list)  # what went wrong, with the place
    seconds: float = 0.0


class Tally:
    """Counts of all tests, for the summary."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self._since = time.perf_counter()

    def add(self, fault: str, *, tried: int, detected: int, lost: list[str]) -> None:
        line = self.lines.setdefault(fault, Line())
        line.tried, line.detected, line.lost = line.tried + tried, line.detected + detected, line.lost + lost
        line.seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()

    def begin(self) -> None:
        self._since = time.perf_counter()


TALLY = pytest.StashKey[Tally]()


@pytest.fixture
def tally(pytestconfig: pytest.Config) -> Tally:
    """Where a test writes its counts, before it asserts that nothing was lost."""
    found = pytestconfig.stash.setdefault(TALLY, Tally())
    found.begin()
    return found


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("seed", default=0))


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> np.random.Generator:
    """Of this test alone, so that a test can be repeated by itself."""
    return np.random.default_rng([seed, *request.node.name.encode()])


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """``size(few, many)``: how often, now and with --torture."""
    torture = pytestconfig.getoption("torture", default=False)
    return lambda few, many: many if torture else few


@pytest.fixture(scope="session")
def pack(demo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 rows in 7 shards."""
    return build_pack_at(demo_file, tmp_path_factory.mktemp("fault packs") / "pack", rows_per_shard=4)


@pytest.fixture(scope="session")
def undisturbed(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A complete cache per codec, made without any fault: not to be touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for codec in ("bf16", "int8", "lossless"):
        extract(pack, folder / codec, codec)
    return {path.name: path for path in folder.iterdir()}


@dataclass(frozen=True)
class Answer:
    """Of a command: what a user sees."""

    code: int
    out: str
    err: str


@pytest.fixture
def geomcache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command line's own entry point in this process; a traceback fails the test."""
    from geomcache.stages.cli.app import main

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["geomcache", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as ending:
            code = ending.code or 0
        return Answer(code, *capsys.readouterr())

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    tally = config.stash.get(TALLY, None)
    if tally is None:
        return
    seed, torture = config.getoption("seed", default=0), config.getoption("torture", default=False)
    terminalreporter.section(f"faults, seed {seed}{', torture' if torture else ''}")
    terminalreporter.line(f"{'fault':<44}{'tried':>7}{'detected':>10}{'lost':>6}{'seconds':>9}")
    for name, line in sorted(tally.lines.items()):
        row = f"{name:<44}{line.tried:>7}{line.detected:>10}{len(line.lost):>6}{line.seconds:>9.1f}"
        terminalreporter.line(row, red=bool(line.lost))
        for loss in line.lost[:LOSSES_SHOWN]:
            terminalreporter.line(f"    {loss}")
    if torture:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        lines = {name: vars(line) for name, line in sorted(tally.lines.items())}
        REPORT.write_text(json.dumps({"seed": seed, "faults": lines}, indent=2) + "\n")
        terminalreporter.line(f"written: {REPORT.relative_to(ROOT)}")
