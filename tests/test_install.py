"""Install only the service, without torch, and serve a bundle: the installation of a production server."""

import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serve_toys import write_toy_bundle

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_install_of_the_service_has_no_torch_and_serves(tmp_path: Path) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("uv is not installed; `make install` installs it")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            python,
            "--constraint",
            ROOT / "constraints.txt",
            f"{ROOT}[serve]",
        ],
        check=True,
        cwd=tmp_path,
    )
    found = subprocess.run(
        [python, "-c", "import importlib.util as u; print(*map(bool, map(u.find_spec, ['torch', 'onnx', 'serve'])))"],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["False", "False", "True"]

    command = environment / "bin" / "ltkd"
    failed = subprocess.run(
        [command, "export", "run", "--out", "bundle"], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: this command needs ") and "pip install 'ltkd[" in failed.stderr

    bundle = write_toy_bundle(tmp_path / "bundle")
    with subprocess.Popen([command, "serve", bundle, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        try:
            with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=20)) as client:
                assert client.get("/readyz").status_code == 200
        finally:
            process.terminate()
        assert process.wait(timeout=30) == 0
