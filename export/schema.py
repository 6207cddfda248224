"""The parity report: what was held against what, on which images, and what came out. The content of parity.json."""

from typing import Annotated, Literal

from pydantic import Field

from ltkd.contract.bundle import Precision
from ltkd.contract.calibration import Calibration
from ltkd.contract.records import Record, VersionedRecord

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
GateName = Literal["G0 structure", "G1 numeric", "G2 decisions", "G3 task", "G4 confidence", "G5 host"]

EXIT_CODES: dict[Verdict, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
"""What a command that certifies exits with; 2 is kept for usage and input."""

ALL = "all"
"""The name of the row for all images together."""


class Gate(Record):
    """What one gate says.

    Attributes:
        findings: Sentences for people; those of a gate that was not passed say why.
    """

    name: GateName
    verdict: Verdict
    findings: tuple[str, ...] = ()


class Margins(Record):
    """The loss of accuracy that is acceptable, as a fraction.

    Attributes:
        overall: For all images together.
        group: For each group that is not named in ``groups``.
        groups: By the name of a group.
    """

    overall: float = Field(gt=0, lt=1)
    group: float = Field(gt=0, lt=1)
    groups: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=dict)

    def of(self, group: str) -> float:
        """The margin of a group, or of ``all``."""
        return self.overall if group == ALL else self.groups.get(group, self.group)


class GroupParity(Record):
    """Reference and candidate on the images of one group, or on ``all``. Limits are one-sided at 95 %.

    A wrong PASS of the whole table must get past every row, so each row's upper limit may err in one case of twenty. A
    wrong FAIL takes one row, so the lower limits err together in one case of twenty (Bonferroni).

    Attributes:
        reference_accuracy: None, like all that is undefined, when there are no images.
        loss: Reference minus candidate accuracy.
        loss_lower_limit: At 95 % for all rows together.
        loss_upper_limit: Tango's, raised where it would err too often; the smallest margin that these images certify.
        num_flips: Images whose most likely class changed.
        flip_rate_upper_limit: Clopper and Pearson's.
        num_clear_flips: Flips of images whose class was clear to the reference, or whose logits are not finite.
        mcnemar_p: Exact two-sided p-value of McNemar's test, adjusted by Holm over the rows. An alarm, no verdict.
        verdict: PASS when the upper limit of the loss lies below the margin, FAIL when the lower one lies above.
    """

    group: str
    num_images: int
    reference_accuracy: float | None
    candidate_accuracy: float | None
    right_to_wrong: int
    wrong_to_right: int
    loss: float | None
    loss_lower_limit: float
    loss_upper_limit: float
    margin: float
    num_flips: int
    flip_rate_upper_limit: float
    num_clear_flips: int
    mcnemar_p: float
    verdict: Verdict


class ClassParity(Record):
    """Reference and candidate on the images of one class.

    Attributes:
        p_value: Exact one-sided p-value of McNemar's test that the class lost accuracy.
        flagged: Whether the class is among the discoveries at a false discovery rate of 5 % (Benjamini and Hochberg).
    """

    label: str
    group: str
    train_count: int
    num_images: int
    reference_accuracy: float | None
    candidate_accuracy: float | None
    p_value: float
    flagged: bool


class FlipsByMargin(Record):
    """How many images changed class, by how clear their class was to the reference.

    Attributes:
        above: Lower end of the interval of the margin between the two highest logits, as a share of their span.
        up_to: Its upper end.
        num_images: Images of each group, in the order of the task's groups.
        num_flips: Of these, the ones that changed class.
    """

    above: float
    up_to: float
    num_images: tuple[int, ...]
    num_flips: tuple[int, ...]


class Difference(Record):
    """A mean difference, candidate minus reference, with its 95 % interval by paired bootstrap."""

    value: float
    low: float
    high: float


class ConfidenceParity(Record):
    """How far the probabilities of a group's images moved (by true class), or of ``all``.

    Attributes:
        kl: Mean Kullback-Leibler divergence of the candidate's probabilities from the reference's, in nats.
        confidence_change: Mean absolute change of the highest probability.
        nll: Of the negative log likelihood, in nats.
        brier: Of the Brier score.
        reference_ece: Expected calibration error, 15 equal intervals, uncalibrated; None without images.
        candidate_ece: Likewise.
        ece_null: What a perfectly calibrated model of the candidate's confidences would show on so few images, mean.
        ece_null_upper: The 95 % quantile of that.
    """

    group: str
    num_images: int
    kl: float | None
    confidence_change: float | None
    nll: Difference | None
    brier: Difference | None
    reference_ece: float | None
    candidate_ece: float | None
    ece_null: float | None
    ece_null_upper: float | None


class ReliabilityBin(Record):
    """Predictions of one interval of confidence: how sure and how often right, on certification images."""

    above: float
    up_to: float
    num_images: int
    mean_confidence: float | None
    accuracy: float | None


