"""The services that are compared: how each is installed, started on one core, asked, and ended with all its processes.

A peer is a file of benchmarks/peers with the pinned packages it needs. On first use they are installed by uv into an
environment of the peer's own below the cache folder; the decoder comes from this project's source. What cannot be
installed or started is reported with its reason and takes part in nothing.
"""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import Address, Question, http_request, one_by_one
from benchmarks.shapes import Workload

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "peers"
OURS, OURS_BY_DEFAULT = "ltkd", "ltkd, int8"
START_SECONDS = 120.0
_MARK = "BENCHMARK_RUN"  # every process of a server inherits it, whatever it does to its parents


class NotStartedError(Exception):
    """A server that cannot take part; the message says why."""


@dataclass(frozen=True)
class Named:
    """What an answer says: the class, and how probable it is."""

    class_index: int
    probability: float


@dataclass(frozen=True)
class Peer:
    """A server made by others.

    Attributes:
        package: What it is called, and which version the requirements name.
        module: Its file and its requirements in benchmarks/peers.
        max_batch: The batch size with which it did best here, of 1, 8, 16 and 32
        wait_ms: The wait with which it did best here, of what it allows between 0 and 10.
        words: Its command after the environment's ``bin``; by default its file is run.
        starts_on_all_cores: It gets its one core when it answers; some of its processes give up if they start slowly.
    """

    package: str
    module: str
    max_batch: int
    wait_ms: float
    words: Sequence[str] = ()
    starts_on_all_cores: bool = False

    @property
    def requirements(self) -> Path:
        """Every package that it runs with."""
        return PEERS / f"{self.module}.txt"

    @property
    def version(self) -> str:
        """The pinned version of its package."""
        lines = self.requirements.read_text().splitlines()
        return next(line.partition("==")[2] for line in lines if line.startswith(f"{self.package}=="))


