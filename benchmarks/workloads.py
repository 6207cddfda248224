"""The images and bundles for the benchmarks of the service.

    python -m benchmarks.workloads FOLDER [NAME ...]

makes in FOLDER for every workload

    NAME/images/     encoded images: 32 x 32 PNG, 500 x 375 JPEG, or 4000 x 3000 JPEG of some 3 MB
    NAME/same/       a bundle with the float32 model only, which all servers use
    NAME/default/    the same with an additional int8 model, which our service selects on a CPU by default

The images are noise with about the spectrum of a photograph (benchmarks/training.py). The networks are untrained,
because the duration of a response does not depend on the weights. Batch statistics and the classifier are set on the
images, so that activations have a usual range and different images get different classes. The bundles are not
certified, and their manifests state it. The same call makes the same bytes.

Shape legend: N images, S side in pixels, C classes.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from benchmarks.training import photo_like_noise
from benchmarks.workload_specs import WORKLOADS, Workload
from export.conversion.fp32 import to_onnx
from export.conversion.int8 import Int8Config, collect_ranges
from ltkd.contract.bundle import (
    CARD_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_FILES,
    PARITY_FILE,
    REPORT_FILE,
    CertifiedModel,
    Golden,
    Manifest,
    Precision,
    Provenance,
    file_record,
    staged_bundle,
)
from ltkd.contract.calibration import Abstention, Calibration, ConfidenceBin, GroupCalibration, Proportion, SetThreshold
from ltkd.contract.class_groups import groups_by_share
from ltkd.contract.image_decoding import decode_image
from ltkd.contract.preprocessing import Preprocessing, Resizing
from ltkd.contract.records import write_record
from ltkd.contract.task import Task
from ltkd.data.long_tail import long_tailed_counts
from ltkd.models.registry import Normalise, build_network

NUM_CLASSES, NUM_GOLDEN = 100, 12
LOGIT_STD = 4.0
GRAIN = 7.5  # standard deviation of the noise of large images, of 255
INT8 = Int8Config("minmax", per_channel=True)
NOT_CERTIFIED = "nothing: random weights for measurements of speed, no accuracy was certified"


def make_workload(workload: Workload, folder: Path) -> None:
    """Make the images and both bundles of a workload."""
    candidates = [encode_image(number, workload) for number in range(workload.num_images * 3 // 2)]
    task = task_of(workload)
    pixels_NSS3 = np.stack([decode_image(content, task.preprocessing).pixels_SS3 for content in candidates])
    network = build_network(workload.network, NUM_CLASSES, seed=0)
    set_statistics(network, task, pixels_NSS3)
    fp32 = to_onnx(network, task)
    models: dict[Precision, bytes] = {"fp32": fp32, "int8": collect_ranges(fp32, pixels_NSS3).to_onnx_bytes(INT8)}
    logits = {precision: logits_of(model, pixels_NSS3) for precision, model in models.items()}
    # the peers decode in full, so an image must have the same class both ways
    whole = Preprocessing(input_px=workload.input_px, jpeg_scaling="none")
    whole_NSS3 = np.stack([decode_image(content, whole).pixels_SS3 for content in candidates])
    clearest_images = sort_by_margin([*logits.values(), logits_of(fp32, whole_NSS3)])[: workload.num_images]
    (folder / "images").mkdir(parents=True)
    for number in clearest_images:
        suffix = "jpg" if workload.media_type == "image/jpeg" else "png"
        (folder / "images" / f"{number:03}.{suffix}").write_bytes(candidates[number])
    golden = Golden(
        pixels_NSS3[clearest_images[:NUM_GOLDEN]],
        logits["fp32"][clearest_images[:NUM_GOLDEN]].argmax(axis=1),
        {precision: found[clearest_images[:NUM_GOLDEN]] for precision, found in logits.items()},
    )
    write_bundle(
        folder / "same",
        task,
        {"fp32": fp32},
        Golden(golden.images_MSS3, golden.labels_M, {"fp32": golden.logits["fp32"]}),
    )
    write_bundle(folder / "default", task, models, golden)


def encode_image(number: int, workload: Workload) -> bytes:
    """Encode one image as a file."""
    random = np.random.default_rng((2, number))
    image, (width, height) = Image.fromarray(photo_like_noise(random)), workload.image_px
    if width == height:
        side = min(image.size)
        image = image.resize(workload.image_px, Image.Resampling.BOX, box=(0, 0, side, side))
    elif width > image.width:  # the noise of a sensor, so that the file has the usual size
        enlarged = np.asarray(image.resize(workload.image_px, Image.Resampling.BICUBIC))
        grain = random.normal(0, GRAIN, (height, width, 1)).astype(np.float32)
        image = Image.fromarray(np.clip(enlarged + grain, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    if workload.media_type == "image/jpeg":
        image.save(file, "JPEG", quality=85)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def task_of(workload: Workload) -> Task:
    """A long-tailed task with a hundred classes."""
    counts = long_tailed_counts([500] * NUM_CLASSES, 100)
    return Task(
        class_names=tuple(f"class {number}" for number in range(NUM_CLASSES)),
        train_counts=tuple(counts),
        groups=groups_by_share(counts),
        input_px=workload.input_px,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resizing=Resizing(),
    )


def set_statistics(network: nn.Module, task: Task, pixels_NSS3: NDArray[np.uint8]) -> None:
    """Set the batch statistics of a network, and scale its classifier so that it separates the images."""
    classifier = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        image_N3SS = Normalise(task)(torch.from_numpy(pixels_NSS3))
        network.train()(image_N3SS)
        logits_NC = network.eval()(image_N3SS)
        scale = LOGIT_STD / logits_NC.std()
        classifier.weight *= scale
        classifier.bias.copy_((classifier.bias - logits_NC.mean(dim=0)) * scale)


def logits_of(model: bytes, pixels_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits [N, C] of the images, computed one by one."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"image": image_SS3[None]})[0] for image_SS3 in pixels_NSS3])


def sort_by_margin(logits: Sequence[NDArray[np.float32]]) -> list[int]:
    """The images on which all models agree, sorted by their smallest margin between the first and the second class."""
    margins = np.full(len(logits[0]), np.inf)
    for logits_NC in logits:
        second, first = np.sort(logits_NC, axis=1)[:, -2:].T
        margins = np.minimum(margins, first - second)
    all_agree = np.all([found.argmax(axis=1) == logits[0].argmax(axis=1) for found in logits], axis=0)
    return [number for number in np.argsort(-margins, kind="stable").tolist() if all_agree[number]]


def write_bundle(path: Path, task: Task, models: dict[Precision, bytes], golden: Golden) -> None:
    """Write a bundle that was not certified."""
    with staged_bundle(path) as stage:
        for precision, model in models.items():
            (stage / MODEL_FILES[precision]).write_bytes(model)
        (stage / GOLDEN_FILE).write_bytes(golden.to_bytes())
        for file in (PARITY_FILE, REPORT_FILE, CARD_FILE):
            (stage / file).write_text("{}")
        certified: dict[Precision, CertifiedModel] = {
            precision: CertifiedModel(
                **file_record(stage / MODEL_FILES[precision]).model_dump(),
                provider="CPUExecutionProvider",
                calibration=invented_calibration(task),
            )
            for precision in models
        }
        manifest = Manifest(
            name=path.parent.name.replace(" ", "-"),
            task=task,
            precisions=certified,
            parity=file_record(stage / PARITY_FILE),
            report=file_record(stage / REPORT_FILE),
            card=file_record(stage / CARD_FILE),
            golden=file_record(stage / GOLDEN_FILE),
            certified_on=NOT_CERTIFIED,
            source=Provenance(
                run="none",
                config_sha256="0" * 64,
                weights_sha256="0" * 64,
                model=path.parent.name,
                method="none",
                versions={},
            ),
        )
        write_record(stage / MANIFEST_FILE, manifest)


def invented_calibration(task: Task) -> Calibration:
    """Invented values in the usual format: a response costs the same with them as with real ones."""
    share = Proportion(value=0.75, low=0.65, high=0.85, n=40)
    bins = tuple(ConfidenceBin(above=tenth / 10, up_to=(tenth + 1) / 10, accuracy=share) for tenth in range(10))
    return tuple(
        GroupCalibration(
            group=group,
            temperature=1.0,
            expected_accuracy=bins,
            abstention=Abstention(target_precision=0.7, threshold=0.4, coverage=0.8, precision=share),
            prediction_set=SetThreshold(
                target_coverage=0.9, least_probability=0.05, num_images=40, low=0.8, high=0.97, coverage=share
            ),
            predicted_share=1 / len(task.groups.names),
            confidence_counts=(0, 0, 1, 2, 3, 4, 5, 4, 3, 2),
        )
        for group in task.groups.names
    )


def main() -> None:
    """Make the workloads."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workloads", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(WORKLOADS)}; all by default")
    arguments = parser.parse_args()
    for name in arguments.names or WORKLOADS:
        make_workload(WORKLOADS[name], arguments.folder / name)


if __name__ == "__main__":
    main()
