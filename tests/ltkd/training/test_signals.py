import signal
import threading
from collections.abc import Iterator

import pytest

from ltkd.training.signals import SIGNALS, stop_signals


@pytest.fixture(autouse=True)
def plain_handlers() -> Iterator[None]:
    """Set the default handlers; a shell that runs the tests in the background has SIGINT ignored."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_only_recorded(number: signal.Signals) -> None:
    with pytest.raises(StopIteration), stop_signals() as request:
        assert request.signal_number is None
        signal.raise_signal(number)
        assert request.signal_number == number
        raise StopIteration  # as a training does that stops


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal had no effect")


def test_a_ctrl_c_after_a_sigterm_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal had no effect")


def test_a_second_sigterm_has_no_effect() -> None:
    with pytest.raises(StopIteration), stop_signals() as request:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert request.signal_number == signal.SIGTERM
        raise StopIteration


def test_an_unhandled_signal_is_raised_again_when_the_context_ends() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt):
        with stop_signals():
            signal.raise_signal(signal.SIGINT)
            reached = True
        pytest.fail("the signal was not raised again")
    assert reached


def test_the_previous_handlers_are_restored() -> None:
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_signals() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.signal_number is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_in_another_thread_the_handlers_do_not_change() -> None:
    found = []

    def check() -> None:
        with stop_signals() as request:
            found.append((request.signal_number, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert found == [(None, signal.SIG_DFL)]
