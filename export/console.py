"""The parity report: what was held against what, on which images, and what came out."""

import hashlib

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from export.gates import Gate, GroupParity, Margins, Verdict
from export.statistics import CONFIDENCE
from ltkd.bundle import Precision
from ltkd.files import Images
from ltkd.records import Record, VersionedRecord

EXIT_CODES: dict[Verdict, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
"""What a command that certifies exits with; 2 is kept for usage and input."""

HASHED_AT_ONCE = 256

_STYLES: dict[Verdict, str] = {"PASS": "green", "FAIL": "bold red", "INCONCLUSIVE": "yellow"}


class Runtime(Record):
    """What ran the candidate."""

    onnxruntime: str
    provider: str


class CertifyData(Record):
    """The images that the gates were run on; they chose nothing before.

    Attributes:
        description: Which they are, in words.
        sha256: Of the images, then the labels, as they lie in memory.
    """

    description: str
    num_images: int
    sha256: str


class ParityReport(VersionedRecord):
    """The content of parity.json.

    Attributes:
        reference: What the candidate was held against.
        candidate_sha256: Of the ONNX file.
        versions: Package name to version, of what converted and certified.
        confidence: Of every limit in the report, one-sided.
        gates: In order; a candidate that fails G0 cannot be asked further.
        groups: One row a group, then ``all``; none when G0 failed.
    """

    verdict: Verdict
    precision: Precision
    reference: str = "torch float32"
    candidate_sha256: str
    runtime: Runtime
    versions: dict[str, str]
    data: CertifyData
    margins: Margins
    confidence: float = CONFIDENCE
    gates: tuple[Gate, ...]
    groups: tuple[GroupParity, ...]


def certify_data(description: str, images: Images, label_N: NDArray[np.int64]) -> CertifyData:
    """Describe images so that anybody who has them can tell whether they are the same."""
    digest = hashlib.sha256()
    for start in range(0, len(images), HASHED_AT_ONCE):
        digest.update(np.ascontiguousarray(images[start : start + HASHED_AT_ONCE]).data)
    digest.update(np.ascontiguousarray(label_N).data)
    return CertifyData(description=description, num_images=len(images), sha256=digest.hexdigest())


def parity_table(report: ParityReport) -> Table:
    """The report for a console: one row a group, the gates below."""
    gates = "   ".join(f"{gate.name} {_styled(gate.verdict)}" for gate in report.gates)
    title = f"{report.precision} against {report.reference}, accuracy in %: {_styled(report.verdict)}"
    table = Table(title=title, caption=gates, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("group", no_wrap=True)
    for heading in ("n", "reference", "candidate", "loss", "upper\nlimit", "margin", "flips"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", no_wrap=True)
    for row in report.groups:
        fractions = (row.reference_accuracy, row.candidate_accuracy, row.loss, row.loss_upper_limit, row.margin)
        table.add_row(
            escape(row.group),
            f"{row.num_images:,}",
            *("-" if fraction is None else f"{100 * fraction:.2f}" for fraction in fractions),
            f"{row.num_flips:,}",
            _styled(row.verdict),
        )
    return table


def _styled(verdict: Verdict) -> str:
    return f"[{_STYLES[verdict]}]{verdict}[/]"
