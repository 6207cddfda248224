import pytest

from serve.admission import Admission
from serve.problems import ProblemError


def refused(admission: Admission, num_images: int, now: float) -> str:
    with pytest.raises(ProblemError) as said:
        admission.admit(num_images, now)
    assert said.value.problem.status == 429
    assert said.value.headers is not None
    return said.value.headers["Retry-After"]


def test_the_bound_counts_images() -> None:
    admission = Admission(max_images=10, max_seconds=1e9)
    admission.admit(8, 0.0)
    assert refused(admission, 3, 0.0) == "1"
    admission.admit(2, 0.0)
    admission.release(8, 1.0)
    admission.admit(8, 1.0)
    assert admission.num_images == 10


def test_the_rate_is_measured_while_there_is_a_queue_and_decides_whom_to_refuse() -> None:
    admission = Admission(max_images=10_000, max_seconds=5.0)
    admission.expect(0.001)
    admission.admit(1000, 0.0)
    for number in range(1, 501):  # ten images a second
        admission.release(1, number / 10)
    # 500 images are five times what is remembered, so of the guess exp(-5), less than 1 %, is left
    assert admission.seconds_each == pytest.approx(0.1, rel=0.01)
    assert refused(admission, 1, 50.0) == "50"


def test_an_answer_that_left_no_queue_says_nothing_of_the_rate() -> None:
    admission = Admission(max_images=10, max_seconds=1.0)
    admission.expect(0.001)
    for second in range(100):
        admission.admit(1, second)
        admission.release(1, second + 0.9)
    assert admission.seconds_each == 0.001


def test_an_answer_that_never_came_says_nothing_of_the_rate() -> None:
    admission = Admission(max_images=10, max_seconds=1.0)
    admission.expect(0.001)
    admission.admit(5, 0.0)
    admission.release(4, None)
    assert (admission.seconds_each, admission.num_images) == (0.001, 1)
