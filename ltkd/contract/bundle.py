"""The bundle: a directory with a certified model and everything needed to serve and verify it.

    model.onnx      the network; input ``image`` uint8 [N, S, S, 3], output ``logits`` float32 [N, C]
    model.fp16.onnx, model.int8.onnx   the same network in the other precisions that passed certification
    manifest.json   this module's Manifest
    parity.json     the results of certification; parity.html is the same report as a page
    golden.npz      images of every group with the expected logits in each precision
    README.md       the model card

``export`` writes bundles, and ``serve`` and ``ltkd verify`` read them with this module. A bundle is written to a
temporary directory, which is then renamed, and it is never edited afterwards. Bundles are untrusted input: file sizes
are limited, symbolic links that leave the bundle are rejected, and nothing in a bundle is executed or unpickled.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ltkd.contract.calibration import Calibration
from ltkd.contract.records import Record, VersionedRecord, read_record, sha256_of
from ltkd.contract.staging import restore, staged
from ltkd.contract.task import Task
from ltkd.errors import BundleError

Precision = Literal["fp32", "fp16", "int8"]
MODEL_FILES: dict[Precision, str] = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
MANIFEST_FILE, PARITY_FILE, GOLDEN_FILE = "manifest.json", "parity.json", "golden.npz"
REPORT_FILE, CARD_FILE = "parity.html", "README.md"
MAX_FILE_BYTES = 2**31
"""The largest file that a bundle may contain. It is the limit of protobuf, and therefore of ONNX."""
MAX_GOLDEN_BYTES = 2**28
_MAX_ATTEMPTS = 10


class FileRecord(Record):
    """The name, hash and size of one file in the bundle."""

    path: str
    sha256: str
    num_bytes: int = Field(ge=0, le=MAX_FILE_BYTES)

    @field_validator("path")
    @classmethod
    def _is_a_plain_name(cls, path: str) -> str:
        if Path(path).name != path or path in ("", "..") or "\\" in path or "\0" in path:
            raise ValueError(f"a file of a bundle must be a plain file name without folders, got {path!r}")
        return path


class CertifiedModel(FileRecord):
    """A model that passed every gate.

    Attributes:
        provider: The ONNX Runtime execution provider on which the model passed.
        calibration: The calibration of each group, in the order of the task's groups.
    """

    provider: str
    calibration: Calibration


class Provenance(Record):
    """The run from which a bundle was exported.

    Attributes:
        run: Name of the run folder.
        config_sha256: SHA-256 of the run's config.json.
        weights_sha256: SHA-256 of the run's weights.
        model: Name of the network.
        method: Name of the training method.
        versions: Package name to version, for the packages that converted and certified the model.
    """

    run: str
    config_sha256: str
    weights_sha256: str
    model: str
    method: str
    versions: dict[str, str]


GOLDEN_TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "int8": 1e-1}
"""How much golden logits may differ on other hardware, as a fraction of the largest absolute logit (at least 1).

