"""Signals that ask a training to stop: noted when they come, obeyed after a whole step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether a signal came.

    Attributes:
        signal_number: The first one; None while there was none.
    """

    signal_number: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM for as long as the context lasts.

    After the first signal a SIGINT acts as it would have without this: a second Ctrl-C ends at once. A second SIGTERM
    changes nothing, because where torchrun or a cluster's scheduler stop a group of processes, each of them is often
    told twice. A signal that came too late for anybody in the context to obey it acts when the context ends.

    Only the main thread of a process can do this; in another the signals keep their meaning.
    """
    asked = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    # a signal that the parent process had ignored, as a background shell does with SIGINT, stays ignored
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}

    def note(number: int, frame: FrameType | None) -> None:
        asked.signal_number = asked.signal_number or number
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked.signal_number is not None:  # an obeyed one leaves by an exception
        signal.raise_signal(asked.signal_number)
