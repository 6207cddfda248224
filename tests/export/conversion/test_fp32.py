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


def test_the_onnx_file_gives_the_logits_of_torch() -> None:
    logits = run(open_session(toy().candidate), toy().images[::50])
    expected = torch_logits(toy().network, TASK, toy().images[::50], torch.float64)
    # float32 against float64: some 1e-6 of a span of about 30
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert logits.dtype == np.float32


def test_the_batch_may_have_any_size() -> None:
    session = open_session(toy().candidate)
    for num_images in (1, 2, 5, 300):
        assert run(session, toy().images[:num_images]).shape == (num_images, 6)


def test_opset_and_ir_version_are_old_enough_for_old_runtimes() -> None:
    model = onnx.load_model_from_string(toy().candidate)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert model.ir_version == 10


def test_pixels_are_scaled_by_one_multiplication_and_one_addition() -> None:
    model = onnx.load_model_from_string(toy().candidate)
    assert [node.op_type for node in model.graph.node][:4] == ["Transpose", "Cast", "Mul", "Add"]


def test_the_metadata_describe_the_task() -> None:
    metadata = open_session(toy().candidate).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(TASK.class_names)
    assert json.loads(metadata["train_counts"]) == list(TASK.train_counts)
    assert json.loads(metadata["groups"]) == TASK.groups.model_dump(mode="json")
    assert json.loads(metadata["preprocessing"])["inside"]["mean"] == list(TASK.mean)


def test_the_file_contains_no_path_or_module_name_of_this_machine() -> None:
    traces = ("site-packages", "export_toys", "TinyNet", ".py", str(Path.cwd()), str(Path.home()) + "/", sys.prefix)
    assert [trace for trace in traces if trace.encode() in toy().candidate] == []


def test_exporting_twice_gives_the_same_bytes() -> None:
    assert to_onnx(toy().network, TASK) == toy().candidate


@pytest.mark.slow
def test_another_process_exports_the_same_bytes() -> None:
    program = (
        "import hashlib, torch; from export_toys import *; torch.manual_seed(3);"
        "print(hashlib.sha256(to_onnx(TinyNet(), TASK)).hexdigest())"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    torch.manual_seed(3)
    assert completed.stdout.split() == [hashlib.sha256(to_onnx(TinyNet(), TASK)).hexdigest()]
    assert completed.stderr == ""


def test_a_network_in_training_mode_is_exported_for_inference_and_not_modified() -> None:
    network = copy.deepcopy(toy().network).train()
    network.classifier.eval()  # type: ignore[union-attr]
    before = copy.deepcopy(network.state_dict())
    assert to_onnx(network, TASK) == toy().candidate
    assert network.training
    assert not network.classifier.training  # type: ignore[union-attr]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_exporter_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    to_onnx(toy().network, TASK)
    assert capfd.readouterr() == ("", "")


class Pooled(torch.nn.Module):
    """A network that ends like the classifiers of torchvision and timm, with adaptive pooling and flatten."""

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
def test_adaptive_pooling_to_one_pixel_is_exported_as_a_mean(pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    network = Pooled(pool).eval()
    content = to_onnx(network, TASK)
    operators = [node.op_type for node in onnx.load_model_from_string(content).graph.node]
    assert operators == ["Transpose", "Cast", "Mul", "Add", "Conv", "ReduceMean", "Reshape", "Gemm"]
    expected = torch_logits(network, TASK, toy().images[:9], torch.float64)
    np.testing.assert_allclose(run(open_session(content), toy().images[:9]), expected, atol=1e-4)
