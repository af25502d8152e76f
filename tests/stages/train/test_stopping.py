"""Signals: noted, agreed on, handed back; the exception that ends a run."""

import os
import pickle
import signal
import threading

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from geomcache.stages.train.stopping import SIGNALS, StopSignals, TrainingStopped


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_are_handed_back(accelerator: Accelerator, number: int) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopSignals() as signals:
        assert signals.received(accelerator) == 0
        os.kill(os.getpid(), number)
        assert signals.received(accelerator) == number
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_schedulers_may_repeat_themselves_and_people_may_insist(accelerator: Accelerator) -> None:
    with StopSignals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received(accelerator) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)  # the first Ctrl-C
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_to_their_owner(accelerator: Accelerator) -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def inside() -> None:
        with StopSignals() as signals:
            found.append((signal.getsignal(signal.SIGTERM), signals.received(accelerator)))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [(before, 0)]


def test_the_ending_says_what_is_saved_and_crosses_processes() -> None:
    """The quickstart's children hand it to their parent."""
    ending = pickle.loads(pickle.dumps(TrainingStopped(signal.SIGUSR1, 7)))  # our own bytes
    assert (ending.code, ending.step) == (138, 7)
    assert ending.text == "stopped by SIGUSR1 after step 7; saved, the same command continues"
