"""The engine: its logits, batch sizes, choice of device and precision, and the verification of golden samples."""

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from assignment_toys import cuda_session, model_with_a_dynamic_shape
from numpy.typing import NDArray
from serve_toys import convolution, expected_logits, toy_model, toy_pixels, write_toy_bundle

import serve.engine.session
from ltkd.contract.bundle import open_bundle
from ltkd.contract.node_assignment import NodeAssignment
from ltkd.errors import BundleError, DeviceError
from serve.engine.devices import num_cuda_devices
from serve.engine.session import Images, OnnxEngine, batch_sizes, node_assignment, open_engine


@pytest.fixture
def bundle_path(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "toy")


def test_logits_equal_a_direct_computation_in_numpy(bundle_path: Path) -> None:
    engine = open_engine(open_bundle(bundle_path), "cpu")
    images = np.stack([toy_pixels(seed) for seed in (20, 21, 22)])
    logits_NC = engine.logits(images)
    assert logits_NC.dtype == np.float32
    # float32 sums of 192 terms of magnitude 1, in another order
    np.testing.assert_allclose(logits_NC, expected_logits(images), atol=1e-4)


def test_the_published_provider_is_the_one_that_runs(bundle_path: Path) -> None:
    engine = open_engine(open_bundle(bundle_path), "cpu")
    assert engine.provider == engine.session.get_providers()[0] == "CPUExecutionProvider"


@pytest.mark.parametrize("padded", [False, True])
def test_an_image_has_the_same_logits_to_the_bit_alone_and_in_every_batch_size(tmp_path: Path, padded: bool) -> None:
    bundle = open_bundle(write_toy_bundle(tmp_path / "toy", model=convolution()))
    engine = open_engine(bundle, "cpu", max_batch=32)
    if padded:  # as on a GPU: 3 images to 4, 20 images to 32
        engine = replace(engine, seconds_of=dict.fromkeys(batch_sizes(32), 0.001))
    images = np.stack([toy_pixels(seed) for seed in range(32)])
    alone = [engine.logits(images[row : row + 1])[0].tobytes() for row in range(32)]
    for num in range(1, 33):
        assert [row.tobytes() for row in engine.logits(images[:num])] == alone[:num]


