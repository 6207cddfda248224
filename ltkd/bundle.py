"""The bundle: a directory that holds a certified model and all that is needed to serve and trust it.

    model.onnx      the network; input ``image`` uint8 [N, S, S, 3], output ``logits`` float32 [N, C]
    model.fp16.onnx, model.int8.onnx   the same in other precisions, where they passed
    manifest.json   this module's Manifest
    parity.json     what was proved before the bundle was written; parity.html shows it
    golden.npz      images of every group with the logits expected of them in each precision
    README.md       the model card

A bundle is written beside its place and renamed, so it is whole or absent, and never edited afterwards.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ltkd.calibration import Calibration
from ltkd.errors import BundleError
from ltkd.records import Record, VersionedRecord, read_record, sha256_of
from ltkd.task import Task

Precision = Literal["fp32", "fp16", "int8"]
MODEL_FILES: dict[Precision, str] = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
MANIFEST_FILE, PARITY_FILE, GOLDEN_FILE = "manifest.json", "parity.json", "golden.npz"
REPORT_FILE, CARD_FILE = "parity.html", "README.md"


class FileRecord(Record):
    """A file of the bundle and what its bytes must be."""

    path: str
    sha256: str
    num_bytes: int = Field(ge=0)

    @field_validator("path")
    @classmethod
    def _is_a_plain_name(cls, path: str) -> str:
        if Path(path).name != path:
            raise ValueError(f"a bundle's files lie directly in it, got {path!r}")
        return path


class CertifiedModel(FileRecord):
    """A model that passed every gate.

    Attributes:
        provider: The execution provider of ONNX Runtime on which it passed.
        calibration: What its confidence means in each group, in the order of the task's groups.
    """

    provider: str
    calibration: Calibration


class Source(Record):
    """Where a bundle comes from.

    Attributes:
        run: Name of the run folder.
        config_sha256: SHA-256 of the run's config.json.
        weights_sha256: SHA-256 of the run's weights.
        model: Name of the network.
        method: Name of the training method.
        versions: Package name to version, of what converted and certified the model.
    """

    run: str
    config_sha256: str
    weights_sha256: str
    model: str
    method: str
    versions: dict[str, str]


GOLDEN_TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "int8": 1e-1}
"""How far golden logits may move on other hardware, as a share of the largest.

