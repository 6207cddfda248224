"""The measurements of the service measure: the generator against a server whose answers are known, and the arithmetic
on figures that were made up."""

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
from pathlib import Path

import pytest
from serve_toys import encoded, toy_pixels, write_toy_bundle

from benchmarks.load import (
    LEFT,
    LOST,
    REFUSED,
    UNANSWERED,
    Outcome,
    Question,
    Result,
    closed_loop,
    counted_between,
    http_request,
    one_by_one,
    open_loop,
    parsed,
    poisson,
    quantile_of,
    slow_clients,
    uniform,
)
from benchmarks.servers import (
    PEER_SERVERS,
    Named,
    Running,
    free_port,
    install,
    marked_processes,
    on_core,
    ours_running,
)
from benchmarks.serving import SHARES, Ceiling, Found, Offered, Visit, flags, knee_of, listed
from benchmarks.serving_report import Spread, checks, content, markdown, plot, ratios
from benchmarks.trial import seconds_until

QUEUEING = {"even": 1.5, "poisson": 11.0}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
FULL = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
QUESTION = Question(http_request("/x", b"image", "image/png"), lambda body: body == b"good")

Answer = Callable[[int], bytes | None]
"""From the number of a request to what is sent; None closes the connection, and b"" leaves it without an answer."""


