"""Start and stop the servers that the benchmarks compare: our service, and peers (servers made with other frameworks).

A peer is a file in benchmarks/peers with pinned requirements. On first use, uv installs the requirements into an
environment in the cache folder. A peer that cannot be installed or started is reported with the reason and excluded
from the comparison. Each server runs on one core, and all its processes are stopped at the end.
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

from benchmarks.load import Address, Request, http_request, send_one_by_one
from benchmarks.workload_specs import Workload

ROOT = Path(__file__).parent.parent
PEER_FOLDER = ROOT / "benchmarks" / "peers"
LTKD_FP32, LTKD_INT8 = "ltkd", "ltkd, int8"
START_SECONDS = 120.0
_RUN_VARIABLE = "BENCHMARK_RUN"  # all processes of a server inherit it, even those detached from their parents


class NotStartedError(Exception):
    """A server cannot take part; the message has the reason."""


@dataclass(frozen=True)
class Prediction:
    """The most probable class in a response, and its probability."""

    class_index: int
    probability: float


@dataclass(frozen=True)
class Peer:
    """A server made with another framework.

    Attributes:
        package: Name of the package; the requirements pin its version.
        module: Name of its file and of its requirements in benchmarks/peers.
        max_batch: The batch size with which it was fastest here, of 1, 8, 16 and 32.
        wait_ms: The batching delay with which it was fastest here, of the allowed values between 0 and 10.
        command: Its command in the environment's ``bin``; by default its file is run.
        starts_on_all_cores: Pinned to its core only when it answers; some of its processes fail if they start slowly.
    """

    package: str
    module: str
    max_batch: int
    wait_ms: float
    command: Sequence[str] = ()
    starts_on_all_cores: bool = False

    @property
    def requirements(self) -> Path:
        """The file with all packages of its environment."""
        return PEER_FOLDER / f"{self.module}.txt"

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
        command=("bentoml", "serve", "benchmarks.peers.bentoml_service:Classify", "--host", "127.0.0.1"),
    ),
    "Ray Serve": Peer("ray", "ray_serve", max_batch=16, wait_ms=1, starts_on_all_cores=True),
    "mosec": Peer("mosec", "mosec_worker", max_batch=16, wait_ms=1),
}  # fmt: skip


@dataclass(frozen=True)
class RunningServer:
    """A server that answers requests.

    Attributes:
        address: Address on which it listens.
        ready_s: Seconds from the start of its process to its first correct response.
        run_id: Value of an environment variable that all its processes inherit.
        pid: The process that was started.
        path: URL path that classifies images.
        parse_prediction: Parses the body of a response.
        key: API key sent with every request; empty for none.
        log: The file with its output, while it runs; None if it was started elsewhere.
    """

    address: Address
    ready_s: float
    run_id: str
    pid: int
    path: str
    parse_prediction: Callable[[bytes], Prediction]
    key: str = ""
    log: Path | None = None

    def request(self, image: bytes, media_type: str, expected: Prediction) -> Request:
        """A request whose correct response is known: the class, and its probability when sent alone."""

        def is_correct(body: bytes) -> bool:
            predicted = self.parse_prediction(body)
            # the order of summation depends on the batch size: probabilities differ by 1e-6 in float32, more in int8
            is_same_class = predicted.class_index == expected.class_index
            return is_same_class and abs(predicted.probability - expected.probability) < 0.02

        return Request(http_request(self.path, image, media_type, authorization_header(self.key)), is_correct)

    def predict_one_by_one(self, images: Sequence[bytes], media_type: str) -> list[Prediction]:
        """Its predictions when the images are sent one after another; fewer than the images if a request fails."""
        predictions: list[Prediction] = []

        def add_prediction(body: bytes) -> bool:
            predictions.append(self.parse_prediction(body))
            return True

        contents = [http_request(self.path, image, media_type, authorization_header(self.key)) for image in images]
        send_one_by_one(self.address, [Request(content, add_prediction) for content in contents])
        return predictions

    def processes(self) -> list[int]:
        """All its processes."""
        return processes_of_run(self.run_id)

    def children(self) -> list[int]:
        """The direct children of its first process."""
        return [pid for pid in self.processes() if _stat(pid)[1] == str(self.pid)]

    def has_exited(self) -> bool:
        """Whether the first process has exited, even if its exit status was not read yet."""
        return _stat(self.pid)[0] in ("Z", "0")

    def resident_mib(self) -> float:
        """The resident memory of all its processes; shared pages are counted in each process."""
        return sum(_status_kib(pid, "status", "VmRSS:") for pid in self.processes()) / 1024

    def cpu_s(self) -> float:
        """The processor time that all its processes have used so far."""
        ticks = sum(sum(map(int, _stat(pid)[11:13])) for pid in self.processes())
        return ticks / os.sysconf("SC_CLK_TCK")

    def proportional_mib(self) -> float:
        """The memory of all its processes, with shared pages counted once."""
        return sum(_status_kib(pid, "smaps_rollup", "Pss:") for pid in self.processes()) / 1024


def authorization_header(key: str) -> str:
    """The Authorization header line for a key; empty without a key."""
    return f"Authorization: Bearer {key}\r\n" if key else ""


def parse_ltkd_response(body: bytes) -> Prediction:
    """Parse the response of POST /v1/classify: the first result."""
    first = json.loads(body)["results"][0]
    return Prediction(first["class_index"], first["probability"])


def parse_peer_response(body: bytes) -> Prediction:
    """Parse the response of benchmarks/peers/model.py; BentoML returns it in a list of one."""
    content = json.loads(body)
    first = (content[0] if isinstance(content, list) else content)["top_k"][0]
    return Prediction(first["class_index"], first["probability"])


def install(peer: Peer, cache: Path) -> Path:
    """Install a peer's environment if necessary, and return its ``bin`` folder.

    Raises:
        NotStartedError: The environment cannot be installed here.
    """
    environment = cache / peer.module
    stamp = environment / "installed.txt"
    requirements = peer.requirements.read_text()
    if stamp.is_file() and stamp.read_text() == requirements:
        return environment / "bin"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    uv = shutil.which("uv", path=path)
    if uv is None:
        raise NotStartedError("uv is needed to install it but was not found; run: pip install uv")
    python = environment / "bin" / "python"
    for arguments in (
        ["venv", "--quiet", "--clear", "--python", sys.executable, str(environment)],
        ["pip", "install", "--quiet", "--no-deps", "--python", str(python), "--requirement", str(peer.requirements)],
    ):
        process = subprocess.run([uv, *arguments], capture_output=True, text=True, check=False)
        if process.returncode:
            raise NotStartedError(f"it could not be installed: {' '.join(process.stderr.split())[:300]}")
    stamp.write_text(requirements)
    return environment / "bin"


@contextmanager
def running_peer(peer: Peer, cache: Path, bundle: Path, workload: Workload, image: bytes) -> Iterator[RunningServer]:
    """A peer that runs on one core until the block ends.

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
    if peer.command:
        command = [str(binaries / peer.command[0]), *peer.command[1:], "--port", str(port)]
    else:
        command = [str(binaries / "python"), "-m", f"benchmarks.peers.{peer.module}"]
    core = None if peer.starts_on_all_cores else 0
    with _running_server(
        command, variables, port, "/classify", parse_peer_response, image, workload.media_type, core
    ) as running:
        if peer.starts_on_all_cores:
            pin_to_core(running.processes(), 0)
        yield running


