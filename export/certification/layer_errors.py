"""Layers of an ONNX file: which there are, and in which of them a candidate differs from its reference.

Shape legend: N images, S side in pixels.
"""

from collections.abc import Mapping, Sequence
from statistics import median_low

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from export.conversion.graph import FLOAT, FLOAT16, WEIGHTED, copy_of, layers_of, users_of, weighted_nodes
from export.conversion.session import INPUT, open_session
from export.schema import LayerError

ROUNDING_SHARE = 1e-4
ROUNDING_FACTOR = 5
DAMAGED_SHARE = 0.5
MOST = 1e3
"""The largest error that is told; it also stands for values that are not finite."""

Map = NDArray[np.float32]


def find_layer_errors(reference: bytes, candidate: bytes, images_NSS3: NDArray[np.uint8]) -> tuple[LayerError, ...]:
    """Find out how far every layer of a candidate is off when it is given what the reference gives to that layer.

    So no error is passed on, and a damaged layer stands alone. Layers are paired by the names of their maps. Maps that
    int8 stores as integers are compared as stored.

    Args:
        reference: A sound float32 ONNX file of the network.
        candidate: Any other file of it, of any precision.
        images_NSS3: Some images.

    Returns:
        In the order of the graph. None at all where the layers with weights are not the same ones: it is another
        network, or something else than our export gave them their names.
    """
    sound, suspect = onnx.load_model_from_string(reference), onnx.load_model_from_string(candidate)
    ours, theirs = ({node.output[0]: node.op_type for node in weighted_nodes(m.graph)} for m in (sound, suspect))
    if not ours or ours != theirs:
        return ()
    kinds, given = _kinds(sound), {name for node in suspect.graph.node for name in node.output}
    layers = [layer for layer in layers_of(sound.graph) if layer.output in given and kinds[layer.output] == FLOAT]
    maps = _computed(sound, [layer.output for layer in layers], {INPUT: images_NSS3})
    try:
        seen = _each_alone(suspect, maps, images_NSS3)
    except Exception:  # of a dozen types: it does not take the reference's maps, so it is another network
        return ()
    return tuple(
        LayerError(layer=layer.node.name, operator=layer.node.op_type, error=_share(maps[layer.output], own))
        for layer, own in zip(layers, seen, strict=True)
    )


def first_above_rounding(errors: Sequence[LayerError]) -> LayerError | None:
    """The first layer that is much farther off than its like, or None.

    What rounding does depends on the precision, so the yardstick is the middle one of the inner layers with weights,
    which are rounded most; but to be half off is damage.
    """
    inner = [layer.error for layer in errors if layer.operator in WEIGHTED][1:-1]
    usual = ROUNDING_FACTOR * median_low(inner) if inner else 0.0
    rounding = min(max(ROUNDING_SHARE, usual), DAMAGED_SHARE)
    return next((layer for layer in errors if layer.error > rounding), None)


def _each_alone(suspect: ModelProto, maps: Mapping[str, Map], images_NSS3: NDArray[np.uint8]) -> list[Map]:
    """The candidate's own maps, each computed from the given ones; the model is changed for that."""
    graph, kinds, users = suspect.graph, _kinds(suspect), users_of(suspect.graph.node)
    feeds: dict[str, NDArray[np.generic]] = {graph.input[0].name: images_NSS3}
    before: list[NodeProto] = []
    after: list[NodeProto] = []
    wanted = []
    for name, map_ in maps.items():
        given, own, stored = f"{name}.given", name, _as_stored(name, users)
        graph.input.append(helper.make_tensor_value_info(given, FLOAT, map_.shape))
        feeds[given] = map_
        if stored:
            after += stored
            own = stored[-1].output[0]
        if kinds[name] == FLOAT16:
            before.append(helper.make_node("Cast", [given], [f"{given}.half"], to=FLOAT16))
            after.append(helper.make_node("Cast", [own], [f"{own}.float"], to=FLOAT))
            given, own = f"{given}.half", f"{own}.float"
        for node in users.get(name, []):
            node.input[:] = [given if read == name else read for read in node.input]
        wanted.append(own)
    nodes = [copy_of(node) for node in (*before, *graph.node, *after)]
    graph.ClearField("node")
    graph.node.extend(nodes)
    return list(_computed(suspect, wanted, feeds).values())


def _as_stored(name: str, users: Mapping[str, list[NodeProto]]) -> list[NodeProto]:
    """Copies of the two nodes that store a map as integers and read it back; none where it is not stored."""
    for store in users.get(name, []):
        read_back = [node for node in users.get(store.output[0], []) if node.op_type == "DequantizeLinear"]
        if store.op_type == "QuantizeLinear" and read_back:
            own_store, own_map = copy_of(store), copy_of(read_back[0])
            own_store.output[0] = own_map.input[0] = f"{name}.own.q"
            own_map.output[0] = f"{name}.own"
            return [own_store, own_map]
    return []


def _computed(model: ModelProto, names: Sequence[str], feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, Map]:
    """Any float32 tensors of a model, by name."""
    changed = copy_of(model)
    changed.graph.ClearField("output")
    changed.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    session = open_session(changed.SerializeToString())
    return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))


def _kinds(model: ModelProto) -> dict[str, int]:
    """The element type of every tensor that a node gives."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}


def _share(reference: Map, candidate: Map) -> float:
    """Root mean square of the difference, as a share of the reference's own."""
    difference = candidate.astype(np.float64) - reference
    error, size = (float(np.sqrt(np.mean(values**2))) for values in (difference, reference.astype(np.float64)))
    if error == 0:
        return 0.0
    return min(error / size, MOST) if size > 0 and np.isfinite(error) else MOST
