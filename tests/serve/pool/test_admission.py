import math

import pytest

from serve.pool.admission import Admission
from serve.problems import ProblemError

NEVER = 1e9


def retry_after_of_rejection(admission: Admission, num_images: int, now: float, deadline: float = NEVER) -> str:
    with pytest.raises(ProblemError) as raised:
        admission.admit(num_images, now, deadline)
    assert raised.value.problem.status == 429
    assert raised.value.headers is not None
    return raised.value.headers["Retry-After"]


def test_the_bound_counts_images() -> None:
    admission = Admission(max_images=10, max_seconds=1e9)
    admission.admit(8, 0.0, NEVER)
    assert retry_after_of_rejection(admission, 3, 0.0) == "1"
    admission.admit(2, 0.0, NEVER)
    admission.release(8, 1.0, batch_size=1)
    admission.admit(8, 1.0, NEVER)
    assert admission.num_images == 10


def test_the_rate_is_measured_while_there_is_a_queue_and_decides_what_is_rejected() -> None:
    admission = Admission(max_images=10_000, max_seconds=5.0)
    admission.expect({1: 0.002, 4: 0.004})
    admission.admit(1000, 0.0, NEVER)
    for number in range(1, 501):  # ten images per second
        admission.release(1, number / 10, batch_size=4)
    # 50 s are twenty-five time constants: nothing is left of the first estimate
    assert admission.seconds_each == pytest.approx(0.1, rel=0.01)
    assert retry_after_of_rejection(admission, 1, 50.0) == "50"


def test_a_short_pause_of_the_machine_changes_the_rate_little() -> None:
    admission = Admission(max_images=10_000, max_seconds=5.0)
    admission.expect({1: 0.001})
    admission.admit(1000, 0.0, NEVER)
    admission.release(1, 0.2, batch_size=1)
    assert admission.seconds_each == pytest.approx(0.001 * math.exp(0.2 / 2), rel=0.01)  # a tenth of the time constant
    for batch in range(1, 26):  # a thousand per second again, in batches of ten that end together
        for _ in range(10):
            admission.release(1, 0.2 + batch / 100, batch_size=10)
    assert admission.seconds_each == pytest.approx(0.00109, rel=0.01)


def test_small_batches_do_not_change_the_rate() -> None:
    admission = Admission(max_images=10_000, max_seconds=1.0)
    admission.expect({1: 0.001, 8: 0.004})
    admission.admit(1, 0.0, NEVER)
    for number in range(1, 1000):  # for ten seconds, each request arrives before the previous one is answered
        admission.admit(1, (number - 0.5) / 100, NEVER)
        admission.release(1, number / 100, batch_size=1 if number % 2 else 3)
    assert admission.seconds_each == 0.0005
    admission.admit(40, 10.0, NEVER)
    for number in range(1, 31):
        admission.release(1, 10.0 + number / 10, batch_size=4)
    assert admission.seconds_each > 0.001


def test_the_rate_is_measured_in_batches_of_the_fastest_size_or_of_as_many_as_are_accepted() -> None:
    fastest = Admission(max_images=10_000, max_seconds=1.0)
    fastest.expect({1: 0.01, 4: 0.02, 32: 0.32})  # a queue is processed in batches of four
    few = Admission(max_images=10_000, max_seconds=0.1)
    few.expect({1: 0.01, 32: 0.32})  # ten are accepted, so a batch never has half of 32
    for admission in (fastest, few):
        guess = admission.seconds_each
        admission.admit(1000, 0.0, NEVER)
        for number in range(1, 31):
            admission.release(1, number / 10, batch_size=3)
        assert admission.seconds_each > 2 * guess


def test_an_answer_that_empties_the_queue_does_not_change_the_rate() -> None:
    admission = Admission(max_images=10, max_seconds=1.0)
    admission.expect({1: 0.002, 4: 0.004})
    for second in range(100):
        admission.admit(1, second, NEVER)
        admission.release(1, second + 0.9, batch_size=4)
    assert admission.seconds_each == 0.001


def test_a_request_without_an_answer_does_not_change_the_rate() -> None:
    admission = Admission(max_images=10, max_seconds=1.0)
    admission.expect({1: 0.002, 4: 0.004})
    admission.admit(5, 0.0, NEVER)
    admission.release(4)
    assert (admission.seconds_each, admission.num_images) == (0.001, 1)


def test_by_default_no_request_waits_longer_than_ten_single_images_take() -> None:
    admission = Admission(max_images=10_000, max_seconds=None)
    admission.expect({1: 0.02, 4: 0.04})  # in batches of four an image takes 0.01 s, and twenty of them 0.2 s
    admission.admit(20, 0.0, NEVER)
    admission.admit(1, 0.0, NEVER)
    assert retry_after_of_rejection(admission, 1, 0.0) == "1"


def test_the_queue_of_a_fast_model_may_take_a_twentieth_of_a_second() -> None:
    admission = Admission(max_images=10_000, max_seconds=None)
    admission.expect({1: 0.001})
    admission.admit(50, 0.0, NEVER)
    admission.admit(1, 0.0, NEVER)
    assert retry_after_of_rejection(admission, 1, 0.0) == "1"


def test_a_request_whose_deadline_would_pass_in_the_queue_is_rejected_at_once() -> None:
    admission = Admission(max_images=10_000, max_seconds=10.0)
    admission.expect({1: 0.5})
    admission.admit(6, 0.0, NEVER)
    assert retry_after_of_rejection(admission, 1, 1.0, deadline=3.9) == "3"
    admission.admit(1, 1.0, 4.1)


def test_while_admission_is_paused_only_the_number_of_images_is_bounded() -> None:
    admission = Admission(max_images=100, max_seconds=1.0)
    admission.expect({1: 0.1})
    admission.pause_admission()
    admission.pause_admission()  # two processes start at once
    admission.admit(98, 0.0, NEVER)
    assert retry_after_of_rejection(admission, 3, 0.0) == "10"
    admission.resume(0.0)
    admission.admit(2, 0.0, NEVER)
    assert retry_after_of_rejection(admission, 1, 0.0, deadline=9.9) == "10"


def test_the_backlog_of_a_pause_may_exceed_the_usual_limit() -> None:
    admission = Admission(max_images=100, max_seconds=1.0)
    admission.expect({1: 0.1})
    admission.pause_admission()
    admission.admit(80, 0.0, NEVER)  # 8 s of work
    admission.resume(10.0)
    admission.admit(1, 10.0, NEVER)
    admission.release(21)  # 6 s of work are left
    admission.admit(
        1, 10.0 + 4 * 3, NEVER
    )  # the allowance falls by a quarter of the time: a wait of 1 + 8 + 0.5 - 3 s is allowed
    assert retry_after_of_rejection(admission, 1, 10.0 + 4 * 4) == "7"
    admission.release(60)
    admission.admit(20, 60.0, NEVER)
    assert retry_after_of_rejection(admission, 1, 60.0) == "3"  # later the usual limit applies
