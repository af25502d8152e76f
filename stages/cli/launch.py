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
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

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
    found |= {f"ACCELERATE_DEEPSPEED_{k.upper()}": str(v) for k, v in settings.get("deepspeed_config", {}).items()}
    switch = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}.get(settings["distributed_type"])
    return found | ({switch: "true"} if switch else {})


def run_ranks(config_file: Path, processes: int, strategy: str, *, cpu: bool) -> int:
    """Train with ``processes`` ranks; returns the first exit code that is not 0, or 0.

    A rank that fails ends the others; SIGTERM, SIGUSR1 and SIGINT go to all of them.
    """
    shared = {
        **os.environ,
        **strategy_environment(strategy),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    if cpu:
        shared["ACCELERATE_USE_CPU"] = "true"
        shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "geomcache.stages.train.run", str(config_file)]
    with tempfile.TemporaryFile() as told:  # by the other ranks: mostly what rank 0 says too
        ranks = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                stderr=told if r else None,
                start_new_session=True,  # Ctrl-C reaches them once, from here
            )
            for r in range(processes)
        ]
        _wait(ranks)
        codes = [128 - rank.returncode if rank.returncode < 0 else rank.returncode for rank in ranks]
        if codes[0] in (0, KILLED) and any(codes):  # rank 0 was only a victim
            told.seek(0)
            sys.stderr.write(told.read().decode(errors="replace"))
    return next((code for code in codes if code not in (0, KILLED)), max(codes))


def _wait(ranks: "list[subprocess.Popen[bytes]]") -> None:
    def pass_on(number: int, _frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.returncode for rank in ranks):
                _end(ranks)
            time.sleep(_LOOK_SECONDS)
    finally:
        _end(ranks)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(ranks: "list[subprocess.Popen[bytes]]") -> None:
    """Wait a little for the ranks that are left, then kill them."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
