"""Readers across fork, spawn, threads and DataLoader workers: right rows, and nothing hangs."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from geomcache.pipeline.store.reader import open_manifest
from geomcache.pipeline.store.statistics import shard_statistics
from geomcache.pipeline.store.writer import commit_shard, create_or_open
from geomcache.pipeline.tokens import build_codec
from tests.faults.conftest import Tally
from tests.faults.jobs import ROOT

CODECS = ("lossless", "int8", "bf16")
HANG_SECONDS = 90  # of a whole script, on a busy machine


Wide = Callable[[str], Path]


@pytest.fixture(scope="session")
def wide(undisturbed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Wide:
    """256 shards of a row, large enough for threads inside torch and blosc; all of row r is (97 r mod 256) / 256."""
    folder = tmp_path_factory.mktemp("wide")

    @cache
    def make(codec_name: str) -> Path:
        small = open_manifest(undisturbed[codec_name])
        spec = small.recipe.spec.model_copy(update={"grid": (64, 64)})
        codec = build_codec(spec)
        recipe = small.recipe.model_copy(update={"spec": spec})
        update = {"recipe": recipe, "rows": 256, "rows_per_shard": 1, "arrays": codec.arrays()}
        manifest = small.model_copy(update=update)
        create_or_open(folder / codec_name, manifest, "# card")
        for shard in range(manifest.shards):
            tokens = torch.full((1, *spec.row_shape), shard * 97 % 256 / 256)
            stored = codec.encode(tokens)
            statistics = shard_statistics(codec, tokens, stored)
            commit_shard(folder / codec_name, manifest, shard, stored, statistics=statistics, seconds={})
        return folder / codec_name

    return make


_BEGIN = """
import faulthandler, multiprocessing, os, pickle, random, resource, signal, sys, threading
import numpy, torch
from geomcache.pipeline.store.reader import CachedTokens

faulthandler.register(signal.SIGALRM, chain=True)  # whoever hangs says where, and dies; a timer of faulthandler's own
signal.alarm(40)                                   # would itself hang after a fork
torch.set_num_threads(2)  # as in a training process; its threads do not survive a fork
cache = sys.argv[1]

def right(reader, seed, batch=24):
    rows = random.Random(seed).sample(range(len(reader)), batch)
    tokens = reader.tokens(rows).numpy()  # numpy from here on: in a forked child torch itself may wait for ever
    error = abs(tokens - (numpy.array(rows) * 97 % 256)[:, None, None, None] / 256)
    assert error.max() <= (0.02 if "int8" in cache else 0), (rows, error.max(axis=(1, 2, 3)))
    return True

def wait(children):
    for child in children:
        assert os.waitpid(child, 0)[1] == 0

def fork(work):
    child = os.fork()
    if not child:
        signal.alarm(25)
        os._exit(0 if work() else 1)
    return child

def in_threads(count, work):
    failures = []
    def run(number):
        try:
            work(number)
        except BaseException as problem:
            failures.append(repr(problem))
    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failures, failures[0]
"""

SCRIPTS = {
    "fork while threads read": """
reader, stop = CachedTokens(cache, threads=4), threading.Event()
def read_on(number):
    while not stop.is_set():
        right(reader, number, 6)
readers = threading.Thread(target=in_threads, args=(3, read_on))
readers.start()
for seed in range(3):
    wait([fork(lambda: right(reader, seed))])
stop.set(); readers.join()
""",
    "fork after reading": """
reader = CachedTokens(cache, threads=4)
right(reader, 0)
children = [fork(lambda: right(reader, seed) and right(reader, seed + 50)) for seed in range(1, 5)]
right(reader, 5)  # the parent goes on
wait(children)
def child_of(reader, seed):
    signal.alarm(25)
    sys.exit(0 if right(reader, seed) else 1)
context = multiprocessing.get_context("fork")
children = [context.Process(target=child_of, args=(reader, seed)) for seed in range(3)]
for child in children: child.start()
for child in children:
    child.join()
    assert child.exitcode == 0
again = pickle.loads(pickle.dumps(reader))
assert right(again, 1)
again.close(); reader.close()
""",
    "8 threads, 64 descriptors, 256 shards": """
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
reader = CachedTokens(cache, threads=8)
in_threads(8, lambda number: [right(reader, 100 * number + step, 32) for step in range(4)])
reader.close()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # for good
reader = CachedTokens(cache, threads=8)
in_threads(8, lambda number: [right(reader, 100 * number + step, 32) for step in range(4)])
assert right(reader, 1, 256)
assert len(os.listdir("/proc/self/fd")) < 64
""",
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_readers_in_other_processes_and_threads(
    what: str, wide: Wide, size: Callable[[int, int], int], tally: Tally
) -> None:
    for codec in CODECS[: size(1, 3)]:
        _run("-c", _BEGIN + SCRIPTS[what], str(wide(codec)))
        tally.add(what, tried=1, detected=1, lost=[])


_MODULE = """
import faulthandler, random, signal, sys
import torch
from torch.utils.data import DataLoader, Dataset
from geomcache.pipeline.store.reader import CachedTokens

class Rows(Dataset):
    def __init__(self, cache):
        self.reader = CachedTokens(cache, threads=4)
        self.reader.tokens([0, 50, 255])     # used in the parent first
    def __len__(self):
        return len(self.reader)
    def __getitem__(self, row):
        return row, self.reader.tokens([row])[0]

if __name__ == "__main__":
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(80)
    torch.set_num_threads(2)
    order = random.Random(1).sample(range(256), 96)
    for context in ("fork", "spawn"):
        seen = []
        loader = DataLoader(Rows(sys.argv[1]), batch_size=16, sampler=order, num_workers=2,
                            multiprocessing_context=context, timeout=60)
        for rows, tokens in loader:
            seen += rows.tolist()
            error = tokens - (rows * 97 % 256)[:, None, None, None] / 256
            assert error.abs().max() <= (0.02 if "int8" in sys.argv[1] else 0)
        assert seen == order
"""


def test_data_loader_workers_in_both_ways(
    wide: Wide, size: Callable[[int, int], int], tmp_path: Path, tally: Tally
) -> None:
    (tmp_path / "loader.py").write_text(_MODULE)
    for codec in CODECS[: size(1, 3)]:
        _run(str(tmp_path / "loader.py"), str(wide(codec)))
        tally.add("DataLoader workers, fork and spawn", tried=2, detected=2, lost=[])


def _run(*arguments: str) -> None:
    found = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=HANG_SECONDS, check=False, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr[-3000:]
