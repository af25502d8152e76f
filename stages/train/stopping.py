"""Signals that ask a run to stop: it saves first.

SIGTERM and SIGUSR1 (what schedulers send before they preempt) and SIGINT (Ctrl-C) are noted; the loop looks after every
optimiser step, all ranks together, writes a checkpoint and ends. A second Ctrl-C stops at once, without saving.
"""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class TrainingStopped(SystemExit):
    """The run was asked to stop and has saved. The exit code is 128 + the signal, as shells count.

    Args:
        number: of the signal.
        step: optimiser steps done and saved.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(128 + number)
        self.number, self.step = number, step
        self.text = f"stopped by {signal.Signals(number).name} after step {step}; saved, the same command continues"

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainingStopped, (self.number, self.step)


def ignore_signals(_worker: int) -> None:
    """In loader processes: schedulers signal every process of a job, and a loader that dies takes the run along."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Notes the first signal while inside; handlers are as before afterwards. Does nothing outside the main thread."""

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def received(self, accelerator: Accelerator) -> int:
        """The signal that any rank has got, the same answer on every rank; 0 = none."""
        if accelerator.num_processes == 1:
            return self._number
        flag = torch.tensor(self._number, device=accelerator.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number