PEER_SERVERS = {
    "FastAPI handler": Peer("fastapi", "fastapi_handler", max_batch=1, wait_ms=0),
    "LitServe": Peer("litserve", "litserve_api", max_batch=16, wait_ms=1),
    "BentoML": Peer(
        "bentoml", "bentoml_service", max_batch=32, wait_ms=1000,
        words=("bentoml", "serve", "benchmarks.peers.bentoml_service:Classify", "--host", "127.0.0.1"),
    ),
    "Ray Serve": Peer("ray", "ray_serve", max_batch=16, wait_ms=1, starts_on_all_cores=True),
    "mosec": Peer("mosec", "mosec_worker", max_batch=16, wait_ms=1),
}  # fmt: skip


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        address: Where it listens.
        ready_s: From the start of its process to its first right answer.
        mark: What its processes carry in their environment.
        pid: The process that was started.
        path: Where images go.
        named: Reads an answer.
        key: Sent with every request; empty for none.
    """

    address: Address
    ready_s: float
    mark: str
    pid: int
    path: str
    named: Callable[[bytes], Named]
    key: str = ""

    def question(self, image: bytes, media_type: str, expected: Named) -> Question:
        """A request with its right answer: the class, and the probability that it had when asked alone."""

        def is_right(body: bytes) -> bool:
            seen = self.named(body)
            # another batch size adds up in another order, which moves a float32 probability by some 1e-6, int8 by more
            return seen.class_index == expected.class_index and abs(seen.probability - expected.probability) < 0.02

        return Question(http_request(self.path, image, media_type, bearer(self.key)), is_right)

    def asked_alone(self, images: Sequence[bytes], media_type: str) -> list[Named]:
        """What it says of every image when nothing else is going on; shorter than the images where it fails."""
        seen: list[Named] = []

        def note(body: bytes) -> bool:
            seen.append(self.named(body))
            return True

        requests = [http_request(self.path, image, media_type, bearer(self.key)) for image in images]
        one_by_one(self.address, [Question(request, note) for request in requests])
        return seen

    def processes(self) -> list[int]:
        """All its processes."""
        return marked_processes(self.mark)

    def children(self) -> list[int]:
        """The processes that the first one started itself."""
        return [pid for pid in self.processes() if _stat(pid)[1] == str(self.pid)]

    def has_ended(self) -> bool:
        """Whether the first process is over, even if nobody has asked yet how it ended."""
        return _stat(self.pid)[0] in ("Z", "0")

    def resident_mib(self) -> float:
        """The resident memory of all its processes; pages that they share count in each."""
        return sum(_status_kib(pid, "status", "VmRSS:") for pid in self.processes()) / 1024

    def processor_s(self) -> float:
        """The processor time that all its processes have taken so far."""
        ticks = sum(sum(map(int, _stat(pid)[11:13])) for pid in self.processes())
        return ticks / os.sysconf("SC_CLK_TCK")

    def proportional_mib(self) -> float:
        """The same with a page that several share counted once."""
        return sum(_status_kib(pid, "smaps_rollup", "Pss:") for pid in self.processes()) / 1024


def bearer(key: str) -> str:
    """The header line that shows a key; nothing without one."""
    return f"Authorization: Bearer {key}\r\n" if key else ""


def named_by_us(body: bytes) -> Named:
    """The first result of POST /v1/classify."""
    first = json.loads(body)["results"][0]
    return Named(first["class_index"], first["probability"])


def named_by_peer(body: bytes) -> Named:
    """The answer of benchmarks/peers/model.py; BentoML answers a list with one of them."""
    content = json.loads(body)
    first = (content[0] if isinstance(content, list) else content)["top_k"][0]
    return Named(first["class_index"], first["probability"])


def install(peer: Peer, cache: Path) -> Path:
    """The ``bin`` of a peer's environment, made on first use.

    Raises:
        NotStartedError: It cannot be installed here.
    """
    environment = cache / peer.module
    stamp = environment / "installed.txt"
    wanted = peer.requirements.read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        return environment / "bin"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    uv = shutil.which("uv", path=path)
    if uv is None:
        raise NotStartedError("uv is not there to install it; pip install uv")
    python = environment / "bin" / "python"
    for words in (
        ["venv", "--quiet", "--clear", "--python", sys.executable, str(environment)],
        ["pip", "install", "--quiet", "--no-deps", "--python", str(python), "--requirement", str(peer.requirements)],
    ):
        done = subprocess.run([uv, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotStartedError(f"it could not be installed: {' '.join(done.stderr.split())[:300]}")
    stamp.write_text(wanted)
    return environment / "bin"


@contextmanager
def peer_running(peer: Peer, cache: Path, bundle: Path, workload: Workload, image: bytes) -> Iterator[Running]:
    """A peer on one core of its own, until the block ends.

    Raises:
        NotStartedError: It cannot be installed or does not answer.
    """
    binaries = install(peer, cache)
    port = free_port()
    variables = {
        "PATH": os.pathsep.join([str(binaries), os.environ.get("PATH", "")]),
        "PYTHONPATH": str(ROOT),
        "PEER_MODEL": str((bundle / "model.onnx").resolve()),
        "PEER_SIZE_PX": str(workload.input_px),
        "PEER_PORT": str(port),
        "PEER_MAX_BATCH": str(peer.max_batch),
        "PEER_WAIT_MS": str(peer.wait_ms),
        "BENTOML_DO_NOT_TRACK": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if peer.words:
        command = [str(binaries / peer.words[0]), *peer.words[1:], "--port", str(port)]
    else:
        command = [str(binaries / "python"), "-m", f"benchmarks.peers.{peer.module}"]
    core = None if peer.starts_on_all_cores else 0
    with _running(command, variables, port, "/classify", named_by_peer, image, workload.media_type, core) as running:
        if peer.starts_on_all_cores:
            move(running.processes(), 0)
        yield running


@contextmanager
def ours_running(
    bundle: Path,
    image: bytes,
    media_type: str,
    variables: Mapping[str, str] | None = None,
    core: int | None = 0,
    key: str = "",
) -> Iterator[Running]:
    """Our service as ``ltkd serve`` starts it, until the block ends.

    Args:
        bundle: What it serves.
        image: What it is asked until it answers.
        media_type: Of the image.
        variables: Its settings; by default there are none.
        core: The core it gets, by its place among those of this process; None leaves it all of them.
        key: Sent with every request, for a service that asks for one.

    Raises:
        NotStartedError: It does not answer.
    """
    port = free_port()
    command = [sys.executable, "-m", "ltkd", "serve", str(bundle), "--port", str(port)]
    given = {"PYTHONPATH": str(ROOT), **(variables or {})}
    with _running(command, given, port, "/v1/classify", named_by_us, image, media_type, core, key) as running:
        yield running


@contextmanager
def _running(
    command: Sequence[str],
    variables: Mapping[str, str],
    port: int,
    path: str,
    named: Callable[[bytes], Named],
    image: bytes,
    media_type: str,
    core: int | None = 0,
    key: str = "",
) -> Iterator[Running]:
    mark, address = uuid.uuid4().hex, ("127.0.0.1", port)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LTKD_", "PEER_"))}
    environment |= {**variables, _MARK: mark, "OMP_NUM_THREADS": "1"}
    request = http_request(path, image, media_type, bearer(key))
    question = Question(request, lambda body: named(body).class_index >= 0)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w+") as said:
        begin = time.perf_counter()
        with on_core(core):
            process = subprocess.Popen(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip
        try:
            while not _answers(address, question):
                if process.poll() is not None or time.perf_counter() - begin > START_SECONDS:
                    said.seek(0)
                    last = " ".join(said.read().split())[-400:]
                    raise NotStartedError(
                        f"it did not answer within {START_SECONDS:g} s: {last}"
                        if process.returncode is None
                        else f"it ended with code {process.returncode}: {last}"
                    )
            yield Running(address, time.perf_counter() - begin, mark, process.pid, path, named, key)
        finally:
            end(process, mark)


def _answers(address: Address, question: Question) -> bool:
    try:
        with socket.create_connection(address, timeout=1):
            pass
    except OSError:
        time.sleep(0.005)
        return False
    return any(outcome.right for outcome in one_by_one(address, [question]).outcomes)


def end(process: "subprocess.Popen[bytes]", mark: str, patience_s: float = 15.0) -> None:
    """End a server and every process that it started: politely, and after a while not."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        left_by = time.monotonic() + 2.0
        for pid in marked_processes(mark):
            _send(pid, number)
        while marked_processes(mark) and time.monotonic() < left_by:
            time.sleep(0.02)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def marked_processes(mark: str) -> list[int]:
    """The processes that carry a mark in their environment."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:  # gone, or another user's
                continue
    return sorted(found)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may hold anything; zeros once the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["0"] * 50


def _status_kib(pid: int, file: str, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


@functools.cache
def cores() -> tuple[int, ...]:
    """The cores that this process was given, before it chose one of them."""
    return tuple(sorted(os.sched_getaffinity(0)))


@contextmanager
def on_core(place: int | None) -> Iterator[None]:
    """Stay on one of the cores, or with None on all; what is started meanwhile stays there for good."""
    given, before = cores(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, given if place is None else {given[place % len(given)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def move(processes: Sequence[int], place: int) -> None:
    """Put running processes with all their threads on one of the cores."""
    for pid in processes:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), {cores()[place % len(cores())]})


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