Other kernels and another order of summation change float32 logits by about 1e-5 in networks of a hundred layers. A
wrong weight file, input order or preprocessing changes them by 1e-1 or more.
"""


class Manifest(VersionedRecord):
    """The content of manifest.json.

    Attributes:
        name: Name of the model, from the bundle's directory.
        task: Classes, groups and preprocessing.
        precisions: The certified models; ``fp32`` is always present.
        parity: The certification report, parity.json.
        report: The same report as a page, parity.html.
        card: The model card.
        golden: Images with their expected logits.
        certified_on: A description of the images on which the model was certified.
        source: The run from which the bundle was exported.
    """

    schema_version: int = 3
    name: str
    task: Task
    precisions: dict[Precision, CertifiedModel]
    parity: FileRecord
    report: FileRecord
    card: FileRecord
    golden: FileRecord
    certified_on: str
    source: Provenance

    @field_validator("precisions")
    @classmethod
    def _fp32_is_there(cls, precisions: dict[Precision, CertifiedModel]) -> dict[Precision, CertifiedModel]:
        if "fp32" not in precisions:
            raise ValueError(f"a bundle must have an fp32 model, got {list(precisions)}")
        return precisions

    @property
    def files(self) -> list[FileRecord]:
        """Every file that the manifest lists."""
        return [*self.precisions.values(), self.parity, self.report, self.card, self.golden]


@dataclass(frozen=True)
class Golden:
    """Sample images of every group with the logits of each certified model.

    Attributes:
        images_MSS3: uint8 [M, S, S, 3].
        labels_M: int64 [M].
        logits: float32 [M, C] for each precision.
    """

    images_MSS3: NDArray[np.uint8]
    labels_M: NDArray[np.int64]
    logits: dict[Precision, NDArray[np.float32]]

    def to_bytes(self) -> bytes:
        """The content of golden.npz. Equal samples give equal bytes."""
        arrays: dict[str, NDArray[np.generic]] = {"images": self.images_MSS3, "labels": self.labels_M}
        arrays |= {f"logits_{precision}": logits_MC for precision, logits_MC in self.logits.items()}
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:  # a fixed date
                    np.lib.format.write_array(member, array, allow_pickle=False)
        return file.getvalue()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files match the manifest."""

    path: Path
    manifest: Manifest

    def model_path(self, precision: Precision) -> Path:
        """The path of the ONNX file of one certified precision.

        Raises:
            BundleError: The bundle has no model of that precision.
        """
        return self.path / self._certified(precision).path

    def _certified(self, precision: Precision) -> CertifiedModel:
        if precision not in self.manifest.precisions:
            certified = ", ".join(self.manifest.precisions)
            raise BundleError(f"{self.path} has no certified {precision} model; choose one of: {certified}.")
        return self.manifest.precisions[precision]

    def read(self, record: FileRecord) -> bytes:
        """Read one file and compare it with its record again, because a bundle can be replaced while it is in use.

        Raises:
            BundleError: The bytes do not match the record.
        """
        path = self.path / record.path
        check_inside_bundle(path)
        with path.open("rb") as file:
            content = file.read(record.num_bytes + 1)
        if (len(content), hashlib.sha256(content).hexdigest()) != (record.num_bytes, record.sha256):
            raise BundleError(f"{path} was changed or replaced after the bundle was opened; open the bundle again.")
        return content

    def model(self, precision: Precision) -> bytes:
        """The bytes of the ONNX file of one certified precision.

        Raises:
            BundleError: The bundle has no model of that precision, or its file has changed.
        """
        return self.read(self._certified(precision))

    def unlisted_files(self) -> list[str]:
        """Sorted names of files in the bundle's folder that the manifest does not list. They are never read."""
        listed = {MANIFEST_FILE, *(record.path for record in self.manifest.files)}
        return sorted(path.name for path in self.path.iterdir() if path.name not in listed)

    def golden(self) -> Golden:
        """The golden samples.

        Raises:
            BundleError: The file is damaged, or its samples do not match the bundle's task.
        """
        path, task = self.path / self.manifest.golden.path, self.manifest.task
        content = self.read(self.manifest.golden)
        try:
            _check_unpacked(content)
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                logits = {precision: arrays[f"logits_{precision}"] for precision in self.manifest.precisions}
                golden = Golden(arrays["images"], arrays["labels"], logits)
        except Exception as reason:  # NumPy raises many types of exception for damaged bytes
            raise BundleError(f"{path} has no readable golden samples ({_first_line(reason)}); export again.") from None
        actual = [(str(array.dtype), array.shape) for array in (golden.images_MSS3, golden.labels_M, *logits.values())]
        num = len(golden.labels_M) if golden.labels_M.ndim else 0
        expected_logits = [("float32", (num, len(task.class_names)))] * len(logits)
        expected = [("uint8", (num, task.input_px, task.input_px, 3)), ("int64", (num,)), *expected_logits]
        if not num or actual != expected:
            shapes = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in actual)
            raise BundleError(
                f"{path} has golden samples that are empty or do not match the bundle's task: {shapes}; export again."
            )
        return golden


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check the size and SHA-256 of every file before anything is loaded.

    If the bundle is replaced during the check, the new bundle is opened.

    Raises:
        BundleError: A file is missing, was changed after export, or has a newer schema.
    """
    for _ in range(_MAX_ATTEMPTS):
        restore(path)
        before = _identity(path)
        try:
            return _open_once(path)
        except BundleError:
            if before == _identity(path):
                raise
    raise BundleError(f"{path} was replaced during each of {_MAX_ATTEMPTS} reads; wait for running exports to finish.")


def _open_once(path: Path) -> Bundle:
    if not path.is_dir():
        raise BundleError(
            f"{path} is not a bundle: there is no such directory. Create one with: ltkd export RUN --out {path}"
        )
    check_inside_bundle(path / MANIFEST_FILE)
    manifest = read_record(path / MANIFEST_FILE, Manifest, BundleError)
    for record in manifest.files:
        check_file(path / record.path, record)
    return Bundle(path, manifest)


def _identity(path: Path) -> tuple[int, int] | None:
    """The device and inode numbers of the directory at a path; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def check_inside_bundle(path: Path) -> None:
    """Reject symbolic links that leave the bundle, and anything else than a regular file.

    Reading a named pipe would block.

    Raises:
        BundleError: The path is a link to a file outside the bundle, a folder, a pipe or a device.
    """
    if path.exists() and not path.is_file():
        raise BundleError(f"{path} is not a regular file; export again.")
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise BundleError(f"{path} is a symbolic link to a file outside the bundle; copy the bundle with cp -rL.")


