"""Tests of the whole service in its own process, and of classification without the service."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serve_toys import SERVE, Served, bomb_png, encoded, served, toy_pixels, write_toy_bundle

from ltkd.errors import UsageError
from serve.classify_files import classify_files
from serve.engine.answers import Answer, RejectedImage
from serve.main import serve
from serve.settings import Settings

MIB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the test reads /proc")


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy")


@pytest.fixture(scope="module")
def service(bundle_path: Path) -> Iterator[Served]:
    with served(bundle_path) as service:
        httpx.post(
            f"{service.url}/v1/classify", content=encoded(toy_pixels(), "JPEG")
        )  # codecs are loaded on first use
        yield service


def test_it_starts_answers_and_stops_cleanly_on_sigterm(bundle_path: Path) -> None:
    with served(bundle_path) as service:
        ready = httpx.get(f"{service.url}/readyz")
        answer = httpx.post(f"{service.url}/v1/classify", content=encoded(toy_pixels(3)))
    assert [model["name"] for model in ready.json()["models"]] == ["toy"]
    assert len(answer.json()["results"]) == 1
    assert "server" not in answer.headers
    assert service.process.returncode == 0


def test_the_start_message_is_one_line_with_the_model_and_an_example_command(service: Served) -> None:
    assert service.greeting.startswith("serving toy version 1 (6 classes, fp32, ")
    assert f"{service.url}/v1/classify" in service.greeting


def test_the_service_and_classify_files_give_the_same_answer(
    service: Served, bundle_path: Path, tmp_path: Path
) -> None:
    content = encoded(toy_pixels(3))
    (tmp_path / "a.png").write_bytes(content)
    (local,) = classify_files(bundle_path, [tmp_path / "a.png"], 5)
    assert isinstance(local, Answer)
    (remote,) = httpx.post(f"{service.url}/v1/classify", content=content).json()["results"]
    assert remote.pop("answer_id")  # for feedback, which only a service accepts
    assert local.model_dump(mode="json") == remote


def test_after_sigterm_accepted_requests_are_answered_and_the_exit_code_is_0(bundle_path: Path) -> None:
    content = encoded(toy_pixels(3))
    request = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    with served(bundle_path) as service:
        url = httpx.URL(service.url)
        address = (url.host, url.port or 0)
        connections = [socket.create_connection(address, timeout=30) for _ in range(20)]
        os.kill(service.pids()[1], signal.SIGSTOP)  # nothing is answered before the signal
        for connection in connections:
            connection.sendall(request % len(content) + content)
        while not re.search(r"^ltkd_queue_images\{.*\} 20\.0$", httpx.get(f"{service.url}/metrics").text, re.MULTILINE):
            pass
        service.process.send_signal(signal.SIGTERM)
        while is_listening(address):
            pass
        os.kill(service.pids()[1], signal.SIGCONT)
        answers = [read_all(connection) for connection in connections]
        assert all(answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer for answer in answers)
        assert service.process.wait(30) == 0
        for connection in connections:
            connection.close()


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def is_listening(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=30).close()
    except ConnectionError:
        return False
    return True


def test_during_the_delay_after_sigterm_it_is_not_ready_but_answers(bundle_path: Path) -> None:
    with served(bundle_path, delay_seconds=2) as service, httpx.Client(base_url=service.url) as client:
        assert client.get("/readyz").status_code == 200
        service.process.send_signal(signal.SIGTERM)
        while client.get("/readyz").status_code == 200:
            pass
        answer = client.post("/v1/classify", content=encoded(toy_pixels(3)))
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert client.get("/livez").status_code == 200
        assert service.process.wait(30) == 0


_HANG_IN_A_THREAD = """
import time
import serve.http.bodies
serve.http.bodies.json_images = lambda body, max_images: (print("hangs", flush=True), time.sleep(600))
"""


def test_sigterm_ends_the_process_even_if_a_thread_hangs(bundle_path: Path) -> None:
    with served(bundle_path, prelude=_HANG_IN_A_THREAD, drain_seconds=2) as service, ThreadPoolExecutor() as pool:
        large = b'{"images": ["' + bytes(100_000).hex().encode() + b'"]}'
        headers = {"Content-Type": "application/json"}
        pool.submit(httpx.post, f"{service.url}/v1/classify", content=large, headers=headers, timeout=60)
        assert service.process.stdout is not None and service.process.stdout.readline() == "hangs\n"
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 1  # not 0: the request did not end
        assert "most recent call first" in service.process.communicate()[1]  # shows where the process hung


@on_linux
def test_sigterm_ends_the_process_even_if_its_engine_hangs(bundle_path: Path) -> None:
    with served(bundle_path, drain_seconds=3, timeout_seconds=600) as service, ThreadPoolExecutor() as pool:
        engine = service.pids()[1]
        os.kill(engine, signal.SIGSTOP)
        answer = pool.submit(httpx.post, f"{service.url}/v1/classify", content=encoded(toy_pixels()), timeout=60)
        while not re.search(r"^ltkd_queue_images\{.*\} 1\.0$", httpx.get(f"{service.url}/metrics").text, re.MULTILINE):
            pass
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        assert answer.result().status_code == 503
        while is_running(engine):  # the timeout of the test ends this loop
            pass


@on_linux
def test_an_engine_process_ends_when_the_server_process_is_killed(bundle_path: Path) -> None:
    with served(bundle_path) as service:
        (_, engine) = service.pids()
        service.process.kill()
        while is_running(engine):
            pass


def is_running(pid: int) -> bool:
    """Whether a process runs (Linux); one that has ended may wait for its parent to notice."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def on_one_core() -> Iterator[None]:
    """Processes that are started in this block stay on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@on_linux
def test_all_processes_together_take_less_than_300_mb(service: Served) -> None:
    for seed in range(50):
        httpx.post(f"{service.url}/v1/classify", content=encoded(toy_pixels(seed, 200, 200), "JPEG"))
    assert service.resident_bytes() < 300 * MIB


@on_linux
def test_a_png_of_kilobytes_and_400_million_pixels_is_422_with_flat_memory(service: Served) -> None:
    bomb = bomb_png()
    assert len(bomb) < 64 * 1024
    large = encoded(toy_pixels(1, 600, 600), "JPEG")
    for _ in range(4):  # start the processes that decode large images
        assert httpx.post(f"{service.url}/v1/classify", content=large).status_code == 200
    before = service.peak_bytes()
    response = httpx.post(f"{service.url}/v1/classify", content=bomb)
    assert response.status_code == 422
    # decoded, the pixels need 400 MB (one byte each in Pillow); rejected from the header, almost nothing
    assert service.peak_bytes() - before < 16 * MIB


@on_linux
@pytest.mark.parametrize("media_type", ["image/png", "application/json", "multipart/form-data; boundary=b"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_100_mb_is_413_with_flat_memory(service: Served, declared: bool, media_type: str) -> None:
    before = service.peak_bytes()
    start = b'--b\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n'.ljust(1000, b" ")
    chunks = itertools.chain([start], itertools.repeat(bytes(100_000), 1000))
    headers = {"Content-Type": media_type} | ({"Content-Length": str(1000 + 100_000_000)} if declared else {})
    response = httpx.post(f"{service.url}/v1/classify", content=chunks, headers=headers, timeout=60)
    assert response.status_code == 413
    # without a Content-Length, 20 MiB are held before the limit is reached; the list of chunks is never joined
    assert service.peak_bytes() - before < (4 if declared else 40) * MIB


@on_linux
def test_sighup_during_the_start_is_obeyed_after_it(bundle_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(bundle_path), "{}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        while not (pids := children.read_text().split()):
            assert process.poll() is None
        os.kill(int(pids[0]), signal.SIGSTOP)  # the service cannot start before its engine process
        process.send_signal(signal.SIGHUP)
        os.kill(int(pids[0]), signal.SIGCONT)
        assert process.stdout is not None
        url = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        while 'ltkd_reloads_total{outcome="unchanged"} 1.0' not in httpx.get(f"{url}/metrics").text:
            pass
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_sighup_does_not_hide_the_error_of_a_start_that_fails(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        raise UsageError("cannot start")

    monkeypatch.setattr("serve.server.run", fail)
    with pytest.raises(UsageError, match="cannot start"):
        serve(bundle_path, Settings(port=0))
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_port_in_use_is_a_one_line_error(bundle_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}"):
            serve(bundle_path, Settings(port=port))


def test_a_file_that_is_not_an_image_is_rejected_in_its_place(bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(toy_pixels(3)))
    (tmp_path / "b.png").write_bytes(b"text")
    results = classify_files(bundle_path, [tmp_path / "b.png", tmp_path / "a.png"] * 40, 1)
    assert [isinstance(result, RejectedImage) for result in results] == [True, False] * 40


def test_a_file_that_does_not_exist_is_an_error(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.png cannot be read"):
        classify_files(bundle_path, [tmp_path / "nowhere.png"])


def test_no_module_of_the_service_imports_torch_matplotlib_onnx_or_export() -> None:
    root = Path(sys.modules["serve"].__file__ or "").parent
    paths = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
    modules = ", ".join(".".join(path.parts) for path in paths if not path.name.startswith("__"))
    heavy = "{'torch', 'torchvision', 'matplotlib', 'onnx', 'export', 'scipy'}"
    program = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
