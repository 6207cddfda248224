"""The service benchmarks: the load generator with a server of known responses, and the report on invented values."""

import dataclasses
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from serve_toys import encoded, toy_pixels, write_toy_bundle

from benchmarks.fault_test import seconds_until
from benchmarks.load import (
    CLIENT_LEFT,
    LOST,
    REFUSED,
    UNANSWERED,
    Outcome,
    Request,
    Result,
    closed_loop,
    http_request,
    open_loop,
    parse_response,
    poisson,
    quantile_of,
    result_between,
    send_one_by_one,
)
from benchmarks.servers import (
    PEER_SERVERS,
    Prediction,
    RunningServer,
    free_port,
    install,
    pinned_to_core,
    processes_of_run,
    running_service,
)
from benchmarks.serving import (
    PLANS,
    SHARES,
    OfferedLoad,
    ServerResult,
    WorkloadResults,
    comma_separated,
    command_flags,
    find_knee,
)
from benchmarks.serving_report import AS_DEPLOYED, SAME_MODEL, Spread, checks, content, markdown, plot, ratios
from benchmarks.workload_specs import WORKLOADS

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
FULL = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
REQUEST = Request(http_request("/x", b"image", "image/png"), lambda body: body == b"good")

Responder = Callable[[int], bytes | None]
"""From the number of a request to its response; None closes the connection, and b"" sends no response."""


