"""The bundle: a directory that holds a certified model and all that is needed to serve and trust it.

    model.onnx      the network; input ``image`` uint8 [N, S, S, 3], output ``logits`` float32 [N, C]
    model.fp16.onnx, model.int8.onnx   the same in other precisions, where they passed
    manifest.json   this module's Manifest
    parity.json     what was proved before the bundle was written; parity.html shows it
    golden.npz      images of every group with the logits expected of them in each precision
    README.md       the model card

A bundle is written beside its place and takes it as a whole, and is never edited afterwards. It may come from anywhere:
it is read with limits on sizes, its files are its own and no links out of it, and nothing in it is run or unpickled.
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
"""The largest file that a bundle may hold: protobuf, and with it ONNX, ends there."""
MAX_GOLDEN_BYTES = 2**28
_ATTEMPTS = 10


class FileRecord(Record):
    """A file of the bundle and what its bytes must be."""

    path: str
    sha256: str
    num_bytes: int = Field(ge=0, le=MAX_FILE_BYTES)

    @field_validator("path")
    @classmethod
    def _is_a_plain_name(cls, path: str) -> str:
        if Path(path).name != path or path in ("", "..") or "\\" in path or "\0" in path:
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


class Provenance(Record):
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
    source: Provenance

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
        arrays: dict[str, NDArray[np.generic]] = {"images": self.images_MSS3, "labels": self.labels_M}
        arrays |= {f"logits_{precision}": logits_MC for precision, logits_MC in self.logits.items()}
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:  # of no date
                    np.lib.format.write_array(member, array, allow_pickle=False)
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
        return self.path / self._certified(precision).path

    def _certified(self, precision: Precision) -> CertifiedModel:
        if precision not in self.manifest.precisions:
            has = ", ".join(self.manifest.precisions)
            raise BundleError(f"{self.path} has no certified {precision} model, it has: {has}.")
        return self.manifest.precisions[precision]

    def read(self, record: FileRecord) -> bytes:
        """The bytes of one file, held against its record once more: a bundle may be replaced while it is in use.

        Raises:
            BundleError: They are not the recorded ones.
        """
        path = self.path / record.path
        check_is_own(path)
        with path.open("rb") as file:
            content = file.read(record.num_bytes + 1)
        if (len(content), hashlib.sha256(content).hexdigest()) != (record.num_bytes, record.sha256):
            raise BundleError(f"{path} was changed or replaced since the bundle was opened; open it again.")
        return content

    def model(self, precision: Precision) -> bytes:
        """The ONNX file of one certified precision.

        Raises:
            BundleError: The bundle has no model of that precision, or not any more.
        """
        return self.read(self._certified(precision))

    def unlisted_files(self) -> list[str]:
        """Names in the bundle's folder that its manifest does not vouch for, sorted; nothing reads them."""
        known = {MANIFEST_FILE, *(record.path for record in self.manifest.files)}
        return sorted(path.name for path in self.path.iterdir() if path.name not in known)

    def golden(self) -> Golden:
        """The golden samples.

        Raises:
            BundleError: The file does not hold samples of this bundle's task.
        """
        path, task = self.path / self.manifest.golden.path, self.manifest.task
        content = self.read(self.manifest.golden)
        try:
            _check_unpacked(content)
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                logits = {precision: arrays[f"logits_{precision}"] for precision in self.manifest.precisions}
                golden = Golden(arrays["images"], arrays["labels"], logits)
        except Exception as reason:  # whatever NumPy throws at damaged bytes means just this
            raise BundleError(f"{path} holds no golden samples ({_first_line(reason)}); export again.") from None
        seen = [(str(array.dtype), array.shape) for array in (golden.images_MSS3, golden.labels_M, *logits.values())]
        num = len(golden.labels_M) if golden.labels_M.ndim else 0
        logits_seen = [("float32", (num, len(task.class_names)))] * len(logits)
        if not num or seen != [("uint8", (num, task.input_px, task.input_px, 3)), ("int64", (num,)), *logits_seen]:
            shapes = [f"{dtype} {list(shape)}" for dtype, shape in seen]
            raise BundleError(f"{path} holds golden samples of other shapes than its task has {shapes}; export again.")
        return golden


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check size and SHA-256 of every file before anything is loaded.

    Where a new bundle takes the place of the old one meanwhile, the new one is opened.

    Raises:
        BundleError: Something is missing, was changed after export, or is of a newer schema.
    """
    for _ in range(_ATTEMPTS):
        restore(path)
        before = _identity(path)
        try:
            return _opened(path)
        except BundleError:
            if before == _identity(path):
                raise
    raise BundleError(f"{path} is replaced again and again while it is read; wait for the exports to end.")


def _opened(path: Path) -> Bundle:
    if not path.is_dir():
        raise BundleError(f"{path} is no bundle: no such directory. Make one with: ltkd export RUN --out {path}")
    check_is_own(path / MANIFEST_FILE)
    manifest = read_record(path / MANIFEST_FILE, Manifest, BundleError)
    for record in manifest.files:
        check_file(path / record.path, record)
    return Bundle(path, manifest)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which directory lies at a path."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_dev, seen.st_ino


def check_is_own(path: Path) -> None:
    """Refuse what leads out of the bundle, and what is no file, such as a pipe that would be waited for.

    Raises:
        BundleError: The path is a link that ends elsewhere, a folder or a device.
    """
    if path.exists() and not path.is_file():
        raise BundleError(f"{path} is no file; export again.")
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise BundleError(f"{path} is a link that leads out of the bundle; copy the bundle with cp -rL.")


def check_file(path: Path, record: FileRecord) -> None:
    """Hold a file against its record.

    Raises:
        BundleError: The file is missing or its bytes are not the recorded ones.
    """
    check_is_own(path)
    if not path.is_file():
        raise BundleError(f"{path} is missing though the manifest lists it; export again.")
    seen_bytes = path.stat().st_size
    if seen_bytes != record.num_bytes or (seen_sha256 := sha256_of(path)) != record.sha256:
        seen = "another size" if seen_bytes != record.num_bytes else f"{seen_sha256[:12]}..."
        raise BundleError(
            f"{path} was changed after export: the manifest expects sha256 {record.sha256[:12]}... "
            f"({record.num_bytes} bytes), the file has {seen} ({seen_bytes} bytes). "
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
    with staged(out, check_replaceable) as stage:
        yield stage


def _is_manifest(path: Path) -> bool:
    """Whether a manifest.json is a bundle's, of any schema, and not the one of a web page."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {"schema_version", "precisions", "golden"}


def _check_unpacked(content: bytes) -> None:
    """Refuse an archive that unpacks to more memory than golden samples need."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        num_bytes = sum(member.file_size for member in archive.infolist())
    if num_bytes > MAX_GOLDEN_BYTES:
        raise ValueError(f"it unpacks to {num_bytes:,} bytes, at most {MAX_GOLDEN_BYTES:,} are read")


def _first_line(reason: Exception) -> str:
    return (str(reason) or type(reason).__name__).splitlines()[0]
