"""A bundle, held against its own claims on this machine; needs no torch and no data."""

from pathlib import Path

import numpy as np

from export.candidate import open_session, run
from export.gates import SUM_ORDER_SHARE, span, structure
from export.parity import ParityReport
from ltkd.bundle import PARITY_FILE, Bundle, open_bundle
from ltkd.errors import BundleError
from ltkd.records import read_record


def verify_bundle(path: Path) -> Bundle:
    """Check that a bundle is whole, sound, certified, and still answers as it did when it was made.

    Raises:
        BundleError: Something is off; the message names the first thing.
    """
    bundle = open_bundle(path)
    report = read_record(path / bundle.manifest.parity.path, ParityReport, BundleError)
    model = bundle.manifest.precisions["fp32"]
    if (report.verdict, report.candidate_sha256) != ("PASS", model.sha256):
        raise BundleError(
            f"{path / PARITY_FILE} says {report.verdict} of a model {report.candidate_sha256[:12]}..., "
            f"expected PASS of {model.path} ({model.sha256[:12]}...); export again."
        )
    content, golden = bundle.model_path("fp32").read_bytes(), bundle.golden()
    gate = structure(content, bundle.manifest.task, golden.images_MSS3)
    if gate.verdict != "PASS":
        raise BundleError(f"{path / model.path}: {gate.findings[0]}")
    logits_MC = run(open_session(content), golden.images_MSS3)
    error, allowed = float(np.abs(logits_MC - golden.logits_MC).max()), SUM_ORDER_SHARE * span(golden.logits_MC)
    if not error <= allowed:
        raise BundleError(
            f"{path / model.path} answers its golden images with logits that are {error:.2g} off, {allowed:.2g} is "
            "rounding; this ONNX Runtime computes something else. Export again with it."
        )
    return bundle
