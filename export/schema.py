"""The records of the parity report: the compared models, the images, and the results of every gate.

``ParityReport`` is the content of parity.json. The module has no dependencies within ``export``; the other modules fill
and read these records.
"""

from typing import Annotated, Literal

from pydantic import Field

from ltkd.contract.bundle import Precision
from ltkd.contract.calibration import Calibration
from ltkd.contract.records import Record, VersionedRecord

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
GateName = Literal["G0 structure", "G1 numeric", "G2 decisions", "G3 task", "G4 confidence", "G5 host"]

EXIT_CODES: dict[Verdict, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
"""Exit code of the commands that certify, by verdict; 2 is reserved for errors in usage and input."""

ALL = "all"
"""Name of the row for all images together."""


class Gate(Record):
    """The result of one gate.

    Attributes:
        findings: Sentences for people; unless the verdict is PASS, they give the reason.
    """

    name: GateName
    verdict: Verdict
    findings: tuple[str, ...] = ()


class Margins(Record):
    """The acceptable loss of accuracy, as a fraction.

    Attributes:
        overall: Margin for all images together.
        group: Margin for each group that is not in ``groups``.
        groups: Margins by group name.
    """

    overall: float = Field(gt=0, lt=1)
    group: float = Field(gt=0, lt=1)
    groups: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=dict)

    def of(self, group: str) -> float:
        """The margin of a group, or of ``all`` images."""
        return self.overall if group == ALL else self.groups.get(group, self.group)


class GroupParity(Record):
    """Reference and candidate on the images of one group, or on ``all`` images. Limits are one-sided at 95 %.

    A wrong PASS of the table requires a wrong PASS in every row, so each row's upper limit has an error rate of 5 %. A
    wrong FAIL requires only one row, so the lower limits have a joint error rate of 5 % (Bonferroni).

    Attributes:
        reference_accuracy: A fraction; None, as every undefined value, if there are no images.
        loss: Reference accuracy minus candidate accuracy.
        loss_lower_limit: Lower confidence limit of the loss, at 95 % for all rows jointly.
        loss_upper_limit: Tango's upper confidence limit of the loss, raised where its error rate would exceed 5 %; the
            smallest margin that these images certify.
        num_flips: Images whose most likely class changed.
        flip_rate_upper_limit: Upper confidence limit of the rate of flips, by Clopper and Pearson.
        num_clear_flips: Flips of images that the reference classifies with a clear margin, or for which the candidate's
            logits are not finite.
        mcnemar_p: Exact two-sided p-value of McNemar's test, adjusted over the rows by Holm's method. It is only
            a warning and does not affect the verdict.
        verdict: PASS if the upper limit of the loss is below the margin, FAIL if the lower limit is above it, else
            INCONCLUSIVE.
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
        flagged: Whether the class is a discovery at a false discovery rate of 5 % (Benjamini and Hochberg).
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
    """How many images changed class, for one interval of the reference's margin between the two highest logits.

    Attributes:
        above: Lower end of the interval, as a share of the span of the logits.
        up_to: Upper end of the interval.
        num_images: Images in the interval, for each group in the order of the task's groups.
        num_flips: Number of these images that changed class.
    """

    above: float
    up_to: float
    num_images: tuple[int, ...]
    num_flips: tuple[int, ...]


class Difference(Record):
    """A mean difference, candidate minus reference, with its 95 % confidence interval from a paired bootstrap."""

    value: float
    low: float
    high: float


class ConfidenceParity(Record):
    """How much the probabilities changed, for the images whose true class is in one group, or for ``all`` images.

    Attributes:
        kl: Mean Kullback-Leibler divergence of the candidate's probabilities from the reference's, in nats.
        confidence_change: Mean absolute change of the highest probability.
        nll: Difference of the negative log likelihood, in nats.
        brier: Difference of the Brier score.
        reference_ece: Expected calibration error of the reference, with 15 equal intervals and without calibration;
            None without images.
        candidate_ece: The same for the candidate.
        ece_null: Mean expected calibration error that a perfectly calibrated model with the candidate's confidences
            would have on this number of images.
        ece_null_upper: The 95 % quantile of the same.
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
    """Mean confidence and accuracy of the predictions in one interval of confidence, on the certify images."""

    above: float
    up_to: float
    num_images: int
    mean_confidence: float | None
    accuracy: float | None