class RecordingSession:
    """A session that records the batch sizes it runs."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.sizes: list[int] = []

    def run(self, outputs: list[str], inputs: dict[str, NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        self.sizes.append(len(inputs["image"]))
        return self.session.run(outputs, inputs)


def test_a_cpu_runs_every_batch_size_without_padding_and_a_gpu_only_warm_sizes(bundle_path: Path) -> None:
    engine = open_engine(open_bundle(bundle_path), "cpu", max_batch=8)
    images = np.stack([toy_pixels(seed) for seed in range(8)])
    for seconds_of, expected in (
        (engine.seconds_of, [1, 3, 5, 8]),
        (dict.fromkeys(batch_sizes(8), 0.001), [1, 4, 8, 8]),
    ):
        session = RecordingSession(engine.session)
        recording = replace(engine, seconds_of=seconds_of, session=cast(ort.InferenceSession, session))
        for num in (1, 3, 5, 8):
            recording.logits(images[:num])
        assert session.sizes == expected


def test_the_times_of_sizes_between_the_measured_ones_are_interpolated(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.engine.session, "_replay", lambda engine, golden, rows: len(rows) ** 2 / 1000)
    engine = open_engine(open_bundle(bundle_path), "cpu", max_batch=6)
    assert engine.seconds_of == pytest.approx({1: 0.001, 2: 0.004, 3: 0.01, 4: 0.016, 5: 0.026, 6: 0.036})


def test_more_images_than_the_largest_batch_size_are_run_in_several_batches(bundle_path: Path) -> None:
    engine = open_engine(open_bundle(bundle_path), "cpu", max_batch=4)
    images = np.stack([toy_pixels(seed) for seed in range(11)])
    assert tuple(engine.seconds_of) == (1, 2, 3, 4)
    np.testing.assert_allclose(engine.logits(images), expected_logits(images), atol=1e-4)
    assert engine.logits([]).shape == (0, 6)


def test_batch_sizes_are_powers_of_two_and_the_largest() -> None:
    assert [batch_sizes(largest) for largest in (1, 4, 6, 32)] == [
        (1,), (1, 2, 4), (1, 2, 4, 6), (1, 2, 4, 8, 16, 32)
    ]  # fmt: skip


def test_a_cpu_leaves_out_batch_sizes_that_take_too_long(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.engine.session, "LONGEST_RUN_SECONDS", 0.0)
    assert tuple(open_engine(open_bundle(bundle_path), "cpu", max_batch=32).seconds_of) == (1,)


def test_a_cpu_uses_int8_if_it_is_certified_unless_another_precision_is_given(tmp_path: Path) -> None:
    bundle = open_bundle(write_toy_bundle(tmp_path / "toy", precisions=("fp32", "int8", "fp16")))
    chosen = [open_engine(bundle, "cpu", precision).precision for precision in (None, "fp32", "fp16")]
    assert chosen == ["int8", "fp32", "fp16"]


def test_a_precision_that_is_not_certified_is_an_error(bundle_path: Path) -> None:
    with pytest.raises(BundleError, match="has no certified int8 model; choose one of: fp32"):
        open_engine(open_bundle(bundle_path), "cpu", "int8")


@pytest.mark.skipif(num_cuda_devices() > 0, reason="this machine has CUDA")
def test_device_cuda_without_cuda_is_a_one_line_error(bundle_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"asked for cuda, .* CPUExecutionProvider.*start with --device cpu") as error:
        open_engine(open_bundle(bundle_path), "cuda")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(num_cuda_devices() > 0, reason="this machine has CUDA")
def test_device_auto_without_cuda_uses_the_cpu_and_prints_nothing(
    bundle_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert open_engine(open_bundle(bundle_path), "auto").provider == "CPUExecutionProvider"
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(num_cuda_devices() > 0, reason="this machine has CUDA")
def test_a_gpu_without_the_cuda_libraries_is_an_error_for_cuda_and_not_used_by_auto(
    bundle_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(serve.engine.session, "num_cuda_devices", lambda: 1)
    with pytest.raises(DeviceError, match="start with --device cpu") as error:
        open_engine(open_bundle(bundle_path), "cuda")
    assert "\n" not in str(error.value)
    assert open_engine(open_bundle(bundle_path), "auto").provider == "CPUExecutionProvider"
    assert "--device auto uses the CPU: asked for cuda, but" in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(num_cuda_devices() == 0, reason="this machine has no CUDA")
def test_device_cuda_runs_on_cuda_and_gives_the_certified_logits(bundle_path: Path) -> None:
    engine = open_engine(open_bundle(bundle_path), "cuda")
    assert engine.provider == "CUDAExecutionProvider"
    assert open_engine(open_bundle(bundle_path), "auto").provider == "CUDAExecutionProvider"


@pytest.mark.parametrize("shift", [0.5, float("nan")])
def test_golden_samples_with_other_logits_are_an_error(tmp_path: Path, shift: float) -> None:
    with pytest.raises(BundleError, match="logits of the golden samples, in a batch of 1, differ"):
        open_engine(open_bundle(write_toy_bundle(tmp_path / "toy", golden_shift=shift)), "cpu")


def test_golden_samples_with_other_logits_in_one_batch_size_are_an_error(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = OnnxEngine.logits

    def wrong_in_batches_of_four(engine: OnnxEngine, images: Images) -> NDArray[np.float32]:
        return logits(engine, images) + np.float32(len(images) == 4)

    monkeypatch.setattr(OnnxEngine, "logits", wrong_in_batches_of_four)
    with pytest.raises(BundleError, match="logits of the golden samples, in a batch of 4, differ by 1 from"):
        open_engine(open_bundle(bundle_path), "cpu", max_batch=32)


@pytest.mark.parametrize("longest_run_seconds", [0.0, 1.0])
def test_every_golden_sample_is_run_however_few_batch_sizes_are_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest_run_seconds: float
) -> None:
    bundle = open_bundle(write_toy_bundle(tmp_path / "toy"))
    golden, logits = bundle.golden(), OnnxEngine.logits
    images_run: set[bytes] = set()

    def recording_logits(engine: OnnxEngine, images: Images) -> NDArray[np.float32]:
        images_run.update(image.tobytes() for image in images)
        return logits(engine, images)

    monkeypatch.setattr(serve.engine.session, "LONGEST_RUN_SECONDS", longest_run_seconds)
    monkeypatch.setattr(OnnxEngine, "logits", recording_logits)
    open_engine(bundle, "cpu", max_batch=2)
    assert images_run == {image.tobytes() for image in golden.images_MSS3}
    assert len(images_run) > 1 + 2  # more images than the two batch sizes need


def test_golden_samples_of_another_image_size_are_an_error(tmp_path: Path) -> None:
    model = toy_model()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 9
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 9
    model.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(np.array([-1, 192], np.int64), "flat"))
    with pytest.raises(BundleError, match="cannot run its golden samples"):
        open_engine(open_bundle(write_toy_bundle(tmp_path / "toy", model=model)), "cpu")


def test_a_model_with_another_input_name_is_an_error(tmp_path: Path) -> None:
    model = toy_model()
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"
    with pytest.raises(BundleError, match=r"has inputs .*pixels.*, expected image"):
        open_engine(open_bundle(write_toy_bundle(tmp_path / "toy", model=model)), "cpu")


def test_a_file_that_is_not_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be loaded by ONNX Runtime") as error:
        open_engine(open_bundle(write_toy_bundle(tmp_path / "toy", model=onnx.ModelProto())), "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "parity.json"])
def test_a_flipped_byte_in_any_file_is_an_error(bundle_path: Path, name: str) -> None:
    content = bytearray((bundle_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} was changed after export"):
        open_bundle(bundle_path)


def test_a_newer_schema_version_is_an_error(bundle_path: Path) -> None:
    manifest = json.loads((bundle_path / "manifest.json").read_text())
    (bundle_path / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(BundleError, match=r"schema version 99.*install a newer ltkd"):
        open_bundle(bundle_path)


def test_on_cuda_shapes_may_be_computed_on_the_cpu_and_the_image_may_not(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    content = model_with_a_dynamic_shape().SerializeToString()
    path.write_bytes(content)
    shapes = cuda_session(content, on_cpu={"Gather", "Slice", "Concat"})  # ONNX Runtime created the Gather
    nodes = node_assignment(shapes, "CUDAExecutionProvider", path)
    assert nodes.num_nodes == {"CUDAExecutionProvider": 5, "CPUExecutionProvider": 3}
    assert set(nodes.shape_nodes) == {"Gather (Gather)", "slice (Slice)", "concat (Concat)"}
    for operator in ("Relu", "MatMul", "Cast"):
        with pytest.raises(DeviceError, match=rf"compute with the image and would run on CPU.*: \w+ \({operator}\)"):
            node_assignment(cuda_session(content, on_cpu={operator, "Slice"}), "CUDAExecutionProvider", path)


def test_the_engine_publishes_how_many_nodes_run_on_which_provider(bundle_path: Path) -> None:
    engine = open_engine(open_bundle(bundle_path), "cpu")
    assert engine.nodes == NodeAssignment(num_nodes={"CPUExecutionProvider": 4})


def test_an_engine_runs_on_the_gpu_of_its_index_and_a_missing_one_is_an_error(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[object] = []

    def session(path: Path, providers: list[tuple[str, dict[str, str]]], options: ort.SessionOptions) -> object:
        requested.extend(settings["device_id"] for _, settings in providers)
        raise BundleError("there is no such GPU here")

    monkeypatch.setattr(serve.engine.session, "num_cuda_devices", lambda: 2)
    monkeypatch.setattr(serve.engine.session, "_session", session)
    for device in ("cuda", "cuda:0", "cuda:1"):
        with pytest.raises(DeviceError):
            open_engine(open_bundle(bundle_path), device)
    assert requested == ["0", "0", "1"]
    with pytest.raises(DeviceError, match="asked for cuda:2, but there are 2 GPUs"):
        open_engine(open_bundle(bundle_path), "cuda:2")
