"""Compare the accuracy of any two models by class group; ``ltkd parity`` calls this module.

Each model is a run, a bundle or an ONNX file. An ONNX file that was made by another tool may take uint8
[N, S, S, 3], as the files of this project do, or normalised float32 [N, 3, S, S]. Its input and output may have any
name, and its batch size may be fixed.

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

from export.certification.accuracy_margins import margins_for
from export.certification.candidate import apply_gates
from export.certification.reference import BATCH_SIZE, Reference, torch_logits
from export.certification.splits import split_record, unsplit_test_images
from export.certification.statistics import CONFIDENCE
from export.conversion.session import CPU, INPUT, instruction_set, open_session, read_model, runtime_version
from export.schema import CandidateReport, DataRecord, ParityReport, Runtime
from ltkd.contract.bundle import MANIFEST_FILE, Precision, open_bundle
from ltkd.contract.preprocessing import Resizing
from ltkd.contract.records import sha256_of
from ltkd.contract.task import Task
from ltkd.data.datasets import Dataset
from ltkd.data.image_files import Images
from ltkd.errors import BundleError, RunError, UsageError
from ltkd.training.run_folder import CONFIG_FILE, open_run


@dataclass(frozen=True)
class ComparedModel:
    """One of the two models of a comparison.

    Attributes:
        description: What the model is, as text for people.
        file: Name of its file or folder.
        sha256: Hash of the file, or of a run's weights.
        num_bytes: Size of the file, or of a run's weights.
        content: The ONNX file, if it has the input of this project's files, so that layers can be compared; else None.
        precision: Precision of the weights, as found in the file.
        logits: Computes the logits, float [N, C], of any number of images.
    """

    description: str
    file: str
    sha256: str
    num_bytes: int
    content: bytes | None
    precision: Precision
    logits: Callable[[Images], NDArray[np.floating]]


def common_resizing(*paths: Path) -> Resizing:
    """How images are resized for a comparison: as the runs and bundles among the models state it, else as in new runs.

    Raises:
        UsageError: Two models state different ways.
        RunError: A run cannot be used.
        BundleError: A bundle cannot be used.
    """
    stated: dict[Path, Resizing] = {}
    for path in paths:
        if (path / CONFIG_FILE).is_file():
            stated[path] = open_run(path).task.resizing
        elif (path / MANIFEST_FILE).is_file():
            stated[path] = open_bundle(path).manifest.task.resizing
    if len(set(stated.values())) > 1:
        ways = "; ".join(f"{path}: {resizing!r}" for path, resizing in stated.items())
        raise UsageError(
            f"the two models are for images that are resized differently ({ways}). To resize the images for one of "
            "them, give the other as an ONNX file, which states none."
        )
    return next(iter(stated.values()), Resizing())


def open_model(path: Path, task: Task) -> ComparedModel:
    """Open a run, a bundle (its fp32 model) or an ONNX file.

    Args:
        path: The run's folder, the bundle's directory or the file.
        task: The classes of both models, their groups, and the size of the images. For a file that takes float32, the
            task's mean and standard deviation normalise the pixels.

    Raises:
        UsageError: There is no such thing at the path, or its input has another format.
        RunError: The run cannot be used, or has other classes.
        BundleError: The bundle or the file cannot be used, or has other classes.
    """
    if (path / CONFIG_FILE).is_file():
        return _open_run_model(path, task)
    if (path / MANIFEST_FILE).is_file():
        file = open_bundle(path).model_path("fp32")
        return _open_file(file, f"fp32 of the bundle {path}", task)
    if path.is_file():
        return _open_file(path, str(path), task)
    raise UsageError(f"{path} is neither a run, a bundle nor an ONNX file; give the path of one of these.")


def compare_models(
    reference: ComparedModel, candidate: ComparedModel, data: Dataset, margins: Mapping[str, float]
) -> ParityReport:
    """Compare a candidate with a reference on all test images, by class group.

    The candidate may be a different network, for example pruned or retrained. Changed decisions are therefore only
    reported, and the verdict depends on the accuracy. The default margins are those of int8.

    Args:
        reference: The model whose accuracy is to be kept.
        candidate: The model that is to replace it.
        data: The images; test images that are also training images are left out.
        margins: Acceptable loss of accuracy, as for margins.margins_for.

    Raises:
        UsageError: A margin is not a fraction, or is given for an unknown group.
        BundleError: A file does not run on the images, or its first output is not the logits.
        RunError: A run gives logits that are not finite.
    """
    task, (certify, num_duplicates) = data.task, unsplit_test_images(data)
    baseline = Reference(
        task=task,
        certify=certify,
        logits_NC=reference.logits(certify.images),
        sample_M=np.zeros(0, np.int64),
        duplicates=(),
        float64_logits_MC=None,
        onnx=reference.content,
    )
    report = CandidateReport(
        precision=candidate.precision,
        verdict="FAIL",
        file=candidate.file,
        sha256=candidate.sha256,
        num_bytes=candidate.num_bytes,
        runtime=Runtime(onnxruntime=runtime_version(), provider=CPU, isa=instruction_set(), tf32=None),
        margins=margins_for("int8", margins, task.groups),
        gates=(),
    )
    assessed = apply_gates(report, candidate.content, candidate.logits(certify.images), baseline, rounding_only=False)
    return ParityReport(
        name=candidate.file,
        verdict=assessed.verdict,
        reference=reference.description,
        groups=task.groups.names,
        data=DataRecord(
            description=f"the {len(certify.labels_N):,} test images",
            splits=(split_record("certify", certify, task.groups),),
            num_views=0,
            num_duplicates=num_duplicates,
        ),
        versions={name: importlib.metadata.version(name) for name in ("ltkd", "numpy")},
        confidence=CONFIDENCE,
        candidates=(assessed,),
    )


def precision_of(model: ModelProto) -> Precision:
    """The precision of a model: int8 if it has quantised layers, fp16 if it has float16 weights, else fp32."""
    if any(node.op_type in ("QuantizeLinear", "QLinearConv", "ConvInteger") for node in model.graph.node):
        return "int8"
    has_float16 = any(weight.data_type == weight.FLOAT16 for weight in model.graph.initializer)
    return "fp16" if has_float16 else "fp32"


def _open_run_model(path: Path, task: Task) -> ComparedModel:
    run = open_run(path)
    _check_classes(path, run.task.class_names, task, RunError)
    if run.task.input_px != task.input_px:
        raise RunError(
            f"the side of the input of {path} is {run.task.input_px} pixels, that of the images {task.input_px}; "
            f"use --input-px {run.task.input_px}."
        )
    network = run.load_network()
    return ComparedModel(
        description=f"torch float32 of the run {path}",
        file=path.resolve().name,
        sha256=sha256_of(run.weights_path),
        num_bytes=run.weights_path.stat().st_size,
        content=None,
        precision="fp32",
        logits=lambda images: torch_logits(network, run.task, images, torch.float32),
    )


def _open_file(path: Path, description: str, task: Task) -> ComparedModel:
    content = path.read_bytes()
    model = read_model(content)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        names = json.loads(metadata.get("class_names", "null"))
    except ValueError:
        names = None  # another tool has an entry of that name in another format
    if isinstance(names, list):
        _check_classes(path, names, task, BundleError)
    session = open_session(content)
    to_input, batch_size = _input_format(path, session, task)
    return ComparedModel(
        description=description,
        file=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        content=content if session.get_inputs()[0].name == INPUT else None,
        precision=precision_of(model),
        logits=lambda images: _run_file(path, session, to_input, batch_size, images, len(task.class_names)),
    )


def _check_classes(path: Path, names: Sequence[str], task: Task, error: type[RunError] | type[BundleError]) -> None:
    if tuple(names) != task.class_names:
        differ = next(
            (at for at, pair in enumerate(zip(names, task.class_names, strict=False)) if len(set(pair)) > 1), 0
        )
        name = names[differ] if differ < len(names) else "missing"
        raise error(
            f"{path} has {len(names)} classes, the images have {len(task.class_names)}; class {differ} is {name} in "
            f"the model and {task.class_names[differ]} in the images. Use images with the model's classes in the same "
            "order."
        )


ToInput = Callable[[NDArray[np.uint8]], NDArray[np.generic]]


def _input_format(path: Path, session: InferenceSession, task: Task) -> tuple[ToInput, int]:
    """How pixels are converted to the file's input, and its batch size; 0 if any size is accepted."""
    side, (first, *more) = task.input_px, session.get_inputs()
    shape = list(first.shape)
    batch_size = shape[0] if shape and isinstance(shape[0], int) else 0
    sizes = [None if isinstance(size, str) else size for size in shape[1:]]
    expected = {"tensor(uint8)": [side, side, 3], "tensor(float)": [3, side, side]}.get(first.type)
    fits = (
        expected is not None and len(sizes) == 3 and all(s in (None, e) for s, e in zip(sizes, expected, strict=True))
    )
    if more or not fits:
        inputs = [(node.name, node.type, node.shape) for node in session.get_inputs()]
        raise UsageError(
            f"{path} has the inputs {inputs}, expected one input: uint8 [N, {side}, {side}, 3] or normalised float32 "
            f"[N, 3, {side}, {side}]. For images of another size use --input-px."
        )
    if first.type == "tensor(uint8)":
        return lambda images_BSS3: images_BSS3, batch_size
    mean, std = (np.array(values, np.float32) for values in (task.mean, task.std))
    return (
        lambda images_BSS3: (
            ((images_BSS3.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
        ),
        batch_size,
    )


def _run_file(
    path: Path, session: InferenceSession, to_input: ToInput, batch_size: int, images: Images, num_classes: int
) -> NDArray[np.floating]:
    name, step = session.get_inputs()[0].name, batch_size or BATCH_SIZE
    batches = []
    for start in range(0, len(images), step):
        images_BSS3 = images[start : start + step]
        # a fixed batch size needs a full last batch: repeat images
        padded = np.resize(images_BSS3, (batch_size or len(images_BSS3), *images_BSS3.shape[1:]))
        try:
            logits_BC = session.run(None, {name: to_input(padded)})[0][: len(images_BSS3)]
        except Exception as reason:  # the error types of ONNX Runtime have no common base class
            raise BundleError(f"{path} does not run on {len(padded)} images ({str(reason).splitlines()[0]}).") from None
        if logits_BC.shape != (len(images_BSS3), num_classes):
            raise BundleError(
                f"the first output of {path} has shape {list(logits_BC.shape)} for {len(images_BSS3)} images, expected "
                f"logits [{len(images_BSS3)}, {num_classes}]; the first output must be the logits."
            )
        batches.append(logits_BC)
    return np.concatenate(batches)
