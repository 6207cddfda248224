"""benchmarks/cuda_networks.py on a CPU: the same calls with the other device."""

from pathlib import Path

import pytest

from benchmarks.cuda_networks import NetworkResult, check_networks, networks_table
from benchmarks.workload_specs import WORKLOADS
from export.conversion.session import cuda_works
from ltkd.contract.node_assignment import NodeAssignment

SMALL = {"resnet8": WORKLOADS["resnet8"]}


@pytest.mark.skipif(cuda_works(), reason="CUDA works here")
def test_each_network_is_exported_and_served_and_its_nodes_are_counted(tmp_path: Path) -> None:
    results = check_networks(SMALL, tmp_path, "auto")
    assert [(result.network, result.precision, result.reason) for result in results] == [
        ("resnet8", "fp32", ""),
        ("resnet8", "fp16", ""),
    ]
    for result in results:
        assert result.nodes is not None
        assert set(result.nodes.num_nodes) == {"CPUExecutionProvider"} and not result.nodes.shape_nodes
    assert networks_table(results).count("CPUExecutionProvider | none |") == 2


@pytest.mark.skipif(cuda_works(), reason="CUDA works here")
def test_a_network_that_is_refused_is_a_result_with_the_reason(tmp_path: Path) -> None:
    (result,) = check_networks(SMALL, tmp_path, "cuda", ["fp32"])
    assert (result.nodes, result.precision) == (None, "fp32")
    assert "asked for CUDAExecutionProvider" in result.reason
    assert f"| resnet8 | fp32 | refused: {result.reason} |" in networks_table([result])


def test_the_table_names_the_nodes_that_compute_shapes_elsewhere() -> None:
    nodes = NodeAssignment(
        num_nodes={"CUDAExecutionProvider": 9, "CPUExecutionProvider": 1}, shape_nodes=("a (Concat)",)
    )
    assert "9 CUDAExecutionProvider | a (Concat) |" in networks_table([NetworkResult("vit", "fp16", nodes)])
