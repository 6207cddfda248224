"""Every fault of docs/reliability.md once, in small, and what is counted as lost and as kept."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from serve_toys import encoded, toy_pixels, write_toy_bundle

from benchmarks import reliability
from benchmarks.lifecycle_faults import point_at, was_held
from benchmarks.load import LOST, Outcome, Result
from benchmarks.reliability import BEGIN, END, FAULTS, inject, put_table, table
from benchmarks.servers import Named, Running
from benchmarks.trial import LONGEST_S, QUICK, Bench, Plan, Row, Service, seconds_until


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    images = [encoded(toy_pixels(seed)) for seed in range(6)]
    patient = {"max_queue_seconds": 5}  # a machine that does other things too may keep everybody waiting for a moment
    bundle = write_toy_bundle(tmp_path / "toy")
    return Bench(bundle, images, "toys", "image/png", slo_s=10.0, plan=QUICK, settings=patient)


def a_row(name: str = "fault", kept: bool = False) -> Row:
    return Row(name, 1000, 20, 1, {"200": 19}, "promise", "seen", kept)


def test_the_table_replaces_what_was_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "reliability.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put_table(page, table([a_row()]))
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| fault | 1,000 | 20 | 1 | promise | seen | **no** |" in text


def test_the_page_has_a_place_for_the_table() -> None:
    text = reliability.TABLE.read_text()
    assert text.count(BEGIN) == text.count(END) == 1


def test_overload_is_tried_on_all_images_and_the_rest_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    benches = [Bench(Path("nothing"), [], what, "image/png", 1.0, QUICK) for what in ("small", "large")]
    for name in FAULTS:
        monkeypatch.setitem(FAULTS, name, lambda bench, name=name: a_row(f"{name}, {bench.what}", kept=name != "soak"))
    said: list[str] = []
    rows = inject(benches, ["overload-2x", "killed", "soak"], said.append)
    assert [row.fault for row in rows] == ["overload-2x, small", "overload-2x, large", "killed, small", "soak, small"]
    assert said[-2].startswith("killed, small: kept; 1 of 20 lost")
    assert said[-1].startswith("soak, small: NOT KEPT")


def test_a_promise_is_kept_if_nothing_is_lost_and_the_rest_of_it_is_kept() -> None:
    lost = Outcome(0.0, 0.1, 500, right=False)
    result = Result(1.0, [Outcome(0.0, 0.1, 200, right=True), lost])
    row = Row.of(result, [lost], fault="fault", promise="promise", seen="seen")
    assert (row.times, row.requests, row.lost, row.ended, row.kept) == (1, 2, 1, {"200": 1, "500": 1}, False)
    assert Row.of(result, [], fault="fault", promise="promise", seen="seen").kept
    assert not Row.of(result, [], fault="fault", promise="promise", seen="seen", besides=False).kept


@pytest.mark.parametrize(
    ("due_s", "done_s", "status", "held"),
    [
        (0.9, 1.01, 503, True),
        (4.95, 5.01, 503, True),  # at the second kill
        (1.05, 1.1, 503, True),  # the front had not been told yet
        (0.9, 4.0, 503, False),  # not at once
        (1.5, 1.6, 503, False),  # it came when the process was gone
        (0.2, 0.3, 503, False),  # before anything had happened
        (0.9, 1.01, 429, False),
        (0.9, 1.01, LOST, False),
    ],
)
def test_only_what_a_killed_process_held_may_be_answered_503(
    due_s: float, done_s: float, status: int, held: bool
) -> None:
    assert was_held(Outcome(due_s, done_s, status, right=False), [1.0, 5.0]) == held


def test_what_does_not_happen_in_time_has_no_duration() -> None:
    assert seconds_until(lambda: False, limit_s=0.0) is None
    assert seconds_until(lambda: True) is not None


@contextmanager
def toy_service(num_asked: list[int]) -> Iterator[Service]:
    """Something that answers every request alike."""

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one go

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            num_asked.append(1)
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"good")

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # the closed loop opens 32 connections in one go

    with Server(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = ("127.0.0.1", server.server_port)
        running = Running(address, 0.0, "", os.getpid(), "/x", lambda body: Named(len(body), 1.0))
        try:
            question = running.question(b"image", "image/png", Named(4, 1.0))
            yield Service(running, [question], Plan(load_s=0.2), num_engines=1)
        finally:
            server.shutdown()
            thread.join()


def test_load_lasts_as_long_as_what_happens_under_it() -> None:
    num_asked: list[int] = []
    with toy_service(num_asked) as service:
        with service.under_load() as load:
            before = len(num_asked)
            assert seconds_until(lambda: len(num_asked) > before + 20) is not None
        result = load.result()
    assert len(result.outcomes) > 20
    assert result.failed() == []
    assert result.seconds < LONGEST_S


def test_load_ends_when_what_happens_under_it_fails() -> None:
    with toy_service([]) as service, pytest.raises(OSError, match="planted"), service.under_load():
        raise OSError("planted")


def test_a_link_is_exchanged_in_one_step(tmp_path: Path) -> None:
    link = tmp_path / "current"
    for name in ("1", "2", "1"):
        (tmp_path / name).mkdir(exist_ok=True)
        point_at(link, tmp_path / name)
        assert link.resolve().name == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "current"]


TIMED = ("overload-2x", "overload-10x", "killed-of-two")  # what they promise needs a quiet machine


@pytest.mark.slow
@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in TIMED])
def test_the_service_keeps_its_promise_when(fault: str, bench: Bench) -> None:
    row = FAULTS[fault](bench)
    assert row.requests > 0
    assert row.kept, row


@pytest.mark.slow
def test_overload_is_answered_with_200_or_429_and_nothing_else(bench: Bench) -> None:
    row = FAULTS["overload-10x"](bench)
    assert row.lost == 0, row
    assert set(row.ended) <= {"200", "429"}


@pytest.mark.slow
def test_one_engine_process_of_two_goes_on_alone(bench: Bench) -> None:
    row = FAULTS["killed-of-two"](bench)
    assert set(row.ended) <= {"200", "429", "503"}, row  # 429 where the start of another takes the core for too long
    assert row.ended.get("503", 0) < row.requests / 10, row  # with none to go on it is most of them