@contextmanager
def serving(serve_one: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """A server with one thread per connection; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    threads = list[threading.Thread]()

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve_one, args=(connection,)))
            threads[-1].start()

    threads.append(threading.Thread(target=accept))
    threads[0].start()
    try:
        yield listener.getsockname()[:2]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in threads:
            thread.join()


@contextmanager
def toy_server(respond: Responder) -> Iterator[tuple[str, int]]:
    """A server whose responses are given by a function."""
    num_requests, lock = [0], threading.Lock()

    def serve_one(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(2**16):
                while not data.endswith(b"image"):
                    data += connection.recv(2**16)
                with lock:
                    num_requests[0] += 1
                    response = respond(num_requests[0])
                if response is None:
                    return
                connection.sendall(response)

    with serving(serve_one) as address:
        yield address


def test_a_closed_loop_checks_every_response() -> None:
    with toy_server(lambda number: OK + (b"good" if number % 4 else b"evil")) as address:
        result = closed_loop(address, [REQUEST], connections=2, seconds=0.3)
    assert set(result.statuses) == {"200"}
    # one in four; the responses at both ends are not counted
    assert abs(4 * result.wrong - len(result.outcomes)) <= 8
    assert len(result.failed()) == result.wrong > 0


def test_an_open_loop_sends_one_request_per_due_time() -> None:
    due_s = [number / 200 for number in range(50)]
    with toy_server(lambda number: OK + b"good" if number % 5 else FULL) as address:
        result = open_loop(address, [REQUEST], due_s)
    assert sorted(one.due_s for one in result.outcomes) == due_s
    assert result.statuses == {"200": 40, "429": 10}
    assert all(one.retry_after == (one.status == 429) for one in result.outcomes)
    assert all(one.done_s >= one.due_s for one in result.outcomes)


def test_waiting_for_a_free_connection_counts_as_latency() -> None:
    released = threading.Event()

    def respond(number: int) -> bytes:
        if number == 1:
            released.wait(10)
        return OK + b"good"

    with toy_server(respond) as address:
        result = open_loop(address, [REQUEST], [0.0, 0.01], max_connections=1, events=[(0.2, released.set)])
    # the second request was due at 0.01 s but could be sent only when the first was answered, after 0.2 s
    assert [one.latency_s >= 0.19 for one in result.outcomes] == [True, True]


def test_a_server_that_never_responds_times_out() -> None:
    with toy_server(lambda _: b"") as address:
        result = open_loop(address, [REQUEST], [0.0] * 5, timeout_s=0.2, max_connections=2)
    assert [one.status for one in result.outcomes] == [UNANSWERED] * 5
    assert result.statuses == {"no answer": 5}


def test_lost_connections_and_refused_connections_are_distinguished() -> None:
    with toy_server(lambda _: None) as address:
        assert [one.status for one in open_loop(address, [REQUEST], [0.0]).outcomes] == [LOST]
    assert [one.status for one in open_loop(("127.0.0.1", free_port()), [REQUEST], [0.0]).outcomes] == [REFUSED]


def test_clients_that_disconnect_are_not_failures() -> None:
    with toy_server(lambda _: b"") as address:
        result = open_loop(address, [REQUEST], [0.0] * 20, disconnect_share=1.0)
    assert [one.status for one in result.outcomes] == [CLIENT_LEFT] * 20
    assert result.failed() == []


def test_an_open_loop_can_be_stopped() -> None:
    stop = threading.Event()
    with toy_server(lambda _: OK + b"good") as address:
        result = open_loop(
            address, [REQUEST], [number / 100 for number in range(6000)], stop=stop, events=[(0.2, stop.set)]
        )
    assert result.seconds < 30
    assert result.failed() == []


def test_every_request_has_an_id_of_its_own_and_the_answer_to_another_is_wrong() -> None:
    received: list[bytes] = []

    class Recorder(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body in one write

        def do_POST(self) -> None:
            assert self.rfile.read(int(self.headers["Content-Length"])) == b"image"
            received.append(self.headers["X-Request-ID"].encode())
            self.send_response(200)
            self.send_header("X-Request-ID", received[-1 if len(received) % 2 else -2].decode())
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"good")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        outcomes = send_one_by_one(("127.0.0.1", server.server_port), [REQUEST] * 4).outcomes
        server.shutdown()
        thread.join()
    assert len({*received}) == 4
    assert [outcome.correct for outcome in outcomes] == [True, False, True, False]


def test_connections_that_the_server_closed_are_not_used_again() -> None:
    with toy_server(lambda number: OK + b"good" if number % 2 else None) as address:
        # the first request is answered, the second closes its connection, the third needs a new one
        result = open_loop(address, [REQUEST], [0.0, 0.05, 0.1], max_connections=1, connect_first=True, spin_s=0.0)
    assert result.statuses == {"connection lost": 1, "200": 2}


def test_load_is_sent_to_loopback_addresses_only() -> None:
    with pytest.raises(ValueError, match="loopback addresses only"):
        closed_loop(("192.0.2.1", 80), [REQUEST], connections=1, seconds=0.1)


def test_only_complete_responses_are_parsed() -> None:
    whole = OK + b"good"
    assert [parse_response(bytearray(whole[:size])) for size in range(len(whole))] == [None] * len(whole)
    response = parse_response(bytearray(whole))
    assert response is not None
    assert (response.status, response.body, response.closes) == (200, b"good", False)
    chunked = (
        b"HTTP/1.1 503 X\r\nConnection: Close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\ngoo\r\n1;a=b\r\nd\r\n0\r\n\r\n"
    )
    assert parse_response(bytearray(chunked[:-7])) is None
    response = parse_response(bytearray(chunked))
    assert response is not None
    assert (response.status, response.body, response.closes) == (503, b"good", True)


def test_the_number_of_arrivals_agrees_with_the_rate() -> None:
    due_s = poisson(1000, 10.0, seed=3)
    assert due_s == sorted(due_s) == poisson(1000, 10.0, seed=3)
    assert due_s[0] > 0
    assert due_s[-1] < 10
    # a Poisson count of 10,000 has a standard deviation of 100; the tolerance is five of them
    assert abs(len(due_s) - 10_000) < 500


def test_quantiles_and_goodput_agree_with_values_computed_by_hand() -> None:
    assert quantile_of([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert quantile_of([4.0, 1.0, 3.0, 2.0], 0.99) == 4.0
    assert math.isnan(quantile_of([], 0.5))
    fast, late = Outcome(0.0, 0.1, 200, correct=True), Outcome(0.0, 0.9, 200, correct=True)
    result = Result(2.0, [fast, late, Outcome(0.0, 0.1, 200, correct=False), Outcome(0.0, 0.1, 429, correct=False)])
    assert result.goodput() == 1.0
    assert result.goodput(slo_s=0.5) == 0.5
    assert result.latency_s(1.0) == 0.9


def test_responses_in_batches_are_counted_from_batch_to_batch() -> None:
    # ten responses every second: ten per second for every time window
    outcomes = [Outcome(0.0, float(second), 200, correct=True) for second in range(1, 10) for _ in range(10)]
    for begin_s, end_s in ((2.0, 8.0), (2.5, 8.9), (2.99, 8.01)):
        assert result_between(outcomes, begin_s, end_s).goodput() == 10.0


def test_the_knee_is_where_goodput_is_best() -> None:
    assert find_knee({1: 50.0, 8: 96.9, 32: 100.0, 16: 100.0}) == 16
    assert find_knee({1: 0.0, 4: 0.0}) == 1


def test_the_goodput_of_a_burst_includes_the_time_to_process_the_backlog() -> None:
    during = [Outcome(0.1 * number, 0.1 * number + 0.1, 200, correct=True) for number in range(10)]
    afterwards = [Outcome(0.9, 1.0 + 0.1 * number, 200, correct=True) for number in range(1, 6)]
    later = [Outcome(1.5, 1.6, 200, correct=True)]
    result = Result(2.0, during + afterwards + later)
    assert result.goodput_of_burst(1.0, slo_s=1.0) == pytest.approx(15 / 1.5)
    assert result.goodput_of_burst(1.0, slo_s=0.35) == pytest.approx(12 / 1.2)  # the other responses came too late
    assert Result(2.0, []).goodput_of_burst(1.0, slo_s=1.0) == 0


def make_result(knee: float, p99_ms: float = 4.0, wrong: int = 0, refused_p99_ms: float = 8.0) -> ServerResult:
    offered = [
        OfferedLoad(share, share * knee, min(share, 1) * knee, 2.0, p99_ms, refused_p99_ms, {"200": 9}, 0)
        for share in SHARES
    ]
    return ServerResult(1.5, 200.0, 150.0, 2.0, {1: knee / 2, 8: knee}, 8, knee, 1.0, offered, wrong)


def make_results() -> WorkloadResults:
    return WorkloadResults(
        server_results={
            "ltkd": [make_result(96), make_result(118)],
            "ltkd, int8": [make_result(180)] * 2,
            "mosec": [make_result(100), make_result(90)],
        },
        missing={"Ray Serve": "it could not be installed: no network"},
    )


def test_ratios_are_taken_within_a_round_and_targets_compare_their_median() -> None:
    assert ratios(Spread((10.0, 30.0)), Spread((5.0, 10.0))).values == (2.0, 3.0)
    kept = {check.what: check for check in checks("resnet20", make_results())}
    assert kept["(a) same model: over mosec"].seen.values == pytest.approx((0.96, 118 / 90))
    assert kept["(b) by default: over mosec"].seen.values == (1.8, 2.0)
    assert kept["(b) by default: over mosec"].kept
    assert not any("Ray" in what for what in kept)  # it was not measured
    assert kept["goodput at 10 times the load of the knee over goodput at the knee"].seen.values == (1.0, 1.0)
    assert all(check.kept for check in kept.values())


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_has_targets_and_a_plan(name: str) -> None:
    assert {*SAME_MODEL[name], *AS_DEPLOYED[name]} <= {*PEER_SERVERS}
    assert SAME_MODEL[name] and AS_DEPLOYED[name] and PLANS[name].connections


def test_a_wrong_response_or_a_missing_value_misses_the_target() -> None:
    broken = make_results()
    broken.server_results["mosec"] = [make_result(100, wrong=1)] * 2
    broken.server_results["ltkd"] = [make_result(96, refused_p99_ms=math.nan)] * 2
    kept = {check.what: check.kept for check in checks("resnet20", broken)}
    assert not kept["wrong answers of all servers"]
    assert not kept["p99 of 429 at 10 times the load of the knee, ms"]


def test_the_report_lists_servers_that_were_left_out_and_is_strict_json(tmp_path: Path) -> None:
    about = {"command": "c", "commit": "0", "date": "d", "hardware": "h", "rounds": 2}
    text = markdown({"resnet20": make_results()}, about)
    assert "| Ray Serve | left out: it could not be installed: no network |" in text
    assert "| mosec | 95 (90 to 100) |" in text
    read = json.loads(json.dumps(content({"resnet20": make_results()}, about), allow_nan=False))
    knee = read["workloads"]["resnet20"]["servers"]["ltkd"]["goodput_at_the_knee"]
    assert knee == {"median": 107.0, "lowest": 96.0, "highest": 118.0, "values": [96.0, 118.0]}
    assert statistics.median(knee["values"]) == knee["median"]
    plot({"resnet20": make_results()}, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_the_requirements_of_every_peer_are_pinned_versions_without_addresses() -> None:
    for peer in PEER_SERVERS.values():
        assert peer.version
        pins = peer.requirements.read_text().splitlines()
        assert all(pin.count("==") == 1 and "/" not in pin and "@" not in pin for pin in pins)
        assert (peer.requirements.parent / f"{peer.module}.py").is_file()


def test_an_installed_peer_is_not_installed_again(tmp_path: Path) -> None:
    peer = PEER_SERVERS["mosec"]
    (tmp_path / peer.module).mkdir()
    (tmp_path / peer.module / "installed.txt").write_text(peer.requirements.read_text())
    assert install(peer, tmp_path) == tmp_path / peer.module / "bin"


def test_unknown_names_are_rejected_and_folders_of_this_machine_are_not_recorded() -> None:
    with pytest.raises(Exception, match="nothing: not one of"):
        comma_separated({"mosec": 0})("mosec,nothing")
    import argparse

    arguments = argparse.Namespace(quick=True, rounds=2, workloads=["12 MP"], peers=["mosec"], cache=Path("/secret"))
    assert " ".join(command_flags(arguments)) == "--quick --rounds 2 --workloads '12 MP' --peers 'mosec'"


def test_the_cores_are_restored_after_a_pinned_block() -> None:
    before = os.sched_getaffinity(0)
    with pinned_to_core(1):
        inner_cores = os.sched_getaffinity(0)
        with pinned_to_core(0):  # index 0 of all cores, not of the pinned one
            innermost_cores = os.sched_getaffinity(0)
    assert len(inner_cores) == len(innermost_cores) == 1
    assert (inner_cores == innermost_cores) == (len(before) == 1)
    assert os.sched_getaffinity(0) == before


def test_a_server_has_its_own_children_only() -> None:
    running = RunningServer(
        ("127.0.0.1", 1), 0.0, "no process has this run id", os.getpid(), "/x", lambda _: Prediction(0, 1.0)
    )
    assert running.children() == []
    assert not running.has_exited()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child_server = dataclasses.replace(running, pid=child.pid)
    assert seconds_until(child_server.has_exited) is not None  # its exit status was not read yet
    child.wait()
    assert child_server.has_exited()


@pytest.mark.slow
def test_every_process_of_a_service_is_found_and_stopped(tmp_path: Path) -> None:
    with running_service(write_toy_bundle(tmp_path / "toy"), encoded(toy_pixels(0)), "image/png") as running:
        processes = running.processes()
        assert running.pid in processes
        assert running.children()
        assert running.resident_mib() >= running.proportional_mib() > 0
        assert running.cpu_s() > 0
    assert processes_of_run(running.run_id) == []
    with pytest.raises(ProcessLookupError):
        os.kill(running.pid, signal.SIGCONT)


def test_send_one_by_one_sends_every_request_once() -> None:
    with toy_server(lambda _: OK + b"good") as address:
        result = send_one_by_one(address, [REQUEST] * 3)
    assert [one.correct for one in result.outcomes] == [True] * 3