Other kernels and another order of sums move float32 logits by some 1e-5 in networks of a hundred layers; a wrong weight
file, input order or preprocessing moves them by 1e-1 and more.
"""


class Manifest(VersionedRecord):
    """What a bundle says of itself.

    Attributes:
        name: Name of the model, from the bundle's directory.
        task: Classes, groups and preprocessing.
        precisions: The certified models; ``fp32`` is always there.
        parity: The report of the gates that were passed.
        report: The same for people.
        card: The model card.
        golden: Images with the logits expected of them.
        certified_on: Which images the gates were run on, in words.
        source: The run behind the bundle.
    """

    schema_version: int = 2
    name: str
    task: Task
    precisions: dict[Precision, CertifiedModel]
    parity: FileRecord
    report: FileRecord
    card: FileRecord
    golden: FileRecord
    certified_on: str
    source: Source

    @field_validator("precisions")
    @classmethod
    def _fp32_is_there(cls, precisions: dict[Precision, CertifiedModel]) -> dict[Precision, CertifiedModel]:
        if "fp32" not in precisions:
            raise ValueError(f"a bundle has an fp32 model, got {list(precisions)}")
        return precisions

    @property
    def files(self) -> list[FileRecord]:
        """Every file that the manifest vouches for."""
        return [*self.precisions.values(), self.parity, self.report, self.card, self.golden]


@dataclass(frozen=True)
class Golden:
    """Samples of every group with the logits that each certified model gave them.

    Attributes:
        images_MSS3: uint8 [M, S, S, 3].
        labels_M: int64 [M].
        logits: Of each precision float32 [M, C].
    """

    images_MSS3: NDArray[np.uint8]
    labels_M: NDArray[np.int64]
    logits: dict[Precision, NDArray[np.float32]]

    def to_bytes(self) -> bytes:
        """The content of golden.npz; equal samples give equal bytes."""
        file = io.BytesIO()
        logits = {f"logits_{precision}": logits_MC for precision, logits_MC in self.logits.items()}
        np.savez(file, images=self.images_MSS3, labels=self.labels_M, **logits)
        return file.getvalue()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files were found to be what the manifest says."""

    path: Path
    manifest: Manifest

    def model_path(self, precision: Precision) -> Path:
        """The ONNX file of one certified precision.

        Raises:
            BundleError: The bundle has no model of that precision.
        """
        if precision not in self.manifest.precisions:
            has = ", ".join(self.manifest.precisions)
            raise BundleError(f"{self.path} has no certified {precision} model, it has: {has}.")
        return self.path / self.manifest.precisions[precision].path

    def golden(self) -> Golden:
        """The golden samples.

        Raises:
            BundleError: The file does not hold samples of this bundle's task.
        """
        path, task = self.path / self.manifest.golden.path, self.manifest.task
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                logits = {precision: arrays[f"logits_{precision}"] for precision in self.manifest.precisions}
                golden = Golden(arrays["images"], arrays["labels"], logits)
        except Exception as reason:  # whatever NumPy throws at damaged bytes means just this
            raise BundleError(f"{path} holds no golden samples ({_first_line(reason)}); export again.") from None
        shapes = [array.shape for array in (golden.images_MSS3, golden.labels_M, *golden.logits.values())]
        num = len(golden.labels_M) if golden.labels_M.ndim else 0
        logits_shapes = [(num, len(task.class_names))] * len(golden.logits)
        if not num or shapes != [(num, task.input_px, task.input_px, 3), (num,), *logits_shapes]:
            raise BundleError(f"{path} holds golden samples of other shapes than its task has {shapes}; export again.")
        return golden


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check size and SHA-256 of every file before anything is loaded.

    Raises:
        BundleError: Something is missing, was changed after export, or is of a newer schema.
    """
    if not path.is_dir():
        raise BundleError(f"{path} is no bundle: no such directory. Make one with: ltkd export RUN --out {path}")
    manifest = read_record(path / MANIFEST_FILE, Manifest, BundleError)
    for record in manifest.files:
        check_file(path / record.path, record)
    return Bundle(path, manifest)


def check_file(path: Path, record: FileRecord) -> None:
    """Hold a file against its record.

    Raises:
        BundleError: The file is missing or its bytes are not the recorded ones.
    """
    if not path.is_file():
        raise BundleError(f"{path} is missing though the manifest lists it; export again.")
    seen_bytes, seen_sha256 = path.stat().st_size, sha256_of(path)
    if (seen_bytes, seen_sha256) != (record.num_bytes, record.sha256):
        raise BundleError(
            f"{path} was changed after export: the manifest expects sha256 {record.sha256[:12]}... "
            f"({record.num_bytes} bytes), the file has {seen_sha256[:12]}... ({seen_bytes} bytes). "
            "Export again; a bundle is never edited by hand."
        )


def record_of(path: Path) -> FileRecord:
    """The record that vouches for a file as it is now."""
    return FileRecord(path=path.name, sha256=sha256_of(path), num_bytes=path.stat().st_size)


def check_replaceable(out: Path) -> None:
    """Refuse a place that holds something else than a bundle.

    Raises:
        BundleError: ``out`` exists and is not a bundle, so it must not be replaced.
    """
    if out.exists() and not _is_manifest(out / MANIFEST_FILE):
        raise BundleError(f"{out} exists and is not a bundle, so it is not replaced; give another --out.")


@contextmanager
def staged_bundle(out: Path) -> Iterator[Path]:
    """A fresh directory beside ``out`` that becomes ``out`` when the block ends without an error.

    Raises:
        BundleError: ``out`` exists and is not a bundle, so it must not be replaced.
    """
    check_replaceable(out)
    out = out.resolve()  # a link keeps pointing at its bundle, and "." has a name
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.with_name(f".{out.name}.{os.getpid()}.part")
    retired = out.with_name(f".{out.name}.{os.getpid()}.old")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        if out.exists():
            out.rename(retired)
        stage.rename(out)
    finally:
        if retired.exists() and not out.exists():  # stopped between the two renames
            retired.rename(out)
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def _is_manifest(path: Path) -> bool:
    """Whether a manifest.json is a bundle's, of any schema, and not the one of a web page."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {"schema_version", "precisions", "golden"}


def _first_line(reason: Exception) -> str:
    return (str(reason) or type(reason).__name__).splitlines()[0]
