"""What is asked of engine processes, and what comes back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serve.line import Line
from serve.problems import Problem, ProblemError, problem_of
from serve.wire import Done, Seen


class Classified(NamedTuple):
    """What came back for one request.

    Attributes:
        results: One an image, in the order of the request: the answer in JSON (or logits, float32 [C]), or why there
            is none.
        seen: The facts of each answered image; None in the place of a refused one.
        stage_seconds: ``decode``, ``queue`` and ``infer``, of the slowest image.
        batch_size: Images in the last batch that one of them ran in; 0 if nothing ran.
    """

    results: list[bytes | Problem]
    seen: list[Seen | None]
    stage_seconds: dict[str, float]
    batch_size: int


Answered = Callable[[Classified | ProblemError], None]
"""Told what became of one request."""
Watch = Callable[[Sequence[Seen | None], Mapping[str, float], int], None]
"""Told of every answer: its ``seen``, ``stage_seconds`` and ``batch_size``."""


@dataclass(slots=True, eq=False)
class Call:
    """A request in the hands of an engine process.

    Attributes:
        number: Its number on the line.
        line: Where it was sent, or where it waits for a process that it can be sent to.
        problems: Of the images that were not sent, by their place.
        num_images: Images that were sent.
        sent: When, on the clock of ``time.monotonic``.
        answered: Told what became of it; None once it has been, or when nobody waits any more.
    """

    number: int
    line: "Line[Call] | Parked"
    problems: dict[int, Problem]
    num_images: int
    sent: float
    answered: Answered | None


class Parked:
    """Requests that wait while no engine process is there: to who writes on it a line, whose other end comes later.

    Attributes:
        calls: What was written, by number.
    """

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self._written: list[bytes] = []

    def write(self, message: bytes) -> None:
        """Keep something that a process is to be told."""
        self._written.append(message)

    def move_to(self, line: Line[Call]) -> None:
        """Send everything to a process."""
        for call in self.calls.values():
            call.line = line
        line.calls.update(self.calls)
        line.write(b"".join(self._written))


def classified_of(done: Done, problems: Mapping[int, Problem]) -> Classified:
    """What came back, with the problems of images that were not sent in their places."""
    _, decode_seconds, queue_seconds, infer_seconds, batch_size, outcomes = done
    results: list[bytes | Problem] = []
    facts: list[Seen | None] = []
    for status, payload, seen in outcomes:
        results.append(problem_of(status, payload.decode()) if status else payload)
        facts.append(seen)
    for place in sorted(problems):
        results.insert(place, problems[place])
        facts.insert(place, None)
    stage_seconds = {"decode": decode_seconds}
    if batch_size:
        stage_seconds["queue"] = queue_seconds
        stage_seconds["infer"] = infer_seconds
    return Classified(results, facts, stage_seconds, batch_size)
