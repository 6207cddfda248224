import re
from pathlib import Path

import pytest
from google.protobuf import text_format
from report_toys import idle_bundle
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from export.triton import write_triton
from ltkd.contract.bundle import open_bundle
from ltkd.contract.records import write_record
from ltkd.errors import BundleError


def config_of(model: Path) -> ModelConfig:
    """Parse the file as Triton does; an unknown field or a wrong type raises an error."""
    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_precision_becomes_a_model_with_its_labels_and_the_certified_file(tmp_path: Path) -> None:
    bundle = open_bundle(idle_bundle(tmp_path / "student"))
    out = write_triton(bundle, tmp_path / "models")
    assert files_in(out) == [
        f"cifar100-student_{precision}/{name}"
        for precision in ("fp16", "fp32", "int8")
        for name in ("1/model.onnx", "config.pbtxt", "labels.txt")
    ]
    assert (out / "cifar100-student_int8" / "1" / "model.onnx").read_bytes() == bundle.model("int8")
    labels = (out / "cifar100-student_fp32" / "labels.txt").read_text().splitlines()
    assert tuple(labels) == bundle.manifest.task.class_names


def test_triton_can_parse_the_configuration(tmp_path: Path) -> None:
    out = write_triton(open_bundle(idle_bundle(tmp_path / "student")), tmp_path / "models")
    config = config_of(out / "cifar100-student_fp32")
    assert (config.name, config.backend, config.max_batch_size) == ("cifar100-student_fp32", "onnxruntime", 32)
    (image,), (logits,) = config.input, config.output
    assert (image.name, image.data_type, list(image.dims)) == ("image", 2, [32, 32, 3])  # TYPE_UINT8
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", 11, [12])  # TYPE_FP32
    assert (out / config.name / logits.label_filename).is_file()
    assert (out / config.name / "1" / config.default_model_filename).is_file()
    batching = config.dynamic_batching
    assert max(batching.preferred_batch_size) <= config.max_batch_size
    assert 0 < batching.max_queue_delay_microseconds <= 10_000
    assert [warm_up.batch_size for warm_up in config.model_warmup] == [1, 32]
    for warm_up in config.model_warmup:
        (name,) = warm_up.inputs
        value = warm_up.inputs[name]
        assert (name, value.data_type, list(value.dims), value.zero_data) == ("image", 2, [32, 32, 3], True)


def test_every_precision_runs_on_the_kind_of_device_on_which_it_was_certified(tmp_path: Path) -> None:
    out = write_triton(open_bundle(idle_bundle(tmp_path / "student")), tmp_path / "models")
    kinds = {model.name[-4:]: config_of(model).instance_group[0].kind for model in out.iterdir()}
    cpu, gpu = ModelInstanceGroup.KIND_CPU, ModelInstanceGroup.KIND_GPU
    assert kinds == {"fp32": cpu, "int8": cpu, "fp16": gpu}


def test_special_characters_in_names_do_not_break_the_files(tmp_path: Path) -> None:
    path = idle_bundle(tmp_path / "student")
    manifest = open_bundle(path).manifest
    names = ('a "quoted"\nname', "back\\slash", *manifest.task.class_names[2:])
    task = manifest.task.model_copy(update={"class_names": names})
    write_record(path / "manifest.json", manifest.model_copy(update={"task": task, "name": '../my "model"\n}'}))
    out = write_triton(open_bundle(path), tmp_path / "models")
    model = out / "_my__model____fp32"
    assert config_of(model).name == model.name
    assert (model / "labels.txt").read_text().splitlines()[:3] == ['a "quoted" name', "back\\slash", names[2]]


def test_a_repository_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_triton(open_bundle(idle_bundle(tmp_path / "student")), tmp_path / "models")
    write_triton(open_bundle(idle_bundle(tmp_path / "other", failing="int8")), tmp_path / "models")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "cifar100-student_fp16",
        "cifar100-student_fp32",
    ]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["thesis.txt", "resnet50/config.pbtxt", "resnet50/1/model.onnx"])
def test_a_directory_with_other_files_is_not_replaced(tmp_path: Path, name: str) -> None:
    out = write_triton(open_bundle(idle_bundle(tmp_path / "student")), tmp_path / "models")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text('name: "somebody\'s"')
    before = files_in(tmp_path)
    other = re.escape(name.partition("/")[0])
    with pytest.raises(BundleError, match=f"{other} was not written from a bundle"):
        write_triton(open_bundle(tmp_path / "student"), out)
    assert files_in(tmp_path) == before


def test_an_empty_directory_is_accepted_and_a_file_is_not(tmp_path: Path) -> None:
    bundle = open_bundle(idle_bundle(tmp_path / "student"))
    (tmp_path / "empty").mkdir()
    assert files_in(write_triton(bundle, tmp_path / "empty"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match="file was not written"):
        write_triton(bundle, tmp_path / "file")


def test_no_repository_is_written_if_a_model_changes_after_the_bundle_was_opened(tmp_path: Path) -> None:
    bundle = open_bundle(idle_bundle(tmp_path / "student"))
    bundle.model_path("int8").write_bytes(b"other")
    with pytest.raises(BundleError, match="changed or replaced"):
        write_triton(bundle, tmp_path / "models")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
