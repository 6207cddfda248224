import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ltkd.contract import bundle as bundle_module
from ltkd.contract.bundle import (
    CertifiedModel,
    FileRecord,
    Golden,
    Manifest,
    Provenance,
    check_file,
    check_replaceable,
    file_record,
    open_bundle,
    staged_bundle,
)
from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.records import write_record
from ltkd.contract.task import Task
from ltkd.errors import BundleError

TASK = Task(
    class_names=("ant", "bee"),
    train_counts=(9, 1),
    groups=ClassGroups(names=("head", "tail"), group_of_class=(0, 1)),
    input_px=4,
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
)
GOLDEN = Golden(
    np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3),
    np.array([0, 1, 1]),
    {"fp32": np.ones((3, 2), np.float32)},
)


def write_bundle(out: Path, model: bytes = b"model", golden: bytes | None = None) -> Path:
    """Write a complete bundle whose model file is not a real model."""
    with staged_bundle(out) as stage:
        (stage / "model.onnx").write_bytes(model)
        for name in ("parity.json", "parity.html", "README.md"):
            (stage / name).write_text("{}")
        (stage / "golden.npz").write_bytes(GOLDEN.to_bytes() if golden is None else golden)
        manifest = Manifest(
            name="toy",
            task=TASK,
            precisions={"fp32": certified(file_record(stage / "model.onnx"))},
            parity=file_record(stage / "parity.json"),
            report=file_record(stage / "parity.html"),
            card=file_record(stage / "README.md"),
            golden=file_record(stage / "golden.npz"),
            certified_on="three images",
            source=Provenance(run="r", config_sha256="0", weights_sha256="0", model="m", method="ce", versions={}),
        )
        write_record(stage / "manifest.json", manifest)
    return out


def certified(model: FileRecord) -> CertifiedModel:
    return CertifiedModel(**model.model_dump(), provider="CPUExecutionProvider", calibration=())


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit_manifest(bundle: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    change(content)
    (bundle / "manifest.json").write_text(json.dumps(content))


def test_a_bundle_is_read_as_it_was_written(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "new" / "toy"))
    assert bundle.manifest.task == TASK
    assert bundle.model_path("fp32").read_bytes() == b"model"
    golden = bundle.golden()
    for actual, expected in (
        (golden.images_MSS3, GOLDEN.images_MSS3),
        (golden.labels_M, GOLDEN.labels_M),
        (golden.logits["fp32"], GOLDEN.logits["fp32"]),
    ):
        assert actual.dtype == expected.dtype
        assert np.array_equal(actual, expected)
    assert names_in(tmp_path / "new") == ["toy"]


def test_opening_a_precision_that_was_not_certified_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no certified int8 model; choose one of: fp32"):
        open_bundle(write_bundle(tmp_path / "toy")).model_path("int8")


