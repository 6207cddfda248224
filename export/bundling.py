"""Export a run: certify its network in every precision, and write the models that passed as one bundle.

``ltkd export`` calls ``export_run``. Models that did not pass are written beside the bundle, with the report that gives
the reasons.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.certification.accuracy_margins import margins_for
from export.certification.certify import Certification, ExportRequirements, certify, discard_message
from export.certification.splits import split_test_images
from export.report.html import parity_html, write_report
from export.report.model_card import model_card
from export.schema import CandidateReport, ParityReport
from ltkd.contract.bundle import (
    CARD_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_FILES,
    PARITY_FILE,
    REPORT_FILE,
    CertifiedModel,
    Manifest,
    Provenance,
    check_replaceable,
    file_record,
    staged_bundle,
)
from ltkd.contract.records import sha256_of, write_atomically, write_record
from ltkd.data.datasets import Dataset, load_dataset
from ltkd.errors import RunError
from ltkd.training.run_folder import CONFIG_FILE, Run, open_run

REJECTED_DIRECTORY = "rejected"


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Attributes:
        report: The verdicts and measurements of all gates.
        bundle: The bundle; None unless the verdict is PASS.
        rejected: The folder of the candidates that did not pass, with the report; None if all passed.
    """

    report: ParityReport
    bundle: Path | None
    rejected: Path | None


def export_run(
    run_dir: Path,
    out: Path,
    policy: ExportRequirements | None = None,
    data: Dataset | None = None,
    on_message: Callable[[str], None] = discard_message,
) -> Export:
    """Convert a run's network, apply the gates to each precision on test images, and bundle the models that pass.

    Unless fp32 passes, nothing is written to ``out`` and an earlier bundle there is not changed. Candidates that did
    not pass are written to ``rejected/`` beside it.

    Args:
        run_dir: A complete run.
        out: The bundle's directory; an earlier bundle there is replaced as a whole.
        policy: Precisions, margins and targets; None uses the defaults.
        data: The run's images if they are already in memory; None loads them.
        on_message: Called with a short progress message several times a minute.

    Raises:
        RunError: The run cannot be used, or its data set has changed since the training.
        DataError: The images cannot be loaded.
        BundleError: There is something other than a bundle at ``out``.
        DeviceError: A requested precision needs a device that is not available.
    """
    check_replaceable(out)  # fail before the certification, which takes minutes
    policy = policy or ExportRequirements()
    _ = policy.precisions_to_certify  # raises DeviceError, also before the certification
    run = open_run(run_dir)
    data = data or load_dataset(run.config.data)
    if data.task != run.task:
        raise RunError(
            f"{run_dir} was trained with different images or class groups than {run.config.data.name} has now; "
            "train again."
        )
    name = out.resolve().name
    source = run.config.data
    description = f"the {len(data.test_labels):,} test images of {source.root.name if source.root else source.name}"
    splits = split_test_images(data, margins_for("fp32", policy.margins, data.task.groups))
    certification = certify(run.load_network(), run.task, splits, name, description, policy, on_message)
    bundle = rejected = None
    if certification.passed:
        with staged_bundle(out) as stage:
            _write_bundle(stage, run, certification)
        bundle = out
    if len(certification.passed) < len(certification.report.candidates):
        rejected = _write_rejected(out, certification)
    return Export(certification.report, bundle, rejected)


def _write_bundle(stage: Path, run: Run, certification: Certification) -> None:
    for precision in certification.passed:
        (stage / MODEL_FILES[precision]).write_bytes(certification.contents[precision])
    (stage / GOLDEN_FILE).write_bytes(certification.golden.to_bytes())
    write_record(stage / PARITY_FILE, certification.report)
    (stage / REPORT_FILE).write_text(parity_html(certification.report), encoding="utf-8")
    source = Provenance(
        run=run.path.resolve().name,
        config_sha256=sha256_of(run.path / CONFIG_FILE),
        weights_sha256=sha256_of(run.weights_path),
        model=run.config.model,
        method=run.config.method.name,
        versions=certification.report.versions,
    )
    (stage / CARD_FILE).write_text(model_card(run.task, source, certification.report), encoding="utf-8")
    manifest = Manifest(
        name=certification.report.name,
        task=run.task,
        precisions={p: _certified_model(stage / MODEL_FILES[p], report) for p, report in certification.passed.items()},
        parity=file_record(stage / PARITY_FILE),
        report=file_record(stage / REPORT_FILE),
        card=file_record(stage / CARD_FILE),
        golden=file_record(stage / GOLDEN_FILE),
        certified_on=certification.report.data.description,
        source=source,
    )
    write_record(stage / MANIFEST_FILE, manifest)


def _certified_model(path: Path, report: CandidateReport) -> CertifiedModel:
    assert report.certificate is not None  # true for every candidate that passed
    facts = file_record(path).model_dump()
    return CertifiedModel(**facts, provider=report.runtime.provider, calibration=report.certificate.calibration)


def _write_rejected(out: Path, certification: Certification) -> Path:
    """Write the candidates that did not pass, and the report, beside the bundle; replace those of an earlier export."""
    rejected = out.resolve().parent / REJECTED_DIRECTORY / out.resolve().name
    rejected.mkdir(parents=True, exist_ok=True)
    for old in rejected.glob("candidate*.onnx"):
        old.unlink()
    for report in certification.report.candidates:
        if report.precision not in certification.passed:
            write_atomically(rejected / f"candidate.{report.precision}.onnx", certification.contents[report.precision])
    write_report(certification.report, rejected)
    return rejected
