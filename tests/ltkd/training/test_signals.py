import signal
import threading
from collections.abc import Iterator

import pytest

from ltkd.training.signals import SIGNALS, stop_signals


@pytest.fixture(autouse=True)
def plain_handlers() -> Iterator[None]:
    """Handlers as a command has them; a shell that puts the tests into the background has SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with pytest.raises(StopIteration), stop_signals() as asked:
        assert asked.signal_number is None
        signal.raise_signal(number)
        assert asked.signal_number == number
        raise StopIteration  # as a training obeys it


def test_a_second_ctrl_c_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one was swallowed")


def test_a_ctrl_c_after_a_sigterm_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one was swallowed")


def test_a_second_sigterm_is_the_first_one_said_twice() -> None:
    with pytest.raises(StopIteration), stop_signals() as asked:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert asked.signal_number == signal.SIGTERM
        raise StopIteration


def test_a_signal_that_nobody_obeyed_acts_when_the_context_ends() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt):
        with stop_signals():
            signal.raise_signal(signal.SIGINT)
            reached = True
        pytest.fail("the signal was swallowed")
    assert reached


def test_the_handlers_before_are_put_back() -> None:
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_signals() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.signal_number is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_another_thread_than_the_main_one_leaves_signals_alone() -> None:
    found = []

    def look() -> None:
        with stop_signals() as asked:
            found.append((asked.signal_number, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(None, signal.SIG_DFL)]