class GroupReliability(Record):
    """How true the confidence of predictions in one group is, before and after calibration.

    Attributes:
        group: Of the *predicted* class.
        num_images: Certification images predicted in it.
        before: With the logits as they are.
        after: With the group's temperature.
        ece_before: Expected calibration error; None without images.
        ece_after: Likewise.
        ece_null: What a perfectly calibrated model would show on so few images, mean.
    """

    group: str
    num_images: int
    before: tuple[ReliabilityBin, ...]
    after: tuple[ReliabilityBin, ...]
    ece_before: float | None
    ece_after: float | None
    ece_null: float | None


class ConfidenceCertificate(Record):
    """What the service will say of confidence, and how it held on images that fitted none of it.

    Attributes:
        calibration: What goes into the manifest.
        reliability: One entry a predicted group.
        mean_set_size: Mean number of classes in a prediction set.
        empty_sets: Share of images whose prediction set is empty.
        num_temperature_images: Images that fitted the temperatures.
        num_threshold_images: Images that fitted expected accuracy, abstention and prediction sets.
    """

    calibration: Calibration
    reliability: tuple[GroupReliability, ...]
    mean_set_size: float
    empty_sets: float
    num_temperature_images: int
    num_threshold_images: int


class QuantisationTrial(Record):
    """One configuration of int8 and what it lost on the selection images.

    Attributes:
        configuration: In words, such as ``minmax, per channel, balanced``.
        float_layers: Nodes that were kept in float.
        worst_group: Where the most accuracy was lost.
        worst_group_loss: That loss, a fraction.
        overall_loss: Of all selection images.
        kl: Mean divergence from the fp32 model's probabilities in the group where it is largest; breaks ties.
        chosen: Whether this is the one that went on to the gates.
    """

    configuration: str
    float_layers: tuple[str, ...]
    worst_group: str
    worst_group_loss: float
    overall_loss: float
    kl: float
    chosen: bool


class LayerError(Record):
    """How far a layer's output is from the reference's, given what the reference gives to that layer.

    Attributes:
        layer: Name of the node.
        operator: Its type.
        error: Root mean square of the difference as a share of the reference's root mean square; at most 1,000, which
            also stands for what is not finite.
    """

    layer: str
    operator: str
    error: float


class Latency(Record):
    """How long one batch takes, in milliseconds: median and quartiles of interleaved repeats."""

    batch: int
    median_ms: float
    low_ms: float
    high_ms: float


class Runtime(Record):
    """What ran the candidate.

    Attributes:
        provider: Execution provider of ONNX Runtime.
        isa: The vector instructions that decide how int8 is computed, such as ``avx2`` or ``avx512_vnni``.
        tf32: Whether float32 was shortened to TF32; None where there is no such thing.
    """

    onnxruntime: str
    provider: str
    isa: str
    tf32: bool | None


class CandidateReport(Record):
    """One precision, held against the reference.

    Attributes:
        file: Name in the bundle, or of the file that was given.
        classes: Sorted by training count, most frequent first.
        layers: On FAIL, the layers in which the difference arises, in the order of the graph; the first one above
            rounding is named in the findings.
    """

    precision: Precision
    verdict: Verdict
    file: str
    sha256: str
    num_bytes: int
    runtime: Runtime
    margins: Margins
    gates: tuple[Gate, ...]
    groups: tuple[GroupParity, ...] = ()
    classes: tuple[ClassParity, ...] = ()
    flips: tuple[FlipsByMargin, ...] = ()
    confidence: tuple[ConfidenceParity, ...] = ()
    certificate: ConfidenceCertificate | None = None
    quantisation: tuple[QuantisationTrial, ...] = ()
    layers: tuple[LayerError, ...] = ()
    latency: tuple[Latency, ...] = ()


class SplitRecord(Record):
    """One part of the images, and what it was used for.

    Attributes:
        sha256: Of the images, then the labels, as they lie in memory.
    """

    name: Literal["quantisation", "selection", "confidence", "certify"]
    num_images: int
    per_group: tuple[int, ...]
    sha256: str


class DataRecord(Record):
    """The images that the gates were run on.

    Attributes:
        description: Which they are, in words.
        splits: Parts that share no image; ``certify`` chose nothing.
        num_views: How many of the certify images are random views of others, made because there were too few.
        num_duplicates: Test images left out because they are copies: of another test image, or of a training image
            where these are in memory.
    """

    description: str
    splits: tuple[SplitRecord, ...]
    num_views: int
    num_duplicates: int


class ParityReport(VersionedRecord):
    """The content of parity.json.

    Attributes:
        verdict: Of the bundle: PASS when fp32 passed. A precision that did not pass is not in the bundle.
        reference: What the candidates were held against.
        groups: Names of the class groups, most frequent classes first.
        versions: Package name to version, of what converted and certified.
        confidence: Of every one-sided limit in the report.
        candidates: One a precision that was tried, fp32 first.
    """

    schema_version: int = 2
    name: str
    verdict: Verdict
    reference: str
    groups: tuple[str, ...]
    data: DataRecord
    versions: dict[str, str]
    confidence: float
    candidates: tuple[CandidateReport, ...]
