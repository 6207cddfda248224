import json

import numpy as np
import onnx
import pytest
import torch
from export_toys import TASK, damaged, edited, toy
from onnx import ModelProto, TensorProto, helper
from quantise_toys import labelled_images, small_net, small_onnx
from torch import nn

from export.conversion.fp16 import to_fp16
from export.conversion.fp32 import to_onnx
from export.conversion.session import model_metadata, open_session, read_model, run
from ltkd.errors import BundleError

# error of five layers with eleven significant bits, as a share of the span of the logits
HALF_TOLERANCE = 2e-3


def nodes(content: bytes) -> list[tuple[str, str]]:
    return [(node.op_type, node.output[0]) for node in onnx.load_model_from_string(content).graph.node]


def test_fp16_gives_the_same_logits_up_to_half_precision() -> None:
    images = labelled_images(120, seed=3).images[:]
    fp32, fp16 = (run(open_session(content), images) for content in (small_onnx(), to_fp16(small_onnx())))
    assert fp16.dtype == np.float32
    assert np.abs(fp16 - fp32).max() < HALF_TOLERANCE * np.ptp(fp32)


def test_all_weights_except_the_classifiers_are_stored_in_half_precision() -> None:
    model = onnx.load_model_from_string(to_fp16(small_onnx()))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer if tensor.name.startswith("network.")}
    floats = {name for name, type_ in types.items() if type_ == TensorProto.FLOAT}
    assert floats == {"network.classifier.weight", "network.classifier.bias"}
    assert len(types) > 10


def test_pixels_are_normalised_before_they_are_rounded() -> None:
    # 1/255 of a std of 1e-3 is 3.9: a pixel reaches 900, where half precision has steps of 0.5; if pixels were rounded
    # before the mean is subtracted, the sum would be wrong by a quarter of a pixel step
    task = TASK.model_copy(update={"mean": (0.5, 0.5, 0.5), "std": (1e-3, 1e-3, 1e-3)})
    network = nn.Sequential(nn.Conv2d(3, 6, 8, bias=False), nn.Flatten(), nn.Linear(6, 6))
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(0.001)
    content = to_onnx(network, task)
    image = np.full((1, 8, 8, 3), 128, np.uint8)
    fp32, fp16 = (run(open_session(file), image) for file in (content, to_fp16(content)))
    np.testing.assert_allclose(fp16, fp32, rtol=2e-3)
    assert [op_type for op_type, _ in nodes(to_fp16(content))][:5] == ["Transpose", "Cast", "Mul", "Add", "Cast"]


def test_node_names_and_metadata_do_not_change() -> None:
    missing = set(nodes(small_onnx())) - set(nodes(to_fp16(small_onnx())))
    assert missing == set()
    metadata = {entry.key: entry.value for entry in read_model(to_fp16(small_onnx())).metadata_props}
    assert metadata == model_metadata(TASK)
    assert json.loads(metadata["class_names"]) == list(TASK.class_names)


def test_equal_files_give_equal_bytes() -> None:
    assert to_fp16(small_onnx()) == to_fp16(small_onnx())


def test_a_weight_outside_the_range_of_float16_is_not_clipped() -> None:
    too_large = damaged(small_onnx(), "network.first.0.weight", lambda weight: weight * 1e8)
    logits = run(open_session(to_fp16(too_large)), labelled_images(6, seed=3).images[:])
    assert not np.isfinite(logits).all()


def test_a_constant_that_is_read_in_both_precisions_stays_float32() -> None:
    def share(model: ModelProto) -> None:
        (classifier,) = [node for node in model.graph.node if node.op_type == "Gemm"]
        at = list(model.graph.node).index(classifier)
        extra = helper.make_node("Add", [classifier.input[0], classifier.input[0]], ["twice"])
        half = helper.make_node("Mul", ["twice", "half"], ["halved"])
        twice = helper.make_node("Mul", ["plain", "half"], ["half_of_logits"])
        again = helper.make_node("Add", ["half_of_logits", "half_of_logits"], ["logits"])
        model.graph.initializer.append(helper.make_tensor("half", TensorProto.FLOAT, [], [0.5]))
        classifier.input[0], classifier.output[0] = "halved", "plain"
        model.graph.node.insert(at, half)
        model.graph.node.insert(at, extra)
        model.graph.node.extend([twice, again])

    shared = edited(small_onnx(), share)
    images = labelled_images(12, seed=3).images[:]
    np.testing.assert_allclose(
        run(open_session(to_fp16(shared)), images), run(open_session(to_fp16(small_onnx())), images), atol=1e-2
    )


def test_the_scales_of_a_resize_stay_float32() -> None:
    class Enlarging(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            enlarged = nn.functional.interpolate(self.conv(image), scale_factor=2.0)
            return self.inner(enlarged[:, :, ::2, ::2])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    content = to_onnx(Enlarging(small_net()), TASK)
    assert "Resize" in [op_type for op_type, _ in nodes(content)]
    images = labelled_images(12, seed=3).images[:]
    fp32, fp16 = (run(open_session(file), images) for file in (content, to_fp16(content)))
    assert np.abs(fp16 - fp32).max() < HALF_TOLERANCE * np.ptp(fp32)


def test_control_flow_is_rejected() -> None:
    def branch(model: ModelProto) -> None:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 6])
        bodies = {
            name: helper.make_graph([helper.make_node("Identity", ["plain"], ["logits"])], name, [], [logits])
            for name in ("then_branch", "else_branch")
        }
        model.graph.node[-1].output[0] = "plain"
        model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
        model.graph.node.append(helper.make_node("If", ["yes"], ["logits"], **bodies))

    with pytest.raises(BundleError, match="control flow"):
        to_fp16(edited(toy().candidate, branch))
