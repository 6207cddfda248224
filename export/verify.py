"""A bundle, held against its own claims on this machine; needs no torch and no data."""

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
    """What was checked of one precision.

    Attributes:
        provider: Where it was run; None where it could only be held against its hashes and its report.
        finding: What came out, in words.
    """

    precision: Precision
    provider: str | None
    finding: str


@dataclass(frozen=True)
class Verification:
    """A bundle in which nothing is off, and what was looked at.

    Attributes:
        checks: One a precision.
        unlisted_files: Names in its folder that the manifest does not vouch for; nothing reads them.
    """

    bundle: Bundle
    report: ParityReport
    checks: tuple[ModelCheck, ...]
    unlisted_files: tuple[str, ...]

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest


def verify_bundle(path: Path) -> Verification:
    """Check that a bundle is whole, sound, certified, and still answers as it did when it was made.

    Every precision is run where it was certified. One that was certified on CUDA is run on the CPU where CUDA does not
    work, and if it does not run there either, that is said and is no error: the machine cannot tell.

    Raises:
        BundleError: Something is off; the message names the first thing.
    """
    bundle = open_bundle(path)
    report = read_report(bundle)
    unlisted_files = bundle.unlisted_files()
    for name in unlisted_files:
        if name.endswith(".onnx"):
            raise BundleError(f"{path / name} lies in the bundle and nobody certified it; remove it, or export again.")
    golden = bundle.golden()
    checks = [
        _checked(bundle, report, precision, model, golden) for precision, model in bundle.manifest.precisions.items()
    ]
    return Verification(bundle, report, tuple(checks), tuple(unlisted_files))


def read_report(bundle: Bundle) -> ParityReport:
    """What the gates said of a bundle.

    Raises:
        BundleError: It cannot be read.
    """
    return read_record(bundle.path / bundle.manifest.parity.path, ParityReport, BundleError)


def _checked(
    bundle: Bundle, report: ParityReport, precision: Precision, model: CertifiedModel, golden: Golden
) -> ModelCheck:
    path = bundle.path / model.path
    _check_certified(path, report, precision, model)
    content = bundle.model(precision)
    try:
        read_model(content)
        provider, session = _session(content, model.provider)
    except BundleError as reason:
        raise BundleError(f"{path}: {reason}") from None
    except DeviceError as reason:
        return ModelCheck(
            precision, None, f"not run here; its hash, its report and the ONNX checker have no objection. {reason}"
        )
    expected_MC = golden.logits[precision]
    checks = (
        structure(content, bundle.manifest.task, golden.images_MSS3, precision, provider),
        host(session, golden.images_MSS3, expected_MC, precision),
    )
    for gate in checks:
        if gate.verdict != "PASS":
            raise BundleError(f"{path} does not pass {gate.name} on {provider} of this machine: {gate.findings[0]}")
    return ModelCheck(precision, provider, _words(checks[-1], provider, model.provider))


def _check_certified(path: Path, report: ParityReport, precision: Precision, model: CertifiedModel) -> None:
    """Hold the report against the manifest: it must have passed this very file."""
    certified = next((candidate for candidate in report.candidates if candidate.precision == precision), None)
    seen = "nothing" if certified is None else f"{certified.verdict} of a model {certified.sha256[:12]}..."
    if report.verdict != "PASS" or certified is None or not _is_about(certified, model):
        raise BundleError(
            f"the report beside {path} says {report.verdict} of the bundle and {seen} of {precision}, expected PASS of "
            f"{model.path} ({model.sha256[:12]}...); export again."
        )


def _is_about(certified: CandidateReport, model: CertifiedModel) -> bool:
    """Whether what passed is this file, on this provider, with this meaning of its confidence."""
    calibration = certified.certificate.calibration if certified.certificate else None
    return (certified.verdict, certified.sha256, certified.runtime.provider, calibration) == (
        "PASS",
        model.sha256,
        model.provider,
        model.calibration,
    )


def _session(content: bytes, certified_on: str) -> tuple[str, InferenceSession]:
    try:
        return certified_on, open_session(content, certified_on)
    except DeviceError as elsewhere:
        if certified_on == CPU:
            raise
        try:
            return CPU, open_session(content)
        except BundleError:
            raise elsewhere from None


def _words(replay: Gate, provider: str, certified_on: str) -> str:
    words = replay.findings[0]
    if provider == certified_on:
        return words
    return f"{words} It was certified on {certified_on}, which does not work here."
