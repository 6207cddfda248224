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
from ltkd.contract.bundle import Golden, Manifest, Precision, file_record
from ltkd.contract.records import read_record, write_record
from ltkd.errors import BundleError, DeviceError


@functools.cache
def contents() -> dict[Precision, bytes]:
    """The toy model in float32 and float16."""
    return {"fp32": toy().candidate, "fp16": to_fp16(toy().candidate)}


def report() -> ParityReport:
    """A report for the toy's task in which fp32 and fp16 passed and int8 did not."""
    template = report_of(12, "int8")
    candidates = []
    for candidate in template.candidates:
        assert candidate.certificate is not None
        certificate = candidate.certificate.model_copy(update={"calibration": calibration_of(TASK)})
        verdict = "FAIL" if candidate.precision == "int8" else "PASS"
        candidates.append(candidate.model_copy(update={"certificate": certificate, "verdict": verdict}))
    return template.model_copy(update={"verdict": "PASS", "candidates": tuple(candidates)})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = toy().images[::500]
    logits = {precision: run(open_session(content), images) for precision, content in contents().items()}
    golden = Golden(images, toy().labels[::500], logits)
    return write_bundle(tmp_path_factory.mktemp("bundles") / "toy", TASK, report(), contents(), golden)


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "toy"))


def forge(
    bundle: Path, name: str, content: bytes | None = None, change: Callable[[ParityReport], ParityReport] | None = None
) -> None:
    """Replace a model or the report and update every hash, as a deliberate manipulation would."""
    manifest = read_record(bundle / "manifest.json", Manifest, BundleError)
    parity = read_record(bundle / "parity.json", ParityReport, BundleError)
    models = dict(manifest.precisions)
    if content is not None:
        (bundle / name).write_bytes(content)
        facts = file_record(bundle / name).model_dump()
        models = {p: m.model_copy(update=facts) if m.path == name else m for p, m in models.items()}
        candidates = tuple(
            candidate.model_copy(update={"sha256": facts["sha256"]}) if candidate.file == name else candidate
            for candidate in parity.candidates
        )
        parity = parity.model_copy(update={"candidates": candidates})
    write_record(bundle / "parity.json", change(parity) if change else parity)
    update = {"precisions": models, "parity": file_record(bundle / "parity.json")}
    write_record(bundle / "manifest.json", manifest.model_copy(update=update))


def findings(verification: Verification) -> dict[str, str]:
    return {check.precision: check.finding for check in verification.checks}


def test_the_checks_of_a_valid_bundle_are_listed_for_every_precision(original: Path) -> None:
    verification = verify_bundle(original)
    assert [check.precision for check in verification.checks] == ["fp32", "fp16"]
    assert verification.manifest.task == TASK
    assert verification.report == read_record(original / "parity.json", ParityReport, BundleError)
    assert verification.unlisted_files == ()
    assert "golden images differ by up to 0 from" in findings(verification)["fp32"]


@pytest.mark.skipif(cuda_works(), reason="tests the behaviour without CUDA")
def test_a_model_certified_on_cuda_runs_on_the_cpu_if_cuda_is_missing_and_the_finding_states_it(original: Path) -> None:
    (fp16,) = [check for check in verify_bundle(original).checks if check.precision == "fp16"]
    assert PROVIDERS["fp16"] == CUDA
    assert fp16.provider == CPU
    assert fp16.finding.endswith(f"It was certified on {CUDA}, which does not work on this machine.")


@pytest.mark.skipif(not cuda_works(), reason="needs CUDA")
def test_a_model_certified_on_cuda_runs_on_cuda(original: Path) -> None:
    (fp16,) = [check for check in verify_bundle(original).checks if check.precision == "fp16"]
    assert fp16.provider == CUDA


def test_a_model_that_runs_on_no_device_here_is_reported_as_not_run(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_fp32(content: bytes, provider: str = CPU) -> object:
        if provider == CUDA:
            raise DeviceError("asked for CUDA, which does not run here.")
        if content != contents()["fp32"]:
            raise BundleError("ONNX Runtime has no such kernel.")
        return open_session(content)

    monkeypatch.setattr(verify, "open_session", only_fp32)
    (fp16,) = [check for check in verify_bundle(original).checks if check.precision == "fp16"]
    assert fp16.provider is None
    assert fp16.finding.startswith(
        "not run on this machine; its hash, its report and the ONNX checker found no error. asked for CUDA"
    )


@pytest.mark.parametrize(("name", "precision"), [("model.onnx", "fp32"), ("model.fp16.onnx", "fp16")])
def test_the_hash_of_every_precision_is_checked(bundle: Path, name: str, precision: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[-1] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} was changed after export"):
        verify_bundle(bundle)


def test_damaged_tail_rows_with_forged_hashes_are_detected_by_the_golden_images(bundle: Path) -> None:
    model = onnx.load_model_from_string(toy().candidate)
    (classifier,) = [tensor for tensor in model.graph.initializer if sorted(tensor.dims) == [6, 12]]

    def without_tail(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = weight if len(weight) == 6 else weight.T
        rows[TAIL_CLASSES] = 0
        return weight

    forge(bundle, "model.onnx", damaged(toy().candidate, classifier.name, without_tail))
    with pytest.raises(BundleError, match=r"model.onnx does not pass G5 host on CPU.*golden images differ by up to"):
        verify_bundle(bundle)


def test_a_damaged_second_precision_is_an_error_of_one_line(bundle: Path) -> None:
    forge(bundle, "model.fp16.onnx", b"no model")
    with pytest.raises(BundleError, match=r"model\.fp16\.onnx: the file is not an ONNX model") as error:
        verify_bundle(bundle)
    assert "\n" not in str(error.value)


def change_fp16(**update: object) -> Callable[[ParityReport], ParityReport]:
    def change(parity: ParityReport) -> ParityReport:
        candidates = tuple(
            candidate.model_copy(update=update) if candidate.precision == "fp16" else candidate
            for candidate in parity.candidates
        )
        return parity.model_copy(update={"candidates": candidates})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parity: parity.model_copy(update={"verdict": "FAIL"}), "has FAIL for the bundle"),
        (change_fp16(verdict="FAIL"), r"FAIL \(sha256"),
        (change_fp16(sha256="0" * 64), r"PASS \(sha256 000000000000...\) for fp16, expected PASS for model.fp16.onnx"),
        (change_fp16(precision="int8"), "no entry for fp16"),
        (change_fp16(certificate=None), "for fp16"),
    ],
)
def test_a_report_without_a_pass_for_exactly_this_file_is_an_error(
    bundle: Path, change: Callable[[ParityReport], ParityReport], message: str
) -> None:
    forge(bundle, "", change=change)
    with pytest.raises(BundleError, match=message):
        verify_bundle(bundle)


def test_an_uncertified_model_in_a_bundle_is_an_error_and_other_files_are_listed(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    assert verify_bundle(bundle).unlisted_files == ("notes.txt",)
    (bundle / "model.int8.onnx").write_bytes(contents()["fp32"])
    with pytest.raises(BundleError, match=r"model\.int8\.onnx is in the bundle but was not certified"):
        verify_bundle(bundle)
