import copy
import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_toys import TASK, toy
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper
from quantise_toys import SmallNet, labelled_images, small_net, small_onnx
from torch import nn

from export.certification.layer_errors import find_layer_errors
from export.conversion.fp32 import to_onnx
from export.conversion.int8 import CalibratedModel, Int8Config, balanced_rows, collect_ranges, search_int8
from export.conversion.int8_graph import WEIGHT_LIMIT, plan_quantisation, quantise
from export.conversion.int8_ranges import (
    RULES,
    ActivationHistogram,
    activation_histograms,
    full_range,
    least_squares,
    percentile,
    scale_of,
)
from export.conversion.session import INPUT, OUTPUT, open_session, read_model, run
from export.schema import QuantisationTrial

MINMAX = Int8Config("minmax", per_channel=True)


@functools.cache
def source() -> CalibratedModel:
    return collect_ranges(small_onnx(), labelled_images(120, seed=2).images[:])


def int8_of(network: nn.Module, config: Int8Config = MINMAX) -> tuple[bytes, bytes]:
    fp32 = to_onnx(network, TASK)
    return fp32, collect_ranges(fp32, labelled_images(120, seed=2).images[:]).to_onnx_bytes(config)


def tensors(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def optimised_operators(content: bytes, path: Path) -> list[str]:
    """List the operators of a file after ONNX Runtime has optimised it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path).graph.node]


def without_fusion(content: bytes, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Run every node separately in float32 on dequantised integers, so that no integer sum can saturate."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run([OUTPUT], {INPUT: images})[0]  # type: ignore[no-any-return]


# ranges


def test_a_histogram_counts_every_value_in_bins_narrower_than_one_percent() -> None:
    images = labelled_images(30, seed=2).images[:]
    name = next(iter(plan_quantisation(onnx.load_model_from_string(small_onnx()).graph).always))
    histogram = activation_histograms(small_onnx(), [name], images)[name]
    assert histogram.lowest < histogram.highest
    assert histogram.count_B.sum() % len(images) == 0
    assert (np.diff(histogram.value_B) > 0).all()
    for end, outermost in ((histogram.lowest, histogram.value_B[0]), (histogram.highest, histogram.value_B[-1])):
        # the centre of a bin is at most half its width, 1/256 of its value, away
        assert abs(outermost - end) <= abs(end) / 256 + 1e-30


def test_one_outlier_widens_the_full_range_but_not_the_percentile() -> None:
    histogram = ActivationHistogram(
        -1.0, 1000.0, np.array([-1.0, 0.0, 1.0, 1000.0]), np.array([500_000, 1_000_000, 500_000, 1])
    )
    assert full_range(histogram) == (-1.0, 1000.0)
    assert percentile(histogram) == (-1.0, 1.0)


def test_least_squares_clips_rare_values_and_keeps_frequent_ones() -> None:
    values = np.linspace(0, 10, 2001)
    counts = (1e6 * np.exp(-3 * values)).astype(np.int64) + 1
    low, high = least_squares(ActivationHistogram(0.0, 10.0, values, counts))
    assert low == 0
    assert high < 8
    uniform = ActivationHistogram(0.0, 10.0, values, np.full(2001, 100))
    assert least_squares(uniform)[1] == pytest.approx(10)


def test_every_scale_covers_zero_and_the_range() -> None:
    for ends in ((-2.0, 3.0), (1.0, 3.0), (-3.0, -1.0), (0.0, 0.0)):
        scale, zero = scale_of(ends)
        assert scale > 0
        lowest, highest = (0 - float(zero)) * float(scale), (255 - float(zero)) * float(scale)
        # the zero point is rounded to a step
        assert lowest <= min(ends[0], 0) + float(scale) / 2
        assert highest >= max(ends[1], 0) - float(scale) / 2


# the file


def test_int8_is_close_to_fp32_in_every_configuration() -> None:
    images = labelled_images(300, seed=4)
    fp32 = run(open_session(small_onnx()), images.images)
    for rule in RULES:
        for per_channel in (True, False):
            int8 = run(open_session(source().to_onnx_bytes(Int8Config(rule, per_channel))), images.images)
            assert int8.dtype == np.float32
            # six layers with seven-bit weights and eight-bit activations: errors of some percent
            assert np.sqrt(np.mean((int8 - fp32) ** 2)) < 0.1 * fp32.std()
            assert (int8.argmax(axis=1) == fp32.argmax(axis=1)).mean() > 0.9


def test_activations_are_unsigned_and_weights_are_signed_with_seven_bits() -> None:
    found = tensors(read_model(source().to_onnx_bytes(MINMAX)))
    weights = {name: values for name, values in found.items() if values.dtype == np.int8}
    assert len(weights) == 4  # first, second, depthwise, narrow
    assert max(int(np.abs(values).max()) for values in weights.values()) == WEIGHT_LIMIT
    zero_points = [values for name, values in found.items() if name.endswith(".z")]
    assert {values.dtype for values in zero_points} == {np.dtype(np.uint8)}


def test_the_first_weights_and_the_classifier_stay_float() -> None:
    found = tensors(read_model(source().to_onnx_bytes(MINMAX)))
    halves = sorted(name for name, values in found.items() if values.dtype == np.float16)
    assert halves == ["network.classifier.weight.h", "network.stem.0.weight.h"]


def test_onnx_runtime_computes_convolutions_and_sums_with_integers(tmp_path: Path) -> None:
    operators = optimised_operators(source().to_onnx_bytes(MINMAX), tmp_path / "optimised.onnx")
    assert operators.count("QLinearConv") == 4
    assert operators.count("QLinearAdd") == 1
    assert operators.count("Conv") == 1
    assert not {"Relu", "Clip"} & set(operators)
    # the output of the stem is pooled in float before it is quantised; there is one conversion to integers and one back
    assert operators.index("MaxPool") < operators.index("QuantizeLinear")
    assert operators.count("QuantizeLinear") == 1
    assert operators.count("DequantizeLinear") == 1


def test_no_sum_of_products_saturates_even_with_the_largest_weights() -> None:
    network = copy.deepcopy(small_net())
    with torch.no_grad():  # all weights and activations at their maximum, where sums in 16 bits would overflow
        for layer in (network.first[0], network.second[0], network.narrow[0]):  # type: ignore[index]
            layer.weight.fill_(0.05)
    images = np.full((4, 8, 8, 3), 255, np.uint8)
    images[1:] = labelled_images(6, seed=5).images[:3]
    fp32 = to_onnx(network, TASK)
    content = collect_ranges(fp32, images).to_onnx_bytes(MINMAX)
    logits, exact = run(open_session(content), images), without_fusion(content, images)
    # a value between two steps may be rounded either way; a saturated sum would be wrong by a half
    assert np.abs(logits - exact).max() < 0.02 * np.abs(exact).max()


def test_a_depthwise_convolution_with_very_different_channels_keeps_all_of_them() -> None:
    network = copy.deepcopy(small_net())
    with torch.no_grad():  # as in trained MobileNets: channels whose weights differ a thousandfold
        norm = network.depthwise[1]  # type: ignore[index]
        norm.running_var[::2] *= 1e-6
        norm.weight[::2] *= 1e-3
    fp32, int8 = int8_of(network)
    errors = {
        layer.layer: layer.error for layer in find_layer_errors(fp32, int8, labelled_images(30, seed=5).images[:])
    }
    assert max(errors.values()) < 0.1


@pytest.mark.slow
def test_a_dead_channel_keeps_its_bias_and_does_not_affect_the_others() -> None:
    network = copy.deepcopy(small_net())
    with torch.no_grad():
        network.first[0].weight[3] = 0  # type: ignore[index]
        network.first[0].weight[4] *= 1e-12  # type: ignore[index]
        network.first[1].bias[3:5] = 0.7  # type: ignore[index]
    images = labelled_images(120, seed=5).images
    for per_channel in (True, False):
        fp32, int8 = int8_of(network, replace(MINMAX, per_channel=per_channel))
        int8_NC, fp32_NC = run(open_session(int8), images), run(open_session(fp32), images)
        assert np.sqrt(np.mean((int8_NC - fp32_NC) ** 2)) < 0.1 * fp32_NC.std()


def test_float_layers_stay_float() -> None:
    layers = plan_quantisation(onnx.load_model_from_string(small_onnx()).graph).layers
    images = labelled_images(60, seed=5).images
    fp32 = run(open_session(small_onnx()), images)
    errors = []
    for num_float in range(len(layers) + 1):
        content = source().to_onnx_bytes(replace(MINMAX, float_layers=layers[:num_float]))
        weights = [values for values in tensors(read_model(content)).values() if values.dtype == np.int8]
        assert len(weights) == len(layers) - num_float
        errors.append(np.sqrt(np.mean((run(open_session(content), images) - fp32) ** 2)) / fp32.std())
    # all layers compute in float; only the outer weights are stored in half precision
    assert errors[-1] < 1e-3 < errors[0]


def test_a_network_without_inner_layers_stays_float() -> None:
    content = collect_ranges(toy().candidate, toy().images[:20]).to_onnx_bytes(MINMAX)
    np.testing.assert_allclose(
        run(open_session(content), toy().images[:50]), run(open_session(toy().candidate), toy().images[:50]), atol=0.02
    )


def test_hidden_linear_layers_become_integers_too() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 32),
        nn.ReLU(),
        nn.Linear(32, 16),
        nn.Linear(16, 6),
    )
    fp32, int8 = int8_of(network)
    assert sum(values.dtype == np.int8 for values in tensors(read_model(int8)).values()) == 2
    images = labelled_images(60, seed=5).images
    int8_NC, fp32_NC = run(open_session(int8), images), run(open_session(fp32), images)
    assert np.sqrt(np.mean((int8_NC - fp32_NC) ** 2)) < 0.05 * fp32_NC.std()


def test_a_pool_between_integer_layers_keeps_the_scale() -> None:
    network = nn.Sequential(SmallNet().stem, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    network.extend([nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6)])
    torch.manual_seed(0)
    model = read_model(int8_of(network.eval())[1])
    (pool,) = [node for node in model.graph.node if node.op_type == "MaxPool"]
    scales = tensors(model)
    assert scales[f"{pool.output[0]}.s"] == scales[pool.input[0].removesuffix(".dq") + ".s"]


def test_the_metadata_describe_the_configuration_and_the_calibration_images() -> None:
    metadata = {entry.key: entry.value for entry in read_model(source().to_onnx_bytes(MINMAX)).metadata_props}
    int8 = json.loads(metadata["int8"])
    assert int8["form"] == "minmax, per channel, balanced"
    assert int8["float_layers"] == []
    images = labelled_images(120, seed=2).images[:]
    assert int8["calibration"] == {"num_images": 120, "sha256": hashlib.sha256(images.tobytes()).hexdigest()}
    assert json.loads(metadata["class_names"]) == list(TASK.class_names)


def test_int8_is_a_third_of_the_size_if_the_file_is_mostly_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 6))
    fp32, int8 = int8_of(network)
    assert len(fp32) > 3 * len(int8)


# the search


def test_calibration_images_are_balanced_over_the_classes() -> None:
    labels_N = np.array([0] * 50 + [1] * 3 + [2] * 10)
    counts = np.bincount(labels_N[balanced_rows(labels_N, 20)])
    assert counts.tolist() == [9, 3, 8] or counts.tolist() == [8, 3, 9]
    assert np.bincount(labels_N[balanced_rows(labels_N, 9)]).tolist() == [3, 3, 3]
    assert len(balanced_rows(labels_N, 1000)) == 63


def test_the_search_tries_every_configuration_and_chooses_by_the_worst_group() -> None:
    reported: list[QuantisationTrial] = []
    content, trials = search_int8(
        small_onnx(),
        labelled_images(120, seed=2),
        labelled_images(600, seed=3),
        TASK.groups,
        reported.append,
        tolerated_loss=1,
    )
    assert len(trials) == len(reported) == 2 * len(RULES)
    (chosen,) = [trial for trial in trials if trial.chosen]
    assert chosen.worst_group in TASK.groups.names
    assert (chosen.worst_group_loss, chosen.kl) == min((trial.worst_group_loss, trial.kl) for trial in trials)
    assert chosen.float_layers == ()
    metadata = {entry.key: entry.value for entry in read_model(content).metadata_props}
    assert json.loads(metadata["int8"])["form"] == chosen.configuration
    assert [trial.model_copy(update={"chosen": False}) for trial in trials] == reported


@pytest.mark.slow
def test_a_layer_that_int8_damages_is_kept_in_float() -> None:
    network = copy.deepcopy(small_net())
    with torch.no_grad():
        # one channel of the inner activation is a thousand times as large and the next layer compensates: with a common
        # scale for the activation, the other channels are rounded to zero
        network.first[1].weight[0] *= 1000  # type: ignore[index]
        network.first[1].bias[0] *= 1000  # type: ignore[index]
        network.second[0].weight[:, 0] /= 1000  # type: ignore[index]
    fp32 = to_onnx(network, TASK)
    content, trials = search_int8(fp32, labelled_images(120, seed=2), labelled_images(600, seed=3), TASK.groups)
    all_int8 = [trial for trial in trials if not trial.float_layers]
    assert min(trial.worst_group_loss for trial in all_int8) > 0.005
    (chosen,) = [trial for trial in trials if trial.chosen]
    assert 1 <= len(chosen.float_layers) < 4
    assert chosen.worst_group_loss <= 0.005
    assert [len(trial.float_layers) for trial in trials[len(all_int8) :]] == [1, 2][: len(trials) - len(all_int8)]
    certify = labelled_images(600, seed=9)
    int8_accuracy = (run(open_session(content), certify.images).argmax(axis=1) == certify.labels_N).mean()
    fp32_accuracy = (run(open_session(fp32), certify.images).argmax(axis=1) == certify.labels_N).mean()
    assert int8_accuracy > fp32_accuracy - 0.02


def test_equal_searches_give_equal_bytes() -> None:
    def search() -> bytes:
        return search_int8(small_onnx(), labelled_images(60, seed=2), labelled_images(60, seed=3), TASK.groups)[0]

    assert search() == search()


def test_quantising_does_not_modify_the_fp32_file() -> None:
    fp32 = small_onnx()
    ranges = {name: full_range(histogram) for name, histogram in _histograms_of(fp32).items()}
    before = bytes(fp32)
    quantise(fp32, ranges, per_channel=True)
    assert fp32 == before
    types = {tensor.data_type for tensor in onnx.load_model_from_string(fp32).graph.initializer}
    assert TensorProto.INT8 not in types


def _histograms_of(fp32: bytes) -> dict[str, ActivationHistogram]:
    return activation_histograms(
        fp32, plan_quantisation(onnx.load_model_from_string(fp32).graph).stored, labelled_images(30, seed=2).images
    )