def test_the_error_for_a_path_without_a_bundle_explains_how_to_create_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no such directory\. Create one with: ltkd export RUN --out"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"manifest\.json does not exist"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "parity.json", "parity.html", "README.md", "golden.npz"])
def test_a_changed_or_missing_file_is_an_error(tmp_path: Path, name: str) -> None:
    file = write_bundle(tmp_path / "toy") / name
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} was changed after export: .*Export again"):
        open_bundle(tmp_path / "toy")
    file.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing though the manifest lists it"):
        open_bundle(tmp_path / "toy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(schema_version=99), "schema version 99.*install a newer ltkd"),
        (lambda content: content["golden"].update(path="../golden.npz"), "golden.path.*must be a plain file name"),
        (lambda content: content["golden"].update(path="/etc/passwd"), "golden.path.*must be a plain file name"),
        (lambda content: content["golden"].update(path=".."), "golden.path.*must be a plain file name"),
        (lambda content: content["golden"].update(path=""), "golden.path.*must be a plain file name"),
        (lambda content: content["golden"].update(num_bytes=10**15), "golden.num_bytes"),
        (lambda content: content["precisions"].clear(), "precisions.*a bundle must have an fp32 model"),
        (lambda content: content["precisions"].update(fp8=content["golden"]), "precisions.fp8"),
        (lambda content: content.update(notes="mine"), "notes: Extra inputs"),
    ],
)
def test_an_invalid_manifest_is_rejected(
    tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    edit_manifest(write_bundle(tmp_path / "toy"), change)
    with pytest.raises(BundleError, match=message) as error:
        open_bundle(tmp_path / "toy")
    assert "\n" not in str(error.value)


def arrays(**contents: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **contents)
    return file.getvalue()


def single_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    ("golden", "message"),
    [
        (b"", "no readable golden samples"),
        (b"no archive", "no readable golden samples"),
        (GOLDEN.to_bytes()[:300], "no readable golden samples"),
        (single_array(), "no readable golden samples"),
        (arrays(images=GOLDEN.images_MSS3), "no readable golden samples .*logits_fp32"),
        (
            arrays(images=np.array([{}]), labels=GOLDEN.labels_M, logits_fp32=GOLDEN.logits["fp32"]),
            "no readable golden samples .*Object",
        ),
        (Golden(GOLDEN.images_MSS3, GOLDEN.labels_M, {"fp32": np.ones((3, 5), np.float32)}).to_bytes(), "do not match"),
        (
            Golden(GOLDEN.images_MSS3[:0], GOLDEN.labels_M[:0], {"fp32": np.ones((0, 2), np.float32)}).to_bytes(),
            "do not match",
        ),
    ],
)
def test_damaged_or_mismatched_golden_samples_are_rejected(tmp_path: Path, golden: bytes, message: str) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "toy", golden=golden))
    with pytest.raises(BundleError, match=f"golden.npz has .*{message}.*export again") as error:
        bundle.golden()
    assert "\n" not in str(error.value)


def test_equal_golden_samples_give_equal_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    first = GOLDEN.to_bytes()
    monkeypatch.setattr(time, "time", lambda: 2e9)  # an archive with a timestamp would differ
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(2e9))
    assert GOLDEN.to_bytes() == first


def test_a_new_bundle_replaces_every_file_of_the_old_one(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "toy")
    (out / "model.fp16.onnx").write_bytes(b"of the old bundle")
    write_bundle(out, model=b"newer")
    assert open_bundle(out).model_path("fp32").read_bytes() == b"newer"
    assert "model.fp16.onnx" not in names_in(out)
    assert names_in(tmp_path) == ["toy"]


def test_an_error_while_writing_keeps_the_old_bundle_and_leaves_no_other_files(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "toy")
    with pytest.raises(KeyboardInterrupt), staged_bundle(out) as stage:
        (stage / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt
    assert open_bundle(out).model_path("fp32").read_bytes() == b"model"
    assert names_in(tmp_path) == ["toy"]


def test_an_error_while_writing_the_first_bundle_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), staged_bundle(tmp_path / "toy"):
        raise ValueError("a bug")
    assert names_in(tmp_path) == []


def test_writing_through_a_symbolic_link_replaces_the_bundle_it_points_to(tmp_path: Path) -> None:
    write_bundle(tmp_path / "toy")
    link = tmp_path / "current"
    link.symlink_to("toy")
    write_bundle(link, model=b"newer")
    assert link.is_symlink()
    assert open_bundle(tmp_path / "toy").model_path("fp32").read_bytes() == b"newer"
    assert names_in(tmp_path) == ["current", "toy"]


def folder_with(name: str, content: str) -> Callable[[Path], object]:
    def make(out: Path) -> None:
        out.mkdir()
        (out / name).write_text(content)

    return make


