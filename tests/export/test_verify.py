import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_toys import TAIL_CLASSES, TASK, damaged, toy
from numpy.typing import NDArray
from report_toys import PROVIDERS, calibration_of, report_of, write_bundle

from export import verify
from export.conversion.fp16 import to_fp16
from export.conversion.session import CPU, CUDA, cuda_works, open_session, run
from export.schema import ParityReport
from export.verify import Verification, verify_bundle
from ltkd.contract.bundle import Golden, Manifest, Precision, record_of
from ltkd.contract.records import read_record, write_record
from ltkd.errors import BundleError, DeviceError


@functools.cache
def contents() -> dict[Precision, bytes]:
    """The toy in float32 and float16."""
    return {"fp32": toy().candidate, "fp16": to_fp16(toy().candidate)}


def report() -> ParityReport:
    """Of the toy's task: fp32 and fp16 passed, int8 did not."""
    made = report_of(12, "int8")
    candidates = []
    for candidate in made.candidates:
        assert candidate.certificate is not None
        certificate = candidate.certificate.model_copy(update={"calibration": calibration_of(TASK)})
        verdict = "FAIL" if candidate.precision == "int8" else "PASS"
        candidates.append(candidate.model_copy(update={"certificate": certificate, "verdict": verdict}))
    return made.model_copy(update={"verdict": "PASS", "candidates": tuple(candidates)})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = toy().images[::500]
    logits = {precision: run(open_session(content), images) for precision, content in contents().items()}
    golden = Golden(images, toy().labels[::500], logits)
    return write_bundle(tmp_path_factory.mktemp("bundles") / "toy", TASK, report(), contents(), golden)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(made, tmp_path / "toy"))


def forge(
    bundle: Path, name: str, content: bytes | None = None, change: Callable[[ParityReport], ParityReport] | None = None
) -> None:
    """Replace the model or the report and make every hash agree, as somebody with a text editor could."""
    manifest = read_record(bundle / "manifest.json", Manifest, BundleError)
    parity = read_record(bundle / "parity.json", ParityReport, BundleError)
    models = dict(manifest.precisions)
    if content is not None:
        (bundle / name).write_bytes(content)
        facts = record_of(bundle / name).model_dump()
        models = {p: m.model_copy(update=facts) if m.path == name else m for p, m in models.items()}
        candidates = tuple(
            candidate.model_copy(update={"sha256": facts["sha256"]}) if candidate.file == name else candidate
            for candidate in parity.candidates
        )
        parity = parity.model_copy(update={"candidates": candidates})
    write_record(bundle / "parity.json", change(parity) if change else parity)
    update = {"precisions": models, "parity": record_of(bundle / "parity.json")}
    write_record(bundle / "manifest.json", manifest.model_copy(update=update))


def findings(seen: Verification) -> dict[str, str]:
    return {check.precision: check.finding for check in seen.checks}


def test_a_sound_bundle_says_what_was_checked_of_every_precision(made: Path) -> None:
    seen = verify_bundle(made)
    assert [check.precision for check in seen.checks] == ["fp32", "fp16"]
    assert seen.manifest.task == TASK
    assert seen.report == read_record(made / "parity.json", ParityReport, BundleError)
    assert seen.unlisted_files == ()
    assert "golden images are up to 0 off" in findings(seen)["fp32"]


@pytest.mark.skipif(cuda_works(), reason="asks what is done without CUDA")
def test_what_was_certified_on_cuda_runs_on_the_cpu_where_there_is_none_and_says_so(made: Path) -> None:
    (fp16,) = [check for check in verify_bundle(made).checks if check.precision == "fp16"]
    assert PROVIDERS["fp16"] == CUDA
    assert fp16.provider == CPU
    assert fp16.finding.endswith(f"It was certified on {CUDA}, which does not work here.")


@pytest.mark.skipif(not cuda_works(), reason="needs CUDA")
def test_what_was_certified_on_cuda_runs_there(made: Path) -> None:
    (fp16,) = [check for check in verify_bundle(made).checks if check.precision == "fp16"]
    assert fp16.provider == CUDA


def test_what_runs_on_no_device_here_is_said_to_be_not_run(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_fp32(content: bytes, provider: str = CPU) -> object:
        if provider == CUDA:
            raise DeviceError("asked for CUDA, which does not run here.")
        if content != contents()["fp32"]:
            raise BundleError("ONNX Runtime has no such kernel.")
        return open_session(content)

    monkeypatch.setattr(verify, "open_session", only_fp32)
    (fp16,) = [check for check in verify_bundle(made).checks if check.precision == "fp16"]
    assert fp16.provider is None
    assert fp16.finding.startswith(
        "not run here; its hash, its report and the ONNX checker have no objection. asked for CUDA"
    )


@pytest.mark.parametrize(("name", "precision"), [("model.onnx", "fp32"), ("model.fp16.onnx", "fp16")])
def test_every_precision_is_held_against_its_hash(bundle: Path, name: str, precision: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[-1] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} was changed after export"):
        verify_bundle(bundle)


def test_damaged_tail_rows_with_forged_hashes_are_noticed_by_the_golden_samples(bundle: Path) -> None:
    model = onnx.load_model_from_string(toy().candidate)
    (classifier,) = [tensor for tensor in model.graph.initializer if sorted(tensor.dims) == [6, 12]]

    def without_tail(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = weight if len(weight) == 6 else weight.T
        rows[TAIL_CLASSES] = 0
        return weight

    forge(bundle, "model.onnx", damaged(toy().candidate, classifier.name, without_tail))
    with pytest.raises(BundleError, match=r"model.onnx does not pass G5 host on CPU.*golden images are up to"):
        verify_bundle(bundle)


def test_a_broken_second_precision_is_noticed_in_one_line(bundle: Path) -> None:
    forge(bundle, "model.fp16.onnx", b"no model")
    with pytest.raises(BundleError, match=r"model\.fp16\.onnx: the file is no ONNX model") as error:
        verify_bundle(bundle)
    assert "\n" not in str(error.value)


def of_fp16(**update: object) -> Callable[[ParityReport], ParityReport]:
    def change(parity: ParityReport) -> ParityReport:
        candidates = tuple(
            candidate.model_copy(update=update) if candidate.precision == "fp16" else candidate
            for candidate in parity.candidates
        )
        return parity.model_copy(update={"candidates": candidates})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda parity: parity.model_copy(update={"verdict": "FAIL"}), "says FAIL of the bundle"),
        (of_fp16(verdict="FAIL"), "FAIL of a model"),
        (of_fp16(sha256="0" * 64), "PASS of a model 000000000000... of fp16, expected PASS of model.fp16.onnx"),
        (of_fp16(precision="int8"), "nothing of fp16"),
        (of_fp16(certificate=None), "of fp16"),
    ],
)
def test_a_report_that_did_not_pass_this_very_file_is_noticed(
    bundle: Path, change: Callable[[ParityReport], ParityReport], said: str
) -> None:
    forge(bundle, "", change=change)
    with pytest.raises(BundleError, match=said):
        verify_bundle(bundle)


def test_a_model_that_nobody_certified_may_not_lie_in_a_bundle_and_other_files_are_named(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    assert verify_bundle(bundle).unlisted_files == ("notes.txt",)
    (bundle / "model.int8.onnx").write_bytes(contents()["fp32"])
    with pytest.raises(BundleError, match=r"model\.int8\.onnx lies in the bundle and nobody certified it"):
        verify_bundle(bundle)
