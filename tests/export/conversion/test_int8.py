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
from quantise_toys import SmallNet, part, small_net, small_onnx
from torch import nn

from export.certification.layer_errors import find_layer_errors
from export.conversion.fp32 import to_onnx
from export.conversion.int8 import CalibratedModel, Int8Config, balanced, collect_ranges, search_int8
from export.conversion.int8_graph import WEIGHT_LIMIT, plan_of, quantise
from export.conversion.int8_ranges import (
    RULES,
    ActivationHistogram,
    activation_histograms,
    least_squares,
    percentile,
    scale_of,
    whole,
)
from export.conversion.session import INPUT, OUTPUT, open_session, read_model, run
from export.schema import QuantisationTrial

MINMAX = Int8Config("minmax", per_channel=True)


@functools.cache
def source() -> CalibratedModel:
    return collect_ranges(small_onnx(), part(120, seed=2).images[:])


def int8_of(network: nn.Module, form: Int8Config = MINMAX) -> tuple[bytes, bytes]:
    fp32 = to_onnx(network, TASK)
    return fp32, collect_ranges(fp32, part(120, seed=2).images[:]).written(form)


def tensors(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def optimised_operators(content: bytes, path: Path) -> list[str]:
    """What ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path).graph.node]


def emulated(content: bytes, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Every node by itself, integers read back as float32: arithmetic that no processor cuts short."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run([OUTPUT], {INPUT: images})[0]  # type: ignore[no-any-return]


# ranges


def test_a_spread_holds_every_value_in_bins_as_fine_as_half_a_percent() -> None:
    images = part(30, seed=2).images[:]
    name = next(iter(plan_of(onnx.load_model_from_string(small_onnx()).graph).always))
    spread = activation_histograms(small_onnx(), [name], images)[name]
    assert spread.lowest < spread.highest
    assert spread.count_B.sum() % len(images) == 0
    assert (np.diff(spread.value_B) > 0).all()
    for end, outermost in ((spread.lowest, spread.value_B[0]), (spread.highest, spread.value_B[-1])):
        # the middle of a bin that is 1/128 of its value wide, or less
        assert abs(outermost - end) <= abs(end) / 256 + 1e-30


def test_one_wild_value_stretches_the_whole_but_not_the_percentile() -> None:
    calm = ActivationHistogram(
        -1.0, 1000.0, np.array([-1.0, 0.0, 1.0, 1000.0]), np.array([500_000, 1_000_000, 500_000, 1])
    )
    assert whole(calm) == (-1.0, 1000.0)
    assert percentile(calm) == (-1.0, 1.0)


def test_least_squares_cuts_off_what_is_rare_and_keeps_what_is_not() -> None:
    values = np.linspace(0, 10, 2001)
    counts = (1e6 * np.exp(-3 * values)).astype(np.int64) + 1
    low, high = least_squares(ActivationHistogram(0.0, 10.0, values, counts))
    assert low == 0
    assert high < 8
    even = ActivationHistogram(0.0, 10.0, values, np.full(2001, 100))
    assert least_squares(even)[1] == pytest.approx(10)


def test_every_scale_covers_zero_and_its_range() -> None:
    for ends in ((-2.0, 3.0), (1.0, 3.0), (-3.0, -1.0), (0.0, 0.0)):
        scale, zero = scale_of(ends)
        assert scale > 0
        lowest, highest = (0 - float(zero)) * float(scale), (255 - float(zero)) * float(scale)
        # the zero point is rounded to a step
        assert lowest <= min(ends[0], 0) + float(scale) / 2
        assert highest >= max(ends[1], 0) - float(scale) / 2


# the file


def test_int8_is_close_to_fp32_whatever_the_form() -> None:
    images = part(300, seed=4)
    fp32 = run(open_session(small_onnx()), images.images)
    for rule in RULES:
        for per_channel in (True, False):
            int8 = run(open_session(source().written(Int8Config(rule, per_channel))), images.images)
            assert int8.dtype == np.float32
            # seven-bit weights and eight-bit maps through six layers: some percent
            assert np.sqrt(np.mean((int8 - fp32) ** 2)) < 0.1 * fp32.std()
            assert (int8.argmax(axis=1) == fp32.argmax(axis=1)).mean() > 0.9


def test_maps_are_unsigned_and_weights_are_signed_of_seven_bits() -> None:
    found = tensors(read_model(source().written(MINMAX)))
    weights = {name: values for name, values in found.items() if values.dtype == np.int8}
    assert len(weights) == 4  # first, second, depthwise, narrow
    assert max(int(np.abs(values).max()) for values in weights.values()) == WEIGHT_LIMIT
    zero_points = [values for name, values in found.items() if name.endswith(".z")]
    assert {values.dtype for values in zero_points} == {np.dtype(np.uint8)}


def test_the_first_weights_and_the_classifier_stay_float() -> None:
    found = tensors(read_model(source().written(MINMAX)))
    halves = sorted(name for name, values in found.items() if values.dtype == np.float16)
    assert halves == ["network.classifier.weight.h", "network.stem.0.weight.h"]


def test_onnx_runtime_computes_convolutions_and_sums_with_integers(tmp_path: Path) -> None:
    operators = optimised_operators(source().written(MINMAX), tmp_path / "optimised.onnx")
    assert operators.count("QLinearConv") == 4
    assert operators.count("QLinearAdd") == 1
    assert operators.count("Conv") == 1
    assert not {"Relu", "Clip"} & set(operators)
    # the map of the stem is pooled as float, a quarter is stored; one pair leads into the integers and one out
    assert operators.index("MaxPool") < operators.index("QuantizeLinear")
    assert operators.count("QuantizeLinear") == 1
    assert operators.count("DequantizeLinear") == 1


def test_no_sum_of_products_is_cut_short_even_by_the_widest_weights() -> None:
    network = copy.deepcopy(small_net())
    with torch.no_grad():  # all weights at the limit and all maps at their highest: where 16 bits would overflow
        for layer in (network.first[0], network.second[0], network.narrow[0]):  # type: ignore[index]
            layer.weight.fill_(0.05)
    images = np.full((4, 8, 8, 3), 255, np.uint8)
    images[1:] = part(6, seed=5).images[:3]
    fp32 = to_onnx(network, TASK)
    content = collect_ranges(fp32, images).written(MINMAX)
    logits, exact = run(open_session(content), images), emulated(content, images)
    # a map may be rounded the other way where it lies between two steps; a sum that is cut short is off by a half
    assert np.abs(logits - exact).max() < 0.02 * np.abs(exact).max()


def test_a_depthwise_convolution_of_uneven_channels_keeps_them_all() -> None:
    network = copy.deepcopy(small_net())
    with torch.no_grad():  # as in trained MobileNets: channels whose weights differ a thousandfold
        norm = network.depthwise[1]  # type: ignore[index]
        norm.running_var[::2] *= 1e-6
        norm.weight[::2] *= 1e-3
    fp32, int8 = int8_of(network)
    errors = {layer.layer: layer.error for layer in find_layer_errors(fp32, int8, part(30, seed=5).images[:])}
    assert max(errors.values()) < 0.1


@pytest.mark.slow
def test_a_dead_channel_keeps_its_bias_and_spoils_no_other() -> None:
    network = copy.deepcopy(small_net())
    with torch.no_grad():
        network.first[0].weight[3] = 0  # type: ignore[index]
        network.first[0].weight[4] *= 1e-12  # type: ignore[index]
        network.first[1].bias[3:5] = 0.7  # type: ignore[index]
    images = part(120, seed=5).images
    for per_channel in (True, False):
        fp32, int8 = int8_of(network, replace(MINMAX, per_channel=per_channel))
        ours, theirs = run(open_session(int8), images), run(open_session(fp32), images)
        assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.1 * theirs.std()


def test_layers_that_are_told_to_stay_float_do() -> None:
    layers = plan_of(onnx.load_model_from_string(small_onnx()).graph).layers
    images = part(60, seed=5).images
    fp32 = run(open_session(small_onnx()), images)
    errors = []
    for num_float in range(len(layers) + 1):
        content = source().written(replace(MINMAX, float_layers=layers[:num_float]))
        weights = [values for values in tensors(read_model(content)).values() if values.dtype == np.int8]
        assert len(weights) == len(layers) - num_float
        errors.append(np.sqrt(np.mean((run(open_session(content), images) - fp32) ** 2)) / fp32.std())
    # all float but for the stored half of the outer weights
    assert errors[-1] < 1e-3 < errors[0]


def test_a_network_without_inner_layers_has_nothing_to_turn_into_integers() -> None:
    content = collect_ranges(toy().candidate, toy().images[:20]).written(MINMAX)
    np.testing.assert_allclose(
        run(open_session(content), toy().images[:50]), run(open_session(toy().candidate), toy().images[:50]), atol=0.02
    )


def test_hidden_matrices_become_integers_too() -> None:
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
    images = part(60, seed=5).images
    ours, theirs = run(open_session(int8), images), run(open_session(fp32), images)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.05 * theirs.std()


def test_a_pool_between_integers_moves_them() -> None:
    network = nn.Sequential(SmallNet().stem, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    network.extend([nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6)])
    torch.manual_seed(0)
    model = read_model(int8_of(network.eval())[1])
    (pool,) = [node for node in model.graph.node if node.op_type == "MaxPool"]
    scales = tensors(model)
    assert scales[f"{pool.output[0]}.s"] == scales[pool.input[0].removesuffix(".dq") + ".s"]


def test_the_file_says_how_it_was_made_and_with_which_images() -> None:
    said = {entry.key: entry.value for entry in read_model(source().written(MINMAX)).metadata_props}
    made = json.loads(said["int8"])
    assert made["form"] == "minmax, per channel, balanced"
    assert made["float_layers"] == []
    images = part(120, seed=2).images[:]
    assert made["calibration"] == {"num_images": 120, "sha256": hashlib.sha256(images.tobytes()).hexdigest()}
    assert json.loads(said["class_names"]) == list(TASK.class_names)


def test_int8_is_a_third_of_the_size_where_weights_are_most_of_it() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 6))
    fp32, int8 = int8_of(network)
    assert len(fp32) > 3 * len(int8)


# the search


def test_calibration_takes_as_many_images_of_every_class_as_there_are() -> None:
    label_N = np.array([0] * 50 + [1] * 3 + [2] * 10)
    counts = np.bincount(label_N[balanced(label_N, 20)])
    assert counts.tolist() == [9, 3, 8] or counts.tolist() == [8, 3, 9]
    assert np.bincount(label_N[balanced(label_N, 9)]).tolist() == [3, 3, 3]
    assert len(balanced(label_N, 1000)) == 63


def test_the_search_tries_every_form_and_chooses_by_the_worst_group() -> None:
    told: list[QuantisationTrial] = []
    content, trials = search_int8(
        small_onnx(), part(120, seed=2), part(600, seed=3), TASK.groups, told.append, tolerated_loss=1
    )
    assert len(trials) == len(told) == 2 * len(RULES)
    (chosen,) = [trial for trial in trials if trial.chosen]
    assert chosen.worst_group in TASK.groups.names
    assert (chosen.worst_group_loss, chosen.kl) == min((trial.worst_group_loss, trial.kl) for trial in trials)
    assert chosen.float_layers == ()
    said = {entry.key: entry.value for entry in read_model(content).metadata_props}
    assert json.loads(said["int8"])["form"] == chosen.configuration
    assert [trial.model_copy(update={"chosen": False}) for trial in trials] == told


@pytest.mark.slow
def test_a_layer_that_breaks_goes_back_to_float() -> None:
    network = copy.deepcopy(small_net())
    with torch.no_grad():
        # one channel of the inner map a thousand times as large, and the next layer that undoes it: the common scale
        # of the map has no steps left for the others
        network.first[1].weight[0] *= 1000  # type: ignore[index]
        network.first[1].bias[0] *= 1000  # type: ignore[index]
        network.second[0].weight[:, 0] /= 1000  # type: ignore[index]
    fp32 = to_onnx(network, TASK)
    content, trials = search_int8(fp32, part(120, seed=2), part(600, seed=3), TASK.groups)
    flat = [trial for trial in trials if not trial.float_layers]
    assert min(trial.worst_group_loss for trial in flat) > 0.005
    (chosen,) = [trial for trial in trials if trial.chosen]
    assert 1 <= len(chosen.float_layers) < 4
    assert chosen.worst_group_loss <= 0.005
    assert [len(trial.float_layers) for trial in trials[len(flat) :]] == [1, 2][: len(trials) - len(flat)]
    certify = part(600, seed=9)
    kept = (run(open_session(content), certify.images).argmax(axis=1) == certify.label_N).mean()
    before = (run(open_session(fp32), certify.images).argmax(axis=1) == certify.label_N).mean()
    assert kept > before - 0.02


def test_equal_searches_give_equal_bytes() -> None:
    def found() -> bytes:
        return search_int8(small_onnx(), part(60, seed=2), part(60, seed=3), TASK.groups)[0]

    assert found() == found()


def test_the_file_that_was_given_is_read_only() -> None:
    fp32 = small_onnx()
    ranges = {name: whole(spread) for name, spread in _spreads_of(fp32).items()}
    before = bytes(fp32)
    quantise(fp32, ranges, per_channel=True)
    assert fp32 == before
    kinds = {tensor.data_type for tensor in onnx.load_model_from_string(fp32).graph.initializer}
    assert TensorProto.INT8 not in kinds


def _spreads_of(fp32: bytes) -> dict[str, ActivationHistogram]:
    return activation_histograms(fp32, plan_of(onnx.load_model_from_string(fp32).graph).stored, part(30, seed=2).images)