@contextmanager
def toy_server(answer: Answer) -> Iterator[tuple[str, int]]:
    """A server with a thread a connection that does as it is told."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked, lock, threads = [0], threading.Lock(), list[threading.Thread]()

    def serve_one(line: socket.socket) -> None:
        with line:
            while content := line.recv(2**16):
                while not content.endswith(b"image"):
                    content += line.recv(2**16)
                with lock:
                    asked[0] += 1
                    said = answer(asked[0])
                if said is None:
                    return
                line.sendall(said)

    def accept() -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve_one, args=(line,)))
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


def test_a_closed_loop_checks_every_answer() -> None:
    with toy_server(lambda number: OK + (b"good" if number % 4 else b"evil")) as address:
        result = closed_loop(address, [QUESTION], connections=2, seconds=0.3)
    assert set(result.statuses) == {"200"}
    # one in four, but for those at both ends that are not counted
    assert abs(4 * result.wrong - len(result.outcomes)) <= 8
    assert len(result.failed()) == result.wrong > 0


def test_an_open_loop_asks_once_for_every_time_that_is_due() -> None:
    due_s = uniform(200, 0.25)
    with toy_server(lambda number: OK + b"good" if number % 5 else FULL) as address:
        result = open_loop(address, [QUESTION], due_s)
    assert sorted(one.due_s for one in result.outcomes) == due_s
    assert result.statuses == {"200": 40, "429": 10}
    assert all(one.retry_after == (one.status == 429) for one in result.outcomes)
    assert all(one.done_s >= one.due_s for one in result.outcomes)


def test_waiting_for_a_free_connection_counts_as_latency() -> None:
    gate = threading.Event()

    def answer(number: int) -> bytes:
        if number == 1:
            gate.wait(10)
        return OK + b"good"

    with toy_server(answer) as address:
        result = open_loop(address, [QUESTION], [0.0, 0.01], lines=1, events=[(0.2, gate.set)])
    # the second was due at 0.01 s and could be sent only when the first was answered, after 0.2 s
    assert [one.latency_s >= 0.19 for one in result.outcomes] == [True, True]


def test_a_server_that_never_answers_is_given_up() -> None:
    with toy_server(lambda _: b"") as address:
        result = open_loop(address, [QUESTION], [0.0] * 5, patience_s=0.2, lines=2)
    assert [one.status for one in result.outcomes] == [UNANSWERED] * 5
    assert result.statuses == {"no answer": 5}


def test_connections_that_break_and_ports_that_are_shut_are_told_apart() -> None:
    with toy_server(lambda _: None) as address:
        assert [one.status for one in open_loop(address, [QUESTION], [0.0]).outcomes] == [LOST]
    assert [one.status for one in open_loop(("127.0.0.1", free_port()), [QUESTION], [0.0]).outcomes] == [REFUSED]


def test_clients_that_leave_are_no_failures() -> None:
    with toy_server(lambda _: b"") as address:
        result = open_loop(address, [QUESTION], [0.0] * 20, leaving=1.0, leave_within_s=0.05)
    assert [one.status for one in result.outcomes] == [LEFT] * 20
    assert result.failed() == []


def test_an_open_loop_can_be_stopped() -> None:
    stop = threading.Event()
    with toy_server(lambda _: OK + b"good") as address:
        result = open_loop(address, [QUESTION], uniform(100, 60), stop=stop, events=[(0.2, stop.set)])
    assert result.seconds < 30
    assert result.failed() == []


def test_slow_clients_are_told_what_the_server_said() -> None:
    late = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, slow_clients(listener.getsockname(), QUESTION.request, 2, "body", pause_s=0.01) as ended:
        for said in (late, b""):
            line, _ = listener.accept()
            with line:
                head = line.recv(2**16)
                while b"ima" not in head:
                    head += line.recv(2**16)
                line.sendall(said)
        assert seconds_until(lambda: len(ended) == 2, limit_s=10) is not None
    assert sorted(ended) == ["408", "closed"]


def test_load_goes_nowhere_but_to_this_machine() -> None:
    with pytest.raises(ValueError, match="this machine alone"):
        closed_loop(("192.0.2.1", 80), [QUESTION], connections=1, seconds=0.1)


def test_answers_are_read_whole_or_not_at_all() -> None:
    whole = OK + b"good"
    assert [parsed(bytearray(whole[:size])) for size in range(len(whole))] == [None] * len(whole)
    answer = parsed(bytearray(whole))
    assert answer is not None
    assert (answer.status, answer.body, answer.closes) == (200, b"good", False)
    chunked = (
        b"HTTP/1.1 503 X\r\nConnection: Close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\ngoo\r\n1;a=b\r\nd\r\n0\r\n\r\n"
    )
    assert parsed(bytearray(chunked[:-7])) is None
    answer = parsed(bytearray(chunked))
    assert answer is not None
    assert (answer.status, answer.body, answer.closes) == (503, b"good", True)


def test_arrivals_are_as_many_as_asked_for() -> None:
    assert uniform(4, 1.0) == [0.0, 0.25, 0.5, 0.75]
    due_s = poisson(1000, 10.0, seed=3)
    assert due_s == sorted(due_s) == poisson(1000, 10.0, seed=3)
    assert due_s[0] > 0
    assert due_s[-1] < 10
    # a Poisson count of 10,000 has a standard deviation of 100; five of them
    assert abs(len(due_s) - 10_000) < 500


def test_quantiles_and_goodput_by_hand() -> None:
    assert quantile_of([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert quantile_of([4.0, 1.0, 3.0, 2.0], 0.99) == 4.0
    assert math.isnan(quantile_of([], 0.5))
    fast, late = Outcome(0.0, 0.1, 200, right=True), Outcome(0.0, 0.9, 200, right=True)
    result = Result(2.0, [fast, late, Outcome(0.0, 0.1, 200, right=False), Outcome(0.0, 0.1, 429, right=False)])
    assert result.goodput() == 1.0
    assert result.goodput(slo_s=0.5) == 0.5
    assert result.latency_s(1.0) == 0.9


def test_answers_in_batches_are_counted_from_batch_to_batch() -> None:
    # ten answers every second: ten a second, wherever the window is cut
    outcomes = [Outcome(0.0, float(second), 200, right=True) for second in range(1, 10) for _ in range(10)]
    for begin_s, end_s in ((2.0, 8.0), (2.5, 8.9), (2.99, 8.01)):
        assert counted_between(outcomes, begin_s, end_s).goodput() == 10.0


def test_the_knee_is_where_goodput_is_best() -> None:
    assert knee_of({1: 50.0, 8: 96.9, 32: 100.0, 16: 100.0}) == 16
    assert knee_of({1: 0.0, 4: 0.0}) == 1


def test_a_queue_that_is_worked_off_after_a_burst_takes_its_time() -> None:
    during = [Outcome(0.1 * number, 0.1 * number + 0.1, 200, right=True) for number in range(10)]
    afterwards = [Outcome(0.9, 1.0 + 0.1 * number, 200, right=True) for number in range(1, 6)]
    later = [Outcome(1.5, 1.6, 200, right=True)]
    result = Result(2.0, during + afterwards + later)
    assert result.goodput_of_burst(1.0, slo_s=1.0) == pytest.approx(15 / 1.5)
    assert result.goodput_of_burst(1.0, slo_s=0.35) == pytest.approx(12 / 1.2)  # the others came too late
    assert Result(2.0, []).goodput_of_burst(1.0, slo_s=1.0) == 0


def a_visit(knee: float, p99_ms: float = 4.0, wrong: int = 0) -> Visit:
    points = [(0.8, "even"), *((share, "poisson") for share in SHARES)]
    offered = [
        Offered(share, how, share * knee, min(share, 1) * knee, 2.0, p99_ms, {"200": 9}, 0) for share, how in points
    ]
    return Visit(1.5, 200.0, 150.0, 2.0, {1: knee / 2, 8: knee}, 8, knee, 1.0, offered, wrong)


def found() -> Found:
    return Found(
        ceilings=[Ceiling({1: 80.0, 8: 110.0}, 100.0, QUEUEING), Ceiling({1: 90.0, 8: 130.0}, 120.0, QUEUEING)],
        int8_ceilings=[Ceiling({1: 200.0}, 200.0, QUEUEING)] * 2,
        visits={
            "ltkd": [a_visit(96), a_visit(118)],
            "ltkd, int8": [a_visit(180)] * 2,
            "mosec": [a_visit(100), a_visit(90)],
        },
        missing={"Ray Serve": "it could not be installed: no network"},
    )


def test_ratios_are_taken_within_a_round_and_promises_are_held_against_their_median() -> None:
    assert ratios(Spread((10.0, 30.0)), Spread((5.0, 10.0))).values == (2.0, 3.0)
    kept = {check.what: check for check in checks("resnet20", found())}
    ceiling = kept["goodput at the knee over the ceiling"]
    assert ceiling.seen.values == pytest.approx((0.96, 118 / 120))
    assert ceiling.kept
    assert kept["(b) by default: over mosec"].seen.values == (1.8, 2.0)
    assert kept["p99 at 80 % of the knee (poisson arrivals) over p50 alone"].seen.values == (2.0, 2.0)
    assert not any("(a)" in what for what in kept)  # mosec is no Python front, and none of those was measured


def test_a_wrong_answer_or_a_missing_figure_breaks_a_promise() -> None:
    broken = found()
    broken.visits["mosec"] = [a_visit(100, wrong=1)] * 2
    broken.visits["ltkd"] = [a_visit(96, p99_ms=math.nan)] * 2
    kept = {check.what: check.kept for check in checks("resnet20", broken)}
    assert not kept["wrong answers of all servers"]
    assert not kept["p99 at 80 % of the knee (even arrivals) over p50 alone"]


def test_the_report_names_what_was_left_out_and_is_strict_json(tmp_path: Path) -> None:
    about = {"command": "c", "commit": "0", "date": "d", "hardware": "h", "repeats": 2}
    text = markdown({"resnet20": found()}, about)
    assert "| Ray Serve | left out: it could not be installed: no network |" in text
    assert "| mosec | 95 (90 to 100) |" in text
    read = json.loads(json.dumps(content({"resnet20": found()}, about), allow_nan=False))
    knee = read["workloads"]["resnet20"]["servers"]["ltkd"]["goodput_at_the_knee"]
    assert knee == {"median": 107.0, "lowest": 96.0, "highest": 118.0, "values": [96.0, 118.0]}
    assert statistics.median(knee["values"]) == knee["median"]
    plot({"resnet20": found()}, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_every_peer_is_pinned_to_the_version_that_is_reported_and_no_address_is_named() -> None:
    for peer in PEER_SERVERS.values():
        assert peer.version
        lines = peer.requirements.read_text().splitlines()
        assert all(line.count("==") == 1 and "/" not in line and "@" not in line for line in lines)
        assert (peer.requirements.parent / f"{peer.module}.py").is_file()


def test_a_peer_that_is_installed_is_not_installed_again(tmp_path: Path) -> None:
    peer = PEER_SERVERS["mosec"]
    (tmp_path / peer.module).mkdir()
    (tmp_path / peer.module / "installed.txt").write_text(peer.requirements.read_text())
    assert install(peer, tmp_path) == tmp_path / peer.module / "bin"


def test_unknown_names_are_refused_and_folders_of_this_machine_stay_out_of_the_record() -> None:
    with pytest.raises(Exception, match="nothing: not one of"):
        listed({"mosec": 0})("mosec,nothing")
    import argparse

    given = argparse.Namespace(quick=True, repeats=2, workloads=["resnet8"], peers=["mosec"], cache=Path("/secret"))
    assert " ".join(flags(given)) == "--quick --repeats 2 --workloads resnet8 --peers 'mosec'"


def test_a_core_is_taken_and_given_back() -> None:
    before = os.sched_getaffinity(0)
    with on_core(1):
        here = os.sched_getaffinity(0)
        with on_core(0):  # not the first of the one that is left
            there = os.sched_getaffinity(0)
    assert len(here) == len(there) == 1
    assert (here == there) == (len(before) == 1)
    assert os.sched_getaffinity(0) == before


def test_the_processes_of_a_server_are_its_own_children() -> None:
    running = Running(("127.0.0.1", 1), 0.0, "no process carries this", os.getpid(), "/x", lambda _: Named(0, 1.0))
    assert running.children() == []
    assert not running.has_ended()
    child = subprocess.Popen([sys.executable, "-c", ""])
    gone = dataclasses.replace(running, pid=child.pid)
    assert seconds_until(gone.has_ended) is not None  # nobody has waited for it
    child.wait()
    assert gone.has_ended()


@pytest.mark.slow
def test_every_process_of_a_service_is_found_and_ended(tmp_path: Path) -> None:
    with ours_running(write_toy_bundle(tmp_path / "toy"), encoded(toy_pixels(0)), "image/png") as running:
        processes = running.processes()
        assert running.pid in processes
        assert running.children()
        assert running.resident_mib() >= running.proportional_mib() > 0
        assert running.processor_s() > 0
    assert marked_processes(running.mark) == []
    with pytest.raises(ProcessLookupError):
        os.kill(running.pid, signal.SIGCONT)


def test_asking_one_by_one_asks_every_question_once() -> None:
    with toy_server(lambda _: OK + b"good") as address:
        result = one_by_one(address, [QUESTION] * 3)
    assert [one.right for one in result.outcomes] == [True] * 3
