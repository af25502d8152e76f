"""Starts the ranks of one machine for ``geomcache train --processes N`` and stays until they end.

torchrun kills ranks 30 seconds after a signal, which is less than a checkpoint of a large model takes; here a signal is
passed on and the ranks have the time they need. Several machines: ``accelerate launch`` with the same files.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from geomcache.stages.cli.common import EXIT_MISTAKE, say

# A rank that is still importing when Ctrl-C comes ends without a traceback; training has handlers of its own.
# One whose launcher is killed is asked to save and end by the kernel (PR_SET_PDEATHSIG = 1).
_RANK = (
    "import ctypes, os, runpy, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(os.environ['GEOMCACHE_LAUNCHER']) or sys.exit(143); "
    "runpy.run_module('geomcache.stages.train.run', run_name='__main__', alter_sys=True)"
)
KILLED = 128 + signal.SIGKILL
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LOOK_SECONDS = 0.2
_GRACE_SECONDS = 15.0  # for the other ranks when one has failed


def needs_ranks(processes: int, strategy: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether ranks must be started: several, or a strategy that needs its environment; not inside a rank."""
    return "RANK" not in environment and (processes > 1 or strategy != "ddp")


def strategy_environment(strategy: str) -> dict[str, str]:
    """What ``accelerate launch --config_file configs/accelerate/<strategy>.yaml`` would tell the ranks."""
    text = resources.files("geomcache.configs").joinpath(f"accelerate/{strategy}.yaml").read_text()
    settings: dict[str, Any] = yaml.safe_load(text)
    found = {name.upper(): str(value) for name, value in settings.get("fsdp_config", {}).items()}
    if (classes := found.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP", None)) is not None:
        found["FSDP_TRANSFORMER_CLS_TO_WRAP"] = classes  # the one key that accelerate's launcher gives another name
    found |= {f"ACCELERATE_DEEPSPEED_{k.upper()}": str(v) for k, v in settings.get("deepspeed_config", {}).items()}
    switch = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}.get(settings["distributed_type"])
    return found | ({switch: "true"} if switch else {})


def run_ranks(config_file: Path, processes: int, strategy: str, *, cpu: bool) -> int:
    """Train with ``processes`` ranks; returns 0, or the exit code of the rank that explains the end of all.

    A rank that fails ends the others; SIGTERM, SIGUSR1 and SIGINT go to all of them. Rank 0 speaks at once, another
    rank only when it is the one that explains.
    """
    shared = {
        **os.environ,
        **strategy_environment(strategy),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "GEOMCACHE_LAUNCHER": str(os.getpid()),
        "MASTER_PORT": str(_free_port()),
    }
    if cpu:
        shared["ACCELERATE_USE_CPU"] = "true"
        shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-c", _RANK, str(config_file)]
    with ExitStack() as files:
        told = [files.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        ranks = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                stderr=told[r] if r else None,
                start_new_session=True,  # Ctrl-C reaches them once, from here
            )
            for r in range(processes)
        ]
        ended = _wait(ranks)
        codes = [128 - rank.returncode if rank.returncode < 0 else rank.returncode for rank in ranks]
        rank = culprit(codes, [ranks.index(one) for one in ended])
        if codes[rank] == KILLED:
            say(f"rank {rank} was killed (out of memory?); the same command continues from the last checkpoint")
        elif rank:
            told[rank].seek(0)
            say(told[rank].read().decode(errors="replace").rstrip())
    return codes[rank]


def culprit(codes: Sequence[int], ended: Sequence[int]) -> int:
    """The rank whose exit code explains the others': a named error, else a kill from outside, else any failure.

    Args:
        codes: of all ranks, as shells count; when one fails, the others lose their connection or are ended.
        ended: ranks that were killed here because another had failed.
    """

    def rank_of_explanations(rank: int) -> tuple[bool, bool, bool]:
        code = codes[rank]
        return code != EXIT_MISTAKE, code != KILLED or rank in ended, code == 0 or rank in ended

    return min(range(len(codes)), key=rank_of_explanations)


def _wait(ranks: "list[subprocess.Popen[bytes]]") -> "list[subprocess.Popen[bytes]]":
    """Until all have ended; returns those that had to be killed."""
    killed: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.returncode for rank in ranks):
                killed += _end(ranks)
            time.sleep(_LOOK_SECONDS)
    finally:
        killed += _end(ranks)
        for number, handler in before.items():
            signal.signal(number, handler)
    return killed


def _end(ranks: "list[subprocess.Popen[bytes]]") -> "list[subprocess.Popen[bytes]]":
    """Wait a little for the ranks that are left, then kill them; returns these."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    left = [rank for rank in ranks if rank.poll() is None]
    for rank in left:
        rank.kill()
        rank.wait()
    return left


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
