"""A run to a bundle: certified, and written whole; or rejected candidates and the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.certification.certify import Certification, Policy, certify, discard_message
from export.certification.margins import margins_for
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
    record_of,
    staged_bundle,
)
from ltkd.contract.records import sha256_of, write_record, write_whole
from ltkd.data.datasets import Dataset, load_dataset
from ltkd.errors import RunError
from ltkd.training.run_folder import CONFIG_FILE, Run, open_run

REJECTED_DIRECTORY = "rejected"


@dataclass(frozen=True)
class Export:
    """How an export ended.

    Attributes:
        report: What the gates said.
        bundle: The bundle; None after any verdict but PASS.
        rejected: The folder of the candidates that did not pass, with the report; None when all did.
    """

    report: ParityReport
    bundle: Path | None
    rejected: Path | None


def export_run(
    run_dir: Path,
    out: Path,
    policy: Policy | None = None,
    data: Dataset | None = None,
    on_message: Callable[[str], None] = discard_message,
) -> Export:
    """Convert a run's network, put each precision through the gates on test images, and bundle what passes.

    Unless fp32 passes nothing appears at ``out`` and what is there stays as it is. Candidates that did not pass go
    to ``rejected/`` beside it.

    Args:
        run_dir: A complete run.
        out: The bundle's directory; an earlier bundle there is replaced as a whole.
        policy: What is asked; None asks for the defaults.
        data: The run's images where they are in memory already; None loads them.
        on_message: Called with a short progress message several times a minute.

    Raises:
        RunError: The run cannot be used, or its data set is no longer what it was trained on.
        DataError: The images cannot be loaded.
        BundleError: ``out`` is something else than a bundle.
        DeviceError: A precision was asked for whose device is not here.
    """
    check_replaceable(out)  # before minutes of certifying
    policy = policy or Policy()
    _ = policy.tried  # refuses what cannot be certified here, likewise
    trained = open_run(run_dir)
    data = data or load_dataset(trained.config.data)
    if data.task != trained.task:
        raise RunError(
            f"{run_dir} was trained on other images or groups than {trained.config.data.name} has now; train again."
        )
    name = out.resolve().name
    source = trained.config.data
    description = f"the {len(data.test_labels):,} test images of {source.root.name if source.root else source.name}"
    splits = split_test_images(data, margins_for("fp32", policy.margins, data.task.groups))
    done = certify(trained.load_network(), trained.task, splits, name, description, policy, on_message)
    bundle = rejected = None
    if done.passed:
        with staged_bundle(out) as stage:
            _fill(stage, trained, done)
        bundle = out
    if len(done.passed) < len(done.report.candidates):
        rejected = _reject(out, done)
    return Export(done.report, bundle, rejected)


def _fill(stage: Path, trained: Run, done: Certification) -> None:
    for precision in done.passed:
        (stage / MODEL_FILES[precision]).write_bytes(done.contents[precision])
    (stage / GOLDEN_FILE).write_bytes(done.golden.to_bytes())
    write_record(stage / PARITY_FILE, done.report)
    (stage / REPORT_FILE).write_text(parity_html(done.report), encoding="utf-8")
    source = Provenance(
        run=trained.path.resolve().name,
        config_sha256=sha256_of(trained.path / CONFIG_FILE),
        weights_sha256=sha256_of(trained.weights_path),
        model=trained.config.model,
        method=trained.config.method.name,
        versions=done.report.versions,
    )
    (stage / CARD_FILE).write_text(model_card(trained.task, source, done.report), encoding="utf-8")
    manifest = Manifest(
        name=done.report.name,
        task=trained.task,
        precisions={p: _certified(stage / MODEL_FILES[p], report) for p, report in done.passed.items()},
        parity=record_of(stage / PARITY_FILE),
        report=record_of(stage / REPORT_FILE),
        card=record_of(stage / CARD_FILE),
        golden=record_of(stage / GOLDEN_FILE),
        certified_on=done.report.data.description,
        source=source,
    )
    write_record(stage / MANIFEST_FILE, manifest)


def _certified(path: Path, report: CandidateReport) -> CertifiedModel:
    assert report.certificate is not None  # every candidate that passes has one
    facts = record_of(path).model_dump()
    return CertifiedModel(**facts, provider=report.runtime.provider, calibration=report.certificate.calibration)


def _reject(out: Path, done: Certification) -> Path:
    """Leave what did not pass, and the report, beside the bundle's place; the folder holds this export alone."""
    rejected = out.resolve().parent / REJECTED_DIRECTORY / out.resolve().name
    rejected.mkdir(parents=True, exist_ok=True)
    for old in rejected.glob("candidate*.onnx"):
        old.unlink()
    for report in done.report.candidates:
        if report.precision not in done.passed:
            write_whole(rejected / f"candidate.{report.precision}.onnx", done.contents[report.precision])
    write_report(done.report, rejected)
    return rejected