def check_file(path: Path, record: FileRecord) -> None:
    """Compare a file with its record.

    Raises:
        BundleError: The file is missing or its bytes do not match the record.
    """
    check_inside_bundle(path)
    if not path.is_file():
        raise BundleError(f"{path} is missing though the manifest lists it; export again.")
    num_bytes = path.stat().st_size
    if num_bytes != record.num_bytes or (sha256 := sha256_of(path)) != record.sha256:
        difference = "another size" if num_bytes != record.num_bytes else f"sha256 {sha256[:12]}..."
        raise BundleError(
            f"{path} was changed after export: the manifest expects sha256 {record.sha256[:12]}... "
            f"({record.num_bytes} bytes), but the file has {difference} ({num_bytes} bytes). "
            "Export again; a bundle is never edited by hand."
        )


def file_record(path: Path) -> FileRecord:
    """Compute the record of a file from its current content."""
    return FileRecord(path=path.name, sha256=sha256_of(path), num_bytes=path.stat().st_size)


def check_replaceable(out: Path) -> None:
    """Check that an export may replace what exists at a path.

    Raises:
        BundleError: ``out`` exists and is not a bundle, so it must not be replaced.
    """
    if out.exists() and not _is_manifest(out / MANIFEST_FILE):
        raise BundleError(f"{out} exists and is not a bundle, so it is not replaced; give another --out.")


@contextmanager
def staged_bundle(out: Path) -> Iterator[Path]:
    """A new directory beside ``out`` that is renamed to ``out`` when the block ends without an error.

    Raises:
        BundleError: ``out`` exists and is not a bundle, so it must not be replaced.
    """
    with staged(out, check_replaceable) as stage:
        yield stage


def _is_manifest(path: Path) -> bool:
    """Whether a manifest.json belongs to a bundle of any schema version; web pages use the same file name."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {"schema_version", "precisions", "golden"}


def _check_unpacked(content: bytes) -> None:
    """Reject an archive that unpacks to more memory than golden samples need."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        num_bytes = sum(member.file_size for member in archive.infolist())
    if num_bytes > MAX_GOLDEN_BYTES:
        raise ValueError(f"it unpacks to {num_bytes:,} bytes, but the limit is {MAX_GOLDEN_BYTES:,}")


def _first_line(reason: Exception) -> str:
    return (str(reason) or type(reason).__name__).splitlines()[0]
