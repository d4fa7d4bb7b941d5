"""SIGTERM and SIGHUP act like Ctrl-C, and the previous handlers are restored."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from hover_batch.executor.interrupts import SIGNALS, on_interrupt


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_calls_and_its_handler_is_put_back(number: signal.Signals) -> None:
    before, calls = signal.getsignal(number), []
    with on_interrupt(lambda: calls.append(number)):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert calls == [number, number]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_without_a_call_it_is_a_keyboard_interrupt(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), on_interrupt():
        os.kill(os.getpid(), number)


def test_under_nohup_the_loss_of_the_terminal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone() -> None:
    seen = []

    def work() -> None:
        with on_interrupt():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
