"""The whole service in a process of its own, and classification without it."""

import itertools
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_toys import Served, bomb_png, encoded, served, toy_pixels, write_toy_bundle

from ltkd.errors import UsageError
from serve.answers import Answer, Refused
from serve.main import classify_files, serve
from serve.settings import Settings

MIB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy")


@pytest.fixture(scope="module")
def service(bundle_path: Path) -> Iterator[Served]:
    with served(bundle_path) as service:
        httpx.post(f"{service.url}/v1/classify", content=encoded(toy_pixels(), "JPEG"))  # codecs are loaded by use
        yield service


def test_it_starts_answers_and_ends_cleanly_on_sigterm(bundle_path: Path) -> None:
    with served(bundle_path) as service:
        ready = httpx.get(f"{service.url}/readyz")
        answer = httpx.post(f"{service.url}/v1/classify", content=encoded(toy_pixels(3)))
    assert ready.json()["model"]["name"] == "toy"
    assert len(answer.json()["results"]) == 1
    assert "server" not in answer.headers
    assert service.process.returncode == 0


def test_the_greeting_is_one_line_with_what_is_served_and_what_to_try(service: Served) -> None:
    assert service.greeting.startswith("serving toy (6 classes, fp32, ")
    assert f"{service.url}/v1/classify" in service.greeting


def test_the_service_and_the_files_command_answer_alike(service: Served, bundle_path: Path, tmp_path: Path) -> None:
    content = encoded(toy_pixels(3))
    (tmp_path / "a.png").write_bytes(content)
    (local,) = classify_files(bundle_path, [tmp_path / "a.png"], 5)
    assert isinstance(local, Answer)
    (remote,) = httpx.post(f"{service.url}/v1/classify", content=content).json()["results"]
    assert local.model_dump(mode="json") == remote


@on_linux
def test_a_png_of_kilobytes_and_400_million_pixels_is_422_with_flat_memory(service: Served) -> None:
    bomb = bomb_png()
    assert len(bomb) < 64 * 1024
    before = service.peak_bytes()
    response = httpx.post(f"{service.url}/v1/classify", content=bomb)
    assert response.status_code == 422
    # decoded, the pixels take 400 MB (Pillow holds a byte for each); refused from the header, next to nothing
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
    # undeclared, 20 MiB are held before the limit is reached, and the list of chunks is joined by nobody
    assert service.peak_bytes() - before < (4 if declared else 40) * MIB


def test_a_port_that_is_taken_is_one_line(bundle_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}"):
            serve(bundle_path, Settings(port=port))


def test_a_file_that_is_no_image_is_refused_in_its_own_place(bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(toy_pixels(3)))
    (tmp_path / "b.png").write_bytes(b"text")
    results = classify_files(bundle_path, [tmp_path / "b.png", tmp_path / "a.png"] * 40, 1)
    assert [isinstance(result, Refused) for result in results] == [True, False] * 40


def test_a_file_that_does_not_exist_is_one_line(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.png cannot be read"):
        classify_files(bundle_path, [tmp_path / "nowhere.png"])


def test_no_module_of_the_room_imports_torch_matplotlib_onnx_or_export() -> None:
    names = [path.stem for path in Path(sys.modules["serve"].__file__ or "").parent.glob("*.py")]
    modules = ", ".join(f"serve.{name}" for name in names if name != "__init__")
    heavy = "{'torch', 'torchvision', 'matplotlib', 'onnx', 'export', 'scipy'}"
    program = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    seen = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
