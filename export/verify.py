"""Verify a bundle on this machine: its hashes, its report, and the outputs of its models for the golden images.

Verification needs neither torch nor the data set. ``ltkd verify`` calls this module; the gates are those of
``export.certification``.
"""

from dataclasses import dataclass
from pathlib import Path

from onnxruntime import InferenceSession

from export.certification.gates import host, structure
from export.conversion.session import CPU, open_session, read_model
from export.schema import CandidateReport, Gate, ParityReport
from ltkd.contract.bundle import Bundle, CertifiedModel, Golden, Manifest, Precision, open_bundle
from ltkd.contract.records import read_record
from ltkd.errors import BundleError, DeviceError


@dataclass(frozen=True)
class ModelCheck:
    """The result of the checks of one precision.

    Attributes:
        provider: Execution provider that ran the model; None if only its hash and its report could be checked.
        finding: The result as a sentence.
    """

    precision: Precision
    provider: str | None
    finding: str


@dataclass(frozen=True)
class Verification:
    """A bundle that passed all checks, and their results.

    Attributes:
        checks: One per precision.
        unlisted_files: Names of files in its directory that the manifest does not list; they are never read.
    """

    bundle: Bundle
    report: ParityReport
    checks: tuple[ModelCheck, ...]
    unlisted_files: tuple[str, ...]

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest


def verify_bundle(path: Path) -> Verification:
    """Check that a bundle is complete, unchanged and certified, and gives the same outputs as when it was exported.

    Every model is run on the provider on which it was certified. A model that was certified on CUDA is run on the CPU
    if CUDA does not work. If it does not run there either, the result states that it was not run; this is not an error,
    because it is a property of the machine and not of the bundle.

    Raises:
        BundleError: A check failed; the message describes the first failure.
    """
    bundle = open_bundle(path)
    report = read_report(bundle)
    unlisted_files = bundle.unlisted_files()
    for name in unlisted_files:
        if name.endswith(".onnx"):
            raise BundleError(f"{path / name} is in the bundle but was not certified; remove it, or export again.")
    golden = bundle.golden()
    checks = [
        _check_model(bundle, report, precision, model, golden)
        for precision, model in bundle.manifest.precisions.items()
    ]
    return Verification(bundle, report, tuple(checks), tuple(unlisted_files))


def read_report(bundle: Bundle) -> ParityReport:
    """Read the parity report of a bundle.

    Raises:
        BundleError: The report cannot be read.
    """
    return read_record(bundle.path / bundle.manifest.parity.path, ParityReport, BundleError)


def _check_model(
    bundle: Bundle, report: ParityReport, precision: Precision, model: CertifiedModel, golden: Golden
) -> ModelCheck:
    path = bundle.path / model.path
    _check_certified(path, report, precision, model)
    content = bundle.model(precision)
    try:
        read_model(content)
        provider, session = _open_on_provider(content, model.provider)
    except BundleError as reason:
        raise BundleError(f"{path}: {reason}") from None
    except DeviceError as reason:
        return ModelCheck(
            precision,
            None,
            f"not run on this machine; its hash, its report and the ONNX checker found no error. {reason}",
        )
    expected_MC = golden.logits[precision]
    gates = (
        structure(content, bundle.manifest.task, golden.images_MSS3, precision, provider),
        host(session, golden.images_MSS3, expected_MC, precision),
    )
    for gate in gates:
        if gate.verdict != "PASS":
            raise BundleError(f"{path} does not pass {gate.name} on {provider} of this machine: {gate.findings[0]}")
    return ModelCheck(precision, provider, _finding(gates[-1], provider, model.provider))


def _check_certified(path: Path, report: ParityReport, precision: Precision, model: CertifiedModel) -> None:
    """Check that the report has a PASS for exactly the file that the manifest lists."""
    certified = next((candidate for candidate in report.candidates if candidate.precision == precision), None)
    found = "no entry" if certified is None else f"{certified.verdict} (sha256 {certified.sha256[:12]}...)"
    if report.verdict != "PASS" or certified is None or not _certifies(certified, model):
        raise BundleError(
            f"the report beside {path} has {report.verdict} for the bundle and {found} for {precision}, expected PASS "
            f"for {model.path} (sha256 {model.sha256[:12]}...); export again."
        )


def _certifies(certified: CandidateReport, model: CertifiedModel) -> bool:
    """Whether the report has a PASS for this file, on this provider, with this calibration."""
    calibration = certified.certificate.calibration if certified.certificate else None
    return (certified.verdict, certified.sha256, certified.runtime.provider, calibration) == (
        "PASS",
        model.sha256,
        model.provider,
        model.calibration,
    )


def _open_on_provider(content: bytes, certified_on: str) -> tuple[str, InferenceSession]:
    try:
        return certified_on, open_session(content, certified_on)
    except DeviceError as error:
        if certified_on == CPU:
            raise
        try:
            return CPU, open_session(content)
        except BundleError:
            raise error from None


def _finding(replay: Gate, provider: str, certified_on: str) -> str:
    finding = replay.findings[0]
    if provider == certified_on:
        return finding
    return f"{finding} It was certified on {certified_on}, which does not work on this machine."