@contextmanager
def running_service(
    bundle: Path,
    image: bytes,
    media_type: str,
    variables: Mapping[str, str] | None = None,
    core: int | None = 0,
    key: str = "",
) -> Iterator[RunningServer]:
    """Our service, started by ``ltkd serve``, until the block ends.

    Args:
        bundle: The bundle that it serves.
        image: Sent repeatedly until it is answered.
        media_type: Media type of the image.
        variables: Environment variables for its settings; none by default.
        core: Index of the core among those of this process; None for all cores.
        key: API key sent with every request, for a service that requires one.

    Raises:
        NotStartedError: It does not answer.
    """
    port = free_port()
    command = [sys.executable, "-m", "ltkd", "serve", str(bundle), "--port", str(port)]
    environment = {"PYTHONPATH": str(ROOT), **(variables or {})}
    with _running_server(
        command, environment, port, "/v1/classify", parse_ltkd_response, image, media_type, core, key
    ) as running:
        yield running


@contextmanager
def _running_server(
    command: Sequence[str],
    variables: Mapping[str, str],
    port: int,
    path: str,
    parse_prediction: Callable[[bytes], Prediction],
    image: bytes,
    media_type: str,
    core: int | None = 0,
    key: str = "",
) -> Iterator[RunningServer]:
    run_id, address = uuid.uuid4().hex, ("127.0.0.1", port)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LTKD_", "PEER_"))}
    environment |= {**variables, _RUN_VARIABLE: run_id, "OMP_NUM_THREADS": "1"}
    content = http_request(path, image, media_type, authorization_header(key))
    request = Request(content, lambda body: parse_prediction(body).class_index >= 0)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+") as output:
        begin = time.perf_counter()
        with pinned_to_core(core):
            process = subprocess.Popen(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        try:
            while not _gives_correct_response(address, request):
                if process.poll() is not None or time.perf_counter() - begin > START_SECONDS:
                    output.seek(0)
                    last = " ".join(output.read().split())[-400:]
                    raise NotStartedError(
                        f"it did not answer within {START_SECONDS:g} s: {last}"
                        if process.returncode is None
                        else f"it exited with code {process.returncode}: {last}"
                    )
            ready_s, log = time.perf_counter() - begin, Path(output.name)
            yield RunningServer(address, ready_s, run_id, process.pid, path, parse_prediction, key, log)
        finally:
            stop_server(process, run_id)


def _gives_correct_response(address: Address, request: Request) -> bool:
    try:
        with socket.create_connection(address, timeout=1):
            pass
    except OSError:
        time.sleep(0.005)
        return False
    return any(outcome.correct for outcome in send_one_by_one(address, [request]).outcomes)


def stop_server(process: "subprocess.Popen[bytes]", run_id: str, timeout_s: float = 15.0) -> None:
    """Stop a server and every process that it started: by SIGTERM, and after a timeout by SIGKILL."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 2.0
        for pid in processes_of_run(run_id):
            _send_signal(pid, signal_number)
        while processes_of_run(run_id) and time.monotonic() < deadline:
            time.sleep(0.02)


def _send_signal(pid: int, signal_number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def processes_of_run(run_id: str) -> list[int]:
    """The processes whose environment has a run id."""
    variable = f"{_RUN_VARIABLE}={run_id}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if variable in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:  # the process has ended or belongs to another user
                continue
    return sorted(found)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the process name (it may contain spaces); zeros if the process has ended."""
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
def available_cores() -> tuple[int, ...]:
    """The cores of this process before it was pinned to one of them."""
    return tuple(sorted(os.sched_getaffinity(0)))


@contextmanager
def pinned_to_core(index: int | None) -> Iterator[None]:
    """Pin this process to a core, or to all with None; processes started in the block stay pinned to it."""
    all_cores, before = available_cores(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, all_cores if index is None else {all_cores[index % len(all_cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin_to_core(processes: Sequence[int], index: int) -> None:
    """Pin running processes, with all their threads, to a core."""
    for pid in processes:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), {available_cores()[index % len(available_cores())]})


def free_port() -> int:
    """A port on which no process listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