@pytest.mark.parametrize(
    "make",
    [
        lambda out: out.write_text("a file"),
        lambda out: out.mkdir(),
        folder_with("thesis.txt", "years of work"),
        folder_with("manifest.json", '{"name": "a web page", "icons": []}'),
        folder_with("manifest.json", "no JSON"),
    ],
)
def test_a_path_that_is_not_a_bundle_is_not_replaced(tmp_path: Path, make: Callable[[Path], object]) -> None:
    out = tmp_path / "mine"
    make(out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(BundleError, match="exists and is not a bundle, so it is not replaced; give another --out"):
        check_replaceable(out)
    with pytest.raises(BundleError, match="is not a bundle"):
        write_bundle(out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_bundle_of_another_schema_can_be_replaced(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "toy")
    edit_manifest(out, lambda content: content.update(schema_version=99))
    check_replaceable(out)
    check_replaceable(tmp_path / "nothing yet")


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "golden.npz"])
def test_a_symbolic_link_out_of_the_bundle_is_rejected_and_one_within_it_is_accepted(tmp_path: Path, name: str) -> None:
    out = write_bundle(tmp_path / "toy")
    (out / name).rename(out / "same")
    (out / name).symlink_to("same")
    open_bundle(out)
    (out / "same").rename(tmp_path / "elsewhere")
    (out / name).unlink()
    (out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=f"{name} is a symbolic link to a file outside the bundle"):
        open_bundle(out)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_a_named_pipe_in_place_of_a_file_is_rejected_without_blocking(tmp_path: Path, name: str) -> None:
    out = write_bundle(tmp_path / "toy")
    (out / name).unlink()
    os.mkfifo(out / name)
    with pytest.raises(BundleError, match=f"{name} is not a regular file"):
        open_bundle(out)


def test_a_file_with_another_size_is_rejected_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_bundle(tmp_path / "toy")
    os.truncate(out / "model.onnx", 10**12)  # a sparse file
    with pytest.raises(BundleError, match=r"has another size \(1000000000000 bytes\)"):
        open_bundle(out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "not readable JSON"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[1, 2]", "the whole file"),
    ],
)
def test_an_unreadable_manifest_gives_an_error_of_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    out = write_bundle(tmp_path / "toy")
    (out / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=message) as error:
        open_bundle(out)
    assert "\n" not in str(error.value)


def test_a_manifest_of_gigabytes_is_not_read_into_memory(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "toy")
    os.truncate(out / "manifest.json", 10**12)
    with pytest.raises(BundleError, match="more than 134,217,728 bytes"):
        open_bundle(out)


def test_golden_samples_that_unpack_to_too_many_bytes_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "MAX_GOLDEN_BYTES", 2**20)  # packing the real limit of 256 MiB takes seconds
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", bytes(2**21))
    assert len(file.getvalue()) < 2**14
    bundle = open_bundle(write_bundle(tmp_path / "toy", golden=file.getvalue()))
    with pytest.raises(BundleError, match="unpacks to 2,097,152 bytes, but the limit is 1,048,576"):
        bundle.golden()


def test_a_model_that_changed_after_its_bundle_was_opened_is_not_read(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "toy")
    bundle = open_bundle(out)
    assert bundle.model("fp32") == b"model"
    write_bundle(out, model=b"other")
    with pytest.raises(BundleError, match="changed or replaced after the bundle was opened; open the bundle again"):
        bundle.model("fp32")


def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_bundle(tmp_path / "toy")
    models = iter([b"newer", b"newest"])

    def check_during_replacement(path: Path, record: FileRecord) -> None:
        if path.name == "model.onnx" and (model := next(models, b"")):
            write_bundle(out, model)
        check_file(path, record)

    monkeypatch.setattr(bundle_module, "check_file", check_during_replacement)
    bundle = open_bundle(out)
    assert bundle.model("fp32") == b"newest"


def test_files_that_the_manifest_does_not_list_are_reported(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "toy")
    assert open_bundle(out).unlisted_files() == []
    (out / "model.int8.onnx").write_bytes(b"quick")
    (out / ".DS_Store").write_bytes(b"")
    assert open_bundle(out).unlisted_files() == [".DS_Store", "model.int8.onnx"]
