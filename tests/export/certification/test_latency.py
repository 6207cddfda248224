from dataclasses import dataclass, field

import numpy as np
from export_toys import toy
from numpy.typing import NDArray

from export.certification.latency import LEAST_REPEATS, MOST_REPEATS, measure
from export.conversion.session import open_session


@dataclass
class RecordingSession:
    """A session that records the name of the model and the batch size of every call in a shared list."""

    name: str
    calls: list[tuple[str, int]] = field(default_factory=list)

    def run(self, names: list[str], feeds: dict[str, NDArray[np.uint8]]) -> None:
        (images,) = feeds.values()
        self.calls.append((self.name, len(images)))


def test_every_model_is_timed_at_both_batch_sizes() -> None:
    sessions = {"fp32": open_session(toy().candidate), "again": open_session(toy().candidate)}
    found = measure(sessions, toy().images, seconds=0.05)  # type: ignore[arg-type]
    assert found.keys() == sessions.keys()
    for latencies in found.values():
        assert [latency.batch for latency in latencies] == [1, 32]
        for latency in latencies:
            assert 0 < latency.low_ms <= latency.median_ms <= latency.high_ms


def test_models_take_turns_and_the_time_is_bounded() -> None:
    calls: list[tuple[str, int]] = []
    measure({"a": RecordingSession("a", calls), "b": RecordingSession("b", calls)}, toy().images, seconds=0)  # type: ignore[dict-item]
    rounds = LEAST_REPEATS + 1  # one warm-up round
    assert calls == [("a", 1), ("b", 1)] * rounds + [("a", 32), ("b", 32)] * rounds
    calls.clear()
    measure({"a": RecordingSession("a", calls)}, toy().images, seconds=1e9)  # type: ignore[dict-item]
    assert len(calls) == 2 * (MOST_REPEATS + 1)


def test_if_there_are_too_few_images_for_a_batch_they_are_repeated() -> None:
    calls: list[tuple[str, int]] = []
    measure({"a": RecordingSession("a", calls)}, toy().images[:3], seconds=0)  # type: ignore[dict-item]
    assert {size for _, size in calls} == {1, 32}


def test_without_models_the_result_is_empty() -> None:
    assert measure({}, toy().images) == {}
