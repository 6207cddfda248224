"""Signals that stop a training: they are recorded on arrival, and the training stops after the current step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether a signal to stop has arrived.

    Attributes:
        signal_number: The first signal; None if none has arrived.
    """

    signal_number: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Record SIGINT and SIGTERM instead of acting on them, until the context ends.

    After the first signal SIGINT has its previous handler again, so a second Ctrl-C ends the process at once. A second
    SIGTERM has no effect, because torchrun and cluster schedulers often send it twice to each process of a group. A
    recorded signal on which the code in the context did not act is raised again when the context ends.

    Python can set handlers only in the main thread; in other threads this context does nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # a signal that is ignored stays ignored; shells start background processes with SIGINT ignored
    previous = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}

    def record(number: int, frame: FrameType | None) -> None:
        request.signal_number = request.signal_number or number
        if signal.SIGINT in previous:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

    for number in previous:
        signal.signal(number, record)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if request.signal_number is not None:  # code that acts on the signal leaves the context by an exception
        signal.raise_signal(request.signal_number)
