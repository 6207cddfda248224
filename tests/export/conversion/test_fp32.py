import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_toys import TASK, TinyNet, toy

from export.certification.reference import torch_logits
from export.conversion.fp32 import to_onnx
from export.conversion.session import open_session, run


def test_the_onnx_file_computes_what_torch_computes() -> None:
    logits = run(open_session(toy().candidate), toy().images[::50])
    expected = torch_logits(toy().network, TASK, toy().images[::50], torch.float64)
    # float32 against float64: some 1e-6 of a span of about 30
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert logits.dtype == np.float32


def test_any_number_of_images_can_be_run() -> None:
    session = open_session(toy().candidate)
    for num_images in (1, 2, 5, 300):
        assert run(session, toy().images[:num_images]).shape == (num_images, 6)


def test_opset_and_ir_are_those_that_old_runtimes_read() -> None:
    model = onnx.load_model_from_string(toy().candidate)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert model.ir_version == 10


def test_pixels_are_scaled_by_one_multiplication_and_one_addition() -> None:
    model = onnx.load_model_from_string(toy().candidate)
    assert [node.op_type for node in model.graph.node][:4] == ["Transpose", "Cast", "Mul", "Add"]


def test_the_file_says_what_it_is() -> None:
    said = open_session(toy().candidate).get_modelmeta().custom_metadata_map
    assert json.loads(said["class_names"]) == list(TASK.class_names)
    assert json.loads(said["train_counts"]) == list(TASK.train_counts)
    assert json.loads(said["groups"]) == TASK.groups.model_dump(mode="json")
    assert json.loads(said["preprocessing"])["inside"]["mean"] == list(TASK.mean)


def test_no_path_and_no_module_of_this_machine_is_in_the_file() -> None:
    traces = ("site-packages", "export_toys", "TinyNet", ".py", str(Path.cwd()), str(Path.home()) + "/", sys.prefix)
    assert [trace for trace in traces if trace.encode() in toy().candidate] == []


def test_two_exports_are_equal_to_the_byte() -> None:
    assert to_onnx(toy().network, TASK) == toy().candidate


@pytest.mark.slow
def test_another_process_exports_the_same_bytes() -> None:
    program = (
        "import hashlib, torch; from export_toys import *; torch.manual_seed(3);"
        "print(hashlib.sha256(to_onnx(TinyNet(), TASK)).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    torch.manual_seed(3)
    assert done.stdout.split() == [hashlib.sha256(to_onnx(TinyNet(), TASK)).hexdigest()]
    assert done.stderr == ""


def test_a_network_in_training_is_exported_for_inference_and_left_in_training() -> None:
    network = copy.deepcopy(toy().network).train()
    network.classifier.eval()  # type: ignore[union-attr]
    before = copy.deepcopy(network.state_dict())
    assert to_onnx(network, TASK) == toy().candidate
    assert network.training
    assert not network.classifier.training  # type: ignore[union-attr]
    assert all(torch.equal(before[name], after) for name, after in network.state_dict().items())


def test_the_exporter_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    to_onnx(toy().network, TASK)
    assert capfd.readouterr() == ("", "")


class Pooled(torch.nn.Module):
    """Ends as the classifiers of torchvision and timm do: adaptive pooling, then flatten."""

    def __init__(self, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.pool, self.classifier = torch.nn.Conv2d(3, 12, 3), pool, torch.nn.Linear(12, 6)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.pool(self.conv(image)), 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "pool",
    [
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.AdaptiveAvgPool2d((1, 1)),
        lambda image: torch.nn.functional.adaptive_avg_pool2d(image, (1, 1)),
        lambda image: torch.nn.functional.adaptive_avg_pool2d(image, output_size=1),
    ],
)
def test_adaptive_pooling_to_a_pixel_is_a_plain_mean(pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    network = Pooled(pool).eval()
    content = to_onnx(network, TASK)
    operators = [node.op_type for node in onnx.load_model_from_string(content).graph.node]
    assert operators == ["Transpose", "Cast", "Mul", "Add", "Conv", "ReduceMean", "Reshape", "Gemm"]
    expected = torch_logits(network, TASK, toy().images[:9], torch.float64)
    np.testing.assert_allclose(run(open_session(content), toy().images[:9]), expected, atol=1e-4)
