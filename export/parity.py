"""Any two models, held against each other: each side of ``ltkd parity`` is a run, a bundle or an ONNX file.

An ONNX file from elsewhere may take uint8 [N, S, S, 3], as ours do, or normalised float32 [N, 3, S, S]; its input and
output may have any name, its batch may be fixed.

Shape legend: N images, B a batch of them, S side in pixels, C classes.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime import InferenceSession

from export.certification.candidate import apply_gates
from export.certification.margins import margins_for
from export.certification.reference import BATCH_SIZE, Reference, torch_logits
from export.certification.splits import split_record, unsplit_test_images
from export.certification.statistics import CONFIDENCE
from export.conversion.session import CPU, INPUT, isa, open_session, read_model, runtime_version
from export.schema import CandidateReport, DataRecord, ParityReport, Runtime
from ltkd.contract.bundle import MANIFEST_FILE, Precision, open_bundle
from ltkd.contract.records import sha256_of
from ltkd.contract.task import Task
from ltkd.data.datasets import Dataset
from ltkd.data.image_files import Images
from ltkd.errors import BundleError, RunError, UsageError
from ltkd.training.run_folder import CONFIG_FILE, open_run


@dataclass(frozen=True)
class ComparedModel:
    """One of two models.

    Attributes:
        words: What it is, for people.
        file: Name of its file or folder.
        sha256: Of the file, or of a run's weights.
        num_bytes: Their size.
        content: The ONNX file, if it takes images as ours do, to look into its layers; else None.
        precision: Of the weights, as the file shows.
        logits: Float [N, C] of any number of images.
    """

    words: str
    file: str
    sha256: str
    num_bytes: int
    content: bytes | None
    precision: Precision
    logits: Callable[[Images], NDArray[np.floating]]


def open_model(path: Path, task: Task) -> ComparedModel:
    """Open a run, a bundle (its fp32 model) or an ONNX file.

    Args:
        path: Which.
        task: The classes that both sides shall tell apart, their groups, and the images' size. Its mean and standard
            deviation normalise the pixels for a file that takes float32.

    Raises:
        UsageError: There is nothing of the kind at the path, or it takes images in another form.
        RunError: The run cannot be used, or has other classes.
        BundleError: The bundle or the file cannot be used, or has other classes.
    """
    if (path / CONFIG_FILE).is_file():
        return _run_side(path, task)
    if (path / MANIFEST_FILE).is_file():
        file = open_bundle(path).model_path("fp32")
        return _file_side(file, f"fp32 of the bundle {path}", task)
    if path.is_file():
        return _file_side(path, str(path), task)
    raise UsageError(f"{path} is neither a run, a bundle nor an ONNX file; give one of these.")


def compare_models(
    reference: ComparedModel, candidate: ComparedModel, data: Dataset, margins: Mapping[str, float]
) -> ParityReport:
    """Hold a candidate against a reference on all test images, by group of classes.

    The candidate may be another model, pruned or retrained, so decisions that change are told and accuracy is judged.
    The margins of int8 hold where none is given.

    Args:
        reference: What is to be kept.
        candidate: What is to replace it.
        data: The images; those of the test set that are also training images are left out.
        margins: As in gates.margins_for.

    Raises:
        UsageError: A margin is for no group, or no fraction.
        BundleError: A file does not run on the images, or gives no logits.
        RunError: A run gives logits that are not finite.
    """
    task, (certify, num_duplicates) = data.task, unsplit_test_images(data)
    asked = Reference(
        task=task,
        certify=certify,
        logits_NC=reference.logits(certify.images),
        sample_M=np.zeros(0, np.int64),
        copies=(),
        oracle_MC=None,
        onnx=reference.content,
    )
    report = CandidateReport(
        precision=candidate.precision,
        verdict="FAIL",
        file=candidate.file,
        sha256=candidate.sha256,
        num_bytes=candidate.num_bytes,
        runtime=Runtime(onnxruntime=runtime_version(), provider=CPU, isa=isa(), tf32=None),
        margins=margins_for("int8", margins, task.groups),
        gates=(),
    )
    judged = apply_gates(report, candidate.content, candidate.logits(certify.images), asked, rounding_only=False)
    return ParityReport(
        name=candidate.file,
        verdict=judged.verdict,
        reference=reference.words,
        groups=task.groups.names,
        data=DataRecord(
            description=f"the {len(certify.label_N):,} test images",
            splits=(split_record("certify", certify, task.groups),),
            num_views=0,
            num_duplicates=num_duplicates,
        ),
        versions={name: importlib.metadata.version(name) for name in ("ltkd", "numpy")},
        confidence=CONFIDENCE,
        candidates=(judged,),
    )


def precision_of(model: ModelProto) -> Precision:
    """What a file was made into: int8 if it has quantised layers, fp16 if it has half precision weights."""
    if any(node.op_type in ("QuantizeLinear", "QLinearConv", "ConvInteger") for node in model.graph.node):
        return "int8"
    half = any(weight.data_type == weight.FLOAT16 for weight in model.graph.initializer)
    return "fp16" if half else "fp32"


def _run_side(path: Path, task: Task) -> ComparedModel:
    trained = open_run(path)
    own = trained.task
    _same_classes(path, own.class_names, task, RunError)
    if own.input_px != task.input_px:
        raise RunError(f"{path} takes {own.input_px} pixels, the images have {task.input_px}; use --input-px.")
    network = trained.load_network()
    return ComparedModel(
        words=f"torch float32 of the run {path}",
        file=path.resolve().name,
        sha256=sha256_of(trained.weights_path),
        num_bytes=trained.weights_path.stat().st_size,
        content=None,
        precision="fp32",
        logits=lambda images: torch_logits(network, own, images, torch.float32),
    )


def _file_side(path: Path, words: str, task: Task) -> ComparedModel:
    content = path.read_bytes()
    model = read_model(content)
    said = {entry.key: entry.value for entry in model.metadata_props}
    try:
        names = json.loads(said.get("class_names", "null"))
    except ValueError:
        names = None  # another tool's entry of that name
    if isinstance(names, list):
        _same_classes(path, names, task, BundleError)
    session = open_session(content)
    feed, batch = _form(path, session, task)
    return ComparedModel(
        words=words,
        file=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        content=content if session.get_inputs()[0].name == INPUT else None,
        precision=precision_of(model),
        logits=lambda images: _run(path, session, feed, batch, images, len(task.class_names)),
    )


def _same_classes(path: Path, names: Sequence[str], task: Task, error: type[RunError] | type[BundleError]) -> None:
    if tuple(names) != task.class_names:
        differ = next(
            (at for at, pair in enumerate(zip(names, task.class_names, strict=False)) if len(set(pair)) > 1), 0
        )
        shown = names[differ] if differ < len(names) else "none"
        raise error(
            f"{path} has {len(names)} classes, the images {len(task.class_names)}; class {differ} is {shown} there "
            f"and {task.class_names[differ]} here. Hold it against images of its own classes, in its own order."
        )


Feed = Callable[[NDArray[np.uint8]], NDArray[np.generic]]


def _form(path: Path, session: InferenceSession, task: Task) -> tuple[Feed, int]:
    """How pixels become the file's input, and the batch it takes; 0 where it takes any."""
    side, (first, *more) = task.input_px, session.get_inputs()
    shape = list(first.shape)
    batch = shape[0] if shape and isinstance(shape[0], int) else 0
    sizes = [None if isinstance(size, str) else size for size in shape[1:]]
    expected = {"tensor(uint8)": [side, side, 3], "tensor(float)": [3, side, side]}
    wanted = expected.get(first.type)
    fits = wanted is not None and len(sizes) == 3 and all(s in (None, w) for s, w in zip(sizes, wanted, strict=True))
    if more or not fits:
        takes = [(node.name, node.type, node.shape) for node in session.get_inputs()]
        raise UsageError(
            f"{path} takes {takes}, expected one input: uint8 [N, {side}, {side}, 3] or normalised float32 "
            f"[N, 3, {side}, {side}]. For images of another size use --input-px."
        )
    if first.type == "tensor(uint8)":
        return lambda images_BSS3: images_BSS3, batch
    mean, std = (np.array(values, np.float32) for values in (task.mean, task.std))
    return (
        lambda images_BSS3: (
            ((images_BSS3.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
        ),
        batch,
    )


def _run(
    path: Path, session: InferenceSession, feed: Feed, batch: int, images: Images, num_classes: int
) -> NDArray[np.floating]:
    name, size = session.get_inputs()[0].name, batch or BATCH_SIZE
    found = []
    for start in range(0, len(images), size):
        images_BSS3 = images[start : start + size]
        whole = np.resize(images_BSS3, (batch or len(images_BSS3), *images_BSS3.shape[1:]))  # fills a fixed batch
        try:
            logits_BC = session.run(None, {name: feed(whole)})[0][: len(images_BSS3)]
        except Exception as reason:  # ONNX Runtime has a dozen error types and no parent for them
            raise BundleError(f"{path} does not run on {len(whole)} images ({str(reason).splitlines()[0]}).") from None
        if logits_BC.shape != (len(images_BSS3), num_classes):
            raise BundleError(
                f"{path} gives {list(logits_BC.shape)} for {len(images_BSS3)} images, expected logits "
                f"[{len(images_BSS3)}, {num_classes}]; its first output has to be the logits."
            )
        found.append(logits_BC)
    return np.concatenate(found)
