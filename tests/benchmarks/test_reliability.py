"""Every fault of docs/reliability.md once, at small size, and the counting of lost requests and kept guarantees."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from serve_toys import encoded, toy_pixels, write_toy_bundle

from benchmarks import attack_report, reliability
from benchmarks.fault_test import MAX_LOAD_S, QUICK, FaultSetup, Plan, Row, Service, seconds_until
from benchmarks.lifecycle_faults import replace_link, was_held
from benchmarks.load import LOST, Outcome, Result
from benchmarks.reliability import BEGIN, END, FAULTS, inject, replace_table, table
from benchmarks.servers import Prediction, RunningServer


@pytest.fixture
def fault_setup(tmp_path: Path) -> FaultSetup:
    images = [encoded(toy_pixels(seed)) for seed in range(6)]
    settings = {"max_queue_seconds": 5}  # other programs on the machine may delay all requests for a moment
    bundle = write_toy_bundle(tmp_path / "toy")
    return FaultSetup(bundle, images, "toys", "image/png", plan=QUICK, settings=settings)


def make_row(name: str = "fault", kept: bool = False) -> Row:
    return Row(name, 1000, 20, 1, {"200": 19}, "promise", "seen", kept)


def test_the_table_replaces_the_text_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "reliability.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    replace_table(page, table([make_row()]))
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| fault | 1,000 | 20 | 1 | promise | seen | **no** |" in text


def test_the_page_has_the_markers_of_each_table_once() -> None:
    text = reliability.TABLE.read_text()
    assert text.count(BEGIN) == text.count(attack_report.BEGIN) == 1
    assert text.count(END) == 2


def test_overload_is_tested_on_all_images_and_the_other_faults_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    setups = [FaultSetup(Path("nothing"), [], what, "image/png", QUICK) for what in ("small", "large")]
    for name in FAULTS:
        monkeypatch.setitem(
            FAULTS, name, lambda fault_setup, name=name: make_row(f"{name}, {fault_setup.what}", kept=name != "soak")
        )
    messages: list[str] = []
    rows = inject(setups, ["overload-2x", "killed", "soak"], messages.append)
    assert [row.fault for row in rows] == ["overload-2x, small", "overload-2x, large", "killed, small", "soak, small"]
    assert messages[-2].startswith("killed, small: kept; 1 of 20 lost")
    assert messages[-1].startswith("soak, small: NOT KEPT")


def test_a_guarantee_is_kept_if_nothing_is_lost_and_the_rest_is_kept() -> None:
    lost = Outcome(0.0, 0.1, 500, correct=False)
    result = Result(1.0, [Outcome(0.0, 0.1, 200, correct=True), lost])
    row = Row.of(result, [lost], fault="fault", promise="promise", seen="seen")
    assert (row.times, row.requests, row.lost, row.ended, row.kept) == (1, 2, 1, {"200": 1, "500": 1}, False)
    assert Row.of(result, [], fault="fault", promise="promise", seen="seen").kept
    assert not Row.of(result, [], fault="fault", promise="promise", seen="seen", rest_kept=False).kept


@pytest.mark.parametrize(
    ("due_s", "done_s", "status", "held"),
    [
        (0.9, 1.01, 503, True),
        (4.95, 5.01, 503, True),  # held at the second kill
        (1.05, 1.1, 503, True),  # the server process had not detected the kill yet
        (0.9, 4.0, 503, False),  # answered too late
        (1.5, 1.6, 503, False),  # due after the process had died
        (0.2, 0.3, 503, False),  # answered before the first kill
        (0.9, 1.01, 429, False),
        (0.9, 1.01, LOST, False),
    ],
)
def test_only_requests_that_a_killed_process_held_may_get_503(
    due_s: float, done_s: float, status: int, held: bool
) -> None:
    assert was_held(Outcome(due_s, done_s, status, correct=False), [1.0, 5.0]) == held


def test_a_condition_that_stays_false_has_no_duration() -> None:
    assert seconds_until(lambda: False, limit_s=0.0) is None
    assert seconds_until(lambda: True) is not None


@contextmanager
def toy_service(received_requests: list[int]) -> Iterator[Service]:
    """A service that gives every request the same response."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body in one write

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            received_requests.append(1)
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"good")

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # the closed loop opens 32 connections at once

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = ("127.0.0.1", server.server_port)
        running = RunningServer(address, 0.0, "", os.getpid(), "/x", lambda body: Prediction(len(body), 1.0))
        try:
            request = running.request(b"image", "image/png", Prediction(4, 1.0))
            yield Service(running, [request], Plan(load_s=0.2), num_engines=1)
        finally:
            server.shutdown()
            thread.join()


def test_the_load_lasts_until_the_block_ends() -> None:
    received_requests: list[int] = []
    with toy_service(received_requests) as service:
        with service.under_load() as load:
            before = len(received_requests)
            assert seconds_until(lambda: len(received_requests) > before + 20) is not None
        result = load.result()
    assert len(result.outcomes) > 20
    assert result.failed() == []
    assert result.seconds < MAX_LOAD_S


def test_the_load_ends_when_the_block_raises() -> None:
    with toy_service([]) as service, pytest.raises(OSError, match="planted"), service.under_load():
        raise OSError("planted")


def test_the_target_of_a_link_is_replaced_atomically(tmp_path: Path) -> None:
    link = tmp_path / "current"
    for name in ("1", "2", "1"):
        (tmp_path / name).mkdir(exist_ok=True)
        replace_link(link, tmp_path / name)
        assert link.resolve().name == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "current"]


TIMED = (
    "overload-2x",
    "overload-10x",
    "killed-of-two",
    "soak-beside-large",
)  # their guarantees need a machine without other load


@pytest.mark.slow
@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in TIMED])
def test_the_service_keeps_its_guarantee_under_fault(fault: str, fault_setup: FaultSetup) -> None:
    row = FAULTS[fault](fault_setup)
    assert row.requests > 0
    assert row.kept, row


@pytest.mark.slow
def test_nothing_is_lost_beside_clients_with_the_largest_requests(fault_setup: FaultSetup) -> None:
    row = FAULTS["soak-beside-large"](fault_setup)
    assert row.requests > 0
    assert row.lost == 0, row
    assert "they got {'largest-requests': ({'200'" in row.seen, row


@pytest.mark.slow
def test_in_overload_every_status_is_200_or_429(fault_setup: FaultSetup) -> None:
    row = FAULTS["overload-10x"](fault_setup)
    assert row.lost == 0, row
    assert set(row.ended) <= {"200", "429"}


@pytest.mark.slow
def test_one_of_two_engine_processes_answers_alone(fault_setup: FaultSetup) -> None:
    row = FAULTS["killed-of-two"](fault_setup)
    assert set(row.ended) <= {"200", "429", "503"}, (
        row
    )  # 429 if the start of the new process occupies the core for too long
    assert row.ended.get("503", 0) < row.requests / 10, row  # without a second process, most requests would get 503