class GroupReliability(Record):
    """How well the confidence of predictions in one group agrees with their accuracy, before and after calibration.

    Attributes:
        group: Group of the *predicted* class.
        num_images: Certify images whose prediction is in the group.
        before: Reliability with the original logits.
        after: Reliability with the group's temperature.
        ece_before: Expected calibration error with the original logits; None without images.
        ece_after: Expected calibration error with the group's temperature; None without images.
        ece_null: Mean expected calibration error that a perfectly calibrated model would have on this number of images.
    """

    group: str
    num_images: int
    before: tuple[ReliabilityBin, ...]
    after: tuple[ReliabilityBin, ...]
    ece_before: float | None
    ece_after: float | None
    ece_null: float | None


class ConfidenceCertificate(Record):
    """The calibration that the service uses, and its evaluation on images that were not used to fit it.

    Attributes:
        calibration: The calibration that is written to the manifest.
        reliability: One entry per predicted group.
        mean_set_size: Mean number of classes in a prediction set.
        empty_sets: Share of images whose prediction set is empty.
        num_temperature_images: Images on which the temperatures were fitted.
        num_threshold_images: Images on which expected accuracy, abstention and prediction sets were fitted.
    """

    calibration: Calibration
    reliability: tuple[GroupReliability, ...]
    mean_set_size: float
    empty_sets: float
    num_temperature_images: int
    num_threshold_images: int


class QuantisationTrial(Record):
    """One int8 configuration and its loss of accuracy on the selection images.

    Attributes:
        configuration: Description such as ``minmax, per channel, balanced``.
        float_layers: Nodes that were kept in float.
        worst_group: Group with the largest loss of accuracy.
        worst_group_loss: Loss of accuracy in this group, a fraction.
        overall_loss: Loss of accuracy over all selection images, a fraction.
        kl: Mean divergence from the fp32 model's probabilities in the group where it is largest; breaks ties.
        chosen: Whether this configuration was selected for certification.
    """

    configuration: str
    float_layers: tuple[str, ...]
    worst_group: str
    worst_group_loss: float
    overall_loss: float
    kl: float
    chosen: bool


class LayerError(Record):
    """The error of one layer's output if the layer gets the reference's inputs.

    Attributes:
        layer: Name of the node.
        operator: Operator type of the node.
        error: Root mean square of the difference, as a share of the reference's root mean square; at most 1,000, which
            also stands for errors that are not finite.
    """

    layer: str
    operator: str
    error: float


class Latency(Record):
    """The time of one batch in milliseconds: median and quartiles of interleaved repetitions."""

    batch: int
    median_ms: float
    low_ms: float
    high_ms: float


class Runtime(Record):
    """The software and hardware that ran the candidate.

    Attributes:
        onnxruntime: Version of ONNX Runtime.
        provider: Execution provider of ONNX Runtime.
        isa: The vector instruction set, such as ``avx2`` or ``avx512_vnni``, on which int8 results depend.
        tf32: Whether float32 was computed in TF32; None on devices without TF32.
    """

    onnxruntime: str
    provider: str
    isa: str
    tf32: bool | None


class CandidateReport(Record):
    """The comparison of one candidate with the reference.

    Attributes:
        file: Name of the file in the bundle, or of the file that was given.
        classes: Sorted by training count, most frequent first.
        layers: After FAIL, the layers in which the difference arises, in the order of the graph; the findings name the
            first one above rounding.
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
    """One split of the images; its name states its use.

    Attributes:
        sha256: Hash of the bytes of the images in memory, followed by those of the labels.
    """

    name: Literal["quantisation", "selection", "confidence", "certify"]
    num_images: int
    per_group: tuple[int, ...]
    sha256: str


class DataRecord(Record):
    """The images on which the gates were evaluated.

    Attributes:
        description: Description of the images for people.
        splits: Splits without common images; the images of ``certify`` influenced neither weights nor settings.
        num_views: How many of the certify images are random augmented views of others, added if there were too few.
        num_duplicates: Test images that were left out because they are copies of another test image, or of a training
            image (checked only if the training images are in memory).
    """

    description: str
    splits: tuple[SplitRecord, ...]
    num_views: int
    num_duplicates: int


class ParityReport(VersionedRecord):
    """The content of parity.json.

    Attributes:
        verdict: Verdict on the bundle: PASS if fp32 passed. A precision that did not pass is not in the bundle.
        reference: Description of the model with which the candidates were compared.
        groups: Names of the class groups, most frequent classes first.
        versions: Versions of the packages that converted and certified, by package name.
        confidence: Confidence level of every one-sided limit in the report.
        candidates: One per precision that was tried, fp32 first.
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
