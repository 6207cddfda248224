"""The attacks: planted faults show that each check can fail, and a short form runs against a real service."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from serve_toys import encoded, toy_pixels, write_toy_bundle

from benchmarks.attack_report import promises, table
from benchmarks.attack_watch import Check, Observed, Phase, Sample, Watch, checks
from benchmarks.attacks import ATTACKS, ROLES, STRANGER, Plan, Site, measure_phase, run, served_site, tracebacks
from benchmarks.fault_test import seconds_until
from benchmarks.hostile_clients import Attack, AttackResult, HostileClient, Target, run_attacks
from benchmarks.load import Request, http_request
from benchmarks.servers import ROOT, Prediction, RunningServer
from tests.benchmarks.test_serving import serving

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"
FAILED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
IMAGE = encoded(toy_pixels(0))


@contextmanager
def stand_in(response: Callable[[bytes], bytes]) -> Iterator[Site]:
    """A server that gives every block of bytes a response, and its ordinary clients."""

    def serve_one(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(2**20):
                    connection.sendall(response(data))
            except OSError:  # a client that left
                return

    request = Request(http_request("/x", b"image", "image/png"), lambda body: body == b"good")
    keys = {name: f"ltkd_{name}" for name in (*ROLES, STRANGER)}
    with serving(serve_one) as address:
        running = RunningServer(address, 0.0, "no process has it", os.getpid(), "/x", lambda _: Prediction(0, 1.0))
        target = Target(address, keys, "toy", IMAGE, "image/png", "ant", 10)
        yield Site(running, [request], target, rate=50.0, settle_s=0.0)


def phase_with(response: Callable[[bytes], bytes], attacks: Mapping[str, Attack], seconds: float = 0.4) -> Phase:
    with stand_in(response) as site, Watch(site.running) as watch, ThreadPoolExecutor(1) as executor:
        return measure_phase(site, watch, executor, "one", attacks, seconds)


def sample(at_s: float, resident_mib: float = 150.0) -> Sample:
    return Sample(at_s, livez_s=0.01, livez=200, readyz=200, resident_mib=resident_mib)


def fine() -> Observed:
    samples = [sample(float(second)) for second in range(40)]
    attacked = AttackResult(requests=5, statuses={"400": 5}, violations={})
    phases = [
        Phase("none", 1.0, {"200": 9}, errors=0, wrong=0, lost=0, p99_ms=2.0, livez_ms=1.0),
        Phase("wrong-keys", 1.0, {"200": 8, "429": 2}, errors=0, wrong=0, lost=0, p99_ms=3.0, livez_ms=4.0,
            attacks={"wrong-keys": attacked}),
        Phase("all together", 1.0, {"200": 9}, errors=0, wrong=0, lost=0, p99_ms=3.0, livez_ms=4.0,
            attacks={"wrong-keys": attacked}),
    ]  # fmt: skip
    return Observed(phases, samples, samples, True, True, 150.0, {}, shutdown_s=1.0, shutdown_limit_s=9.5)


def kept(observed: Observed) -> list[bool]:
    return [check.kept for check in checks(observed)]


def broken_phase(**changes: object) -> Sequence[Phase]:
    first, second, third = fine().phases
    return [first, replace(second, **changes), third]  # type: ignore[arg-type]


def grown(resident_mib: Callable[[int], float]) -> dict[str, Sequence[Sample]]:
    samples = [sample(float(second), resident_mib(second)) for second in range(40)]
    return {"samples": samples, "mixed_samples": samples}


VIOLATED = {"wrong-keys": AttackResult(1, {"200": 1}, {"a guessed key: 200": 1})}
PLANTED: dict[str, tuple[dict[str, object], str]] = {
    "the server process exited": ({"same_server": False}, "the processes at the end"),
    "an engine process was replaced": ({"same_engines": False}, "the processes at the end"),
    "an engine process was replaced in a phase": (
        {"phases": broken_phase(engines_replaced=True)}, "the processes at the end"
    ),
    "an ordinary client got 500": ({"phases": broken_phase(errors=1, lost=1)}, "ordinary clients"),
    "an ordinary client got a wrong answer": ({"phases": broken_phase(wrong=1, lost=1)}, "ordinary clients"),
    "an ordinary client got nothing": ({"phases": broken_phase(lost=1)}, "ordinary clients"),
    "no ordinary client sent anything": ({"phases": broken_phase(statuses={})}, "ordinary clients"),
    "an attack got what it must not get": ({"phases": broken_phase(attacks=VIOLATED)}, "each attack"),
    "/livez was slow once": (
        {"samples": [*fine().samples, replace(sample(40.0), livez_s=1.2)]}, "/livez is answered within"
    ),
    "/livez was not answered once": (
        {"samples": [*fine().samples, replace(sample(40.0), livez=0)]}, "/livez is answered with 200"
    ),
    "/readyz was 503 once": ({"samples": [*fine().samples, replace(sample(40.0), readyz=503)]}, "/readyz"),
    "memory grows": (grown(lambda second: 150.0 + 2.0 * second), "resident memory is flat"),
    "too few samples to know": ({"mixed_samples": fine().samples[:3]}, "resident memory is flat"),
    "memory has a high peak": (grown(lambda second: 900.0 if second == 7 else 150.0), "resident memory stays"),
    "a traceback": ({"tracebacks": {"KeyError: 1": 1}}, "the output"),
    "a slow shutdown": ({"shutdown_s": 12.0}, "SIGTERM"),
    "a shutdown without end": ({"shutdown_s": None}, "SIGTERM"),
}  # fmt: skip


def test_without_faults_every_promise_is_kept() -> None:
    assert all(kept(fine()))


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_breaks_its_promise_and_no_other(fault: str) -> None:
    changes, promise = PLANTED[fault]
    broken = [check.promise for check in checks(replace(fine(), **changes)) if not check.kept]  # type: ignore[arg-type]
    assert len(broken) == 1
    assert broken[0].startswith(promise)


def test_memory_may_vary_and_settle_on_a_higher_value() -> None:
    varying = grown(lambda second: (150.0 if second < 8 else 300.0) + 20.0 * (second % 2))
    assert all(kept(replace(fine(), **varying)))  # type: ignore[arg-type]


def test_a_server_that_fails_for_ordinary_clients_is_reported() -> None:
    phase = phase_with(lambda _: FAILED, {})
    assert phase.lost == phase.errors == phase.requests > 5
    phase = phase_with(lambda _: OK.replace(b"good", b"evil"), {})
    assert phase.lost == phase.wrong == phase.requests > 5
    assert phase_with(lambda _: OK, {}).lost == 0


# 200 is never allowed for these, and their bodies are made at once
STRICT = ("malformed-http", "upgrade", "key-in-trailer", "body-never-continued", "slow-header", "slow-body")


@pytest.mark.parametrize("name", STRICT)
def test_an_attack_that_succeeds_is_reported(name: str) -> None:
    phase = phase_with(lambda _: OK, {name: ATTACKS[name]})
    assert phase.attacks[name].violations
    assert phase.lost == 0


@pytest.mark.parametrize("name", STRICT)
def test_an_attack_that_breaks_the_server_is_reported(name: str) -> None:
    def respond(data: bytes) -> bytes:
        return OK if b"POST /x " in data else FAILED

    phase = phase_with(respond, {name: ATTACKS[name]})
    assert "500" in phase.attacks[name].statuses
    assert phase.attacks[name].violations
    assert phase.lost == 0


def test_an_attack_that_is_rejected_is_not_reported() -> None:
    rejection = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
    attacks = {"key-in-trailer": ATTACKS["key-in-trailer"]}
    phase = phase_with(lambda data: OK if b"POST /x " in data else rejection, attacks)
    assert set(phase.attacks["key-in-trailer"].statuses) == {"401"}
    assert not phase.attacks["key-in-trailer"].violations


def test_bytes_that_are_not_http_are_reported() -> None:
    async def ask(client: HostileClient) -> None:
        client.note("a request", await client.talk(client.target.classify()))

    phase = phase_with(lambda data: OK if b"POST /x " in data else b"nonsense", {"ask": Attack(ask)})
    assert set(phase.attacks["ask"].violations) == {"a request: not HTTP"}


def test_an_error_in_an_attack_is_not_hidden() -> None:
    async def broken(_: HostileClient) -> None:
        raise KeyError("planted")

    with stand_in(lambda _: OK) as site, pytest.raises(ExceptionGroup):
        run_attacks({"broken": Attack(broken)}, site.target, seconds=5.0)


def test_attacks_are_sent_to_loopback_addresses_only() -> None:
    target = Target(("192.0.2.1", 80), {}, "toy", IMAGE, "image/png", "ant", 10)
    with pytest.raises(ValueError, match="loopback addresses only"):
        run_attacks({}, target, seconds=0.1)


def test_the_time_is_divided_among_the_attacks() -> None:
    short, long = Plan.of(60.0, 24), Plan.of(3600.0, 24)
    assert (short.before_s, short.alone_s, short.mixed_s) == (3.0, 1.25, 27.0)
    assert (long.before_s, long.alone_s, long.mixed_s) == (30.0, 20.0, 3090.0)


def test_the_report_has_a_row_for_each_attack_and_each_promise() -> None:
    text = table(fine().phases, {"wrong-keys": "Guessed keys"})
    assert "| Guessed keys | 10 | 10 400 | 10 | 0 | 20.00% | 3.0 ms | 4 ms |" in text
    assert "| all together | 5 |" in text
    assert promises([Check("promise", "seen", kept=False)]).endswith("| promise | seen | **no** |")
    assert all((attack.attempt.__doc__ or "").partition("\n")[0].endswith(".") for attack in ATTACKS.values())


def test_tracebacks_are_found_in_the_output() -> None:
    log = "info\nTraceback (most recent call last):\n  File 'a', line 1, in b\n    c()\nKeyError: 1\nmore\n"
    assert tracebacks(log * 2) == {"KeyError: 1": 2}
    closed = "Traceback (most recent call last):\n  f()\nRuntimeError: <TCPTransport 0x{:x}> is closed\n"
    assert tracebacks(closed.format(1) + closed.format(2)) == {"RuntimeError: <TCPTransport 0x...> is closed": 2}
    assert tracebacks("all is well\n") == {}


@pytest.mark.slow
def test_an_engine_that_is_killed_during_the_attacks_is_reported(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "toy")
    attacks = {"wrong-keys": ATTACKS["wrong-keys"]}
    with (
        served_site(bundle, [IMAGE], "image/png", seconds=0.5) as site,
        ThreadPoolExecutor(1) as executor,
        ThreadPoolExecutor(1) as killer,
    ):
        site = replace(site, rate=50.0)  # noqa: PLW2901
        (engine,) = site.running.children()
        reported = list[str]()

        def kill_when_attacked() -> None:
            assert seconds_until(lambda: bool(reported)) is not None
            os.kill(engine, signal.SIGKILL)

        killed = killer.submit(kill_when_attacked)
        observed = run(site, attacks, Plan(0.5, 1.5, 4.0), executor, reported.append)
        killed.result()
    assert "engine processes replaced during: wrong-keys" in promises(checks(observed))
    assert not observed.same_engines


TIMED = ("/livez is answered within", "SIGTERM")  # they need a machine without other load


@pytest.mark.slow
def test_a_minute_of_attacks_breaks_no_promise(tmp_path: Path) -> None:
    # a fifth of the load, for machines that run other programs at the same time
    arguments = ["--seconds", "60", "--share", "0.2", "--bundle", str(write_toy_bundle(tmp_path / "toy"))]
    command = [sys.executable, "-m", "benchmarks.attacks", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=290)
    assert result.returncode in (0, 1), result.stderr
    broken = [line for line in result.stdout.splitlines() if line.endswith("| **no** |")]
    assert "| promise | observed | kept |" in result.stdout
    assert not [line for line in broken if not line.startswith(tuple(f"| {promise}" for promise in TIMED))], broken


def test_nothing_that_was_not_observed_is_promised() -> None:
    unobserved = checks(replace(fine(), samples=[], mixed_samples=[]))
    assert {check.promise[:6] for check in unobserved if not check.kept} == {"/livez", "/ready", "reside"}
