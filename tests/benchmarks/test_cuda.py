"""The functions of benchmarks/cuda.py on a CPU: the same calls without CUDA graphs."""

import numpy as np
import onnxruntime as ort
import pytest
from serve_toys import SIZE_PX, toy_bundle, toy_pixels

from benchmarks.cuda import fixed_memory_runner, measure_workload, speeds, table
from benchmarks.serving import WorkloadInputs
from benchmarks.workload_specs import Workload
from ltkd.contract.bundle import open_bundle
from ltkd.errors import DeviceError
from serve.engine.session import CPU, num_cuda_devices, open_engine


def test_a_runner_with_fixed_memory_gives_the_logits_of_each_batch() -> None:
    engine = open_engine(open_bundle(toy_bundle()), "cpu")
    batches = [np.stack([toy_pixels(seed) for seed in seeds]) for seeds in ((1, 2), (3, 4))]
    run = fixed_memory_runner(engine.session, 2, (SIZE_PX, SIZE_PX, 3), len(engine.manifest.task.class_names), "cpu")
    for batch_NSS3 in batches:
        np.testing.assert_array_equal(run(batch_NSS3), engine.session.run(["logits"], {"image": batch_NSS3})[0])


def test_every_batch_size_is_measured_in_every_way_and_in_the_table() -> None:
    engine = open_engine(open_bundle(toy_bundle()), "cpu", max_batch=32)
    found = speeds(engine, engine.session, toy_pixels(1)[None], seconds=0.001, device="cpu")
    assert list(found) == [1, 2, 4, 8, 16, 32]
    assert all(set(ways) == {"loop", "bound", "graph"} and min(ways.values()) > 0 for ways in found.values())
    markdown = table("toy", {"provider": CPU, "images_per_s": found, "served_per_s": 10.0})
    assert len([line for line in markdown.splitlines() if line.startswith("| ")]) == 7


def test_a_graph_with_other_logits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(open_bundle(toy_bundle()), "cpu", max_batch=32)
    monkeypatch.setattr(ort.OrtValue, "update_inplace", lambda *_: None)  # like a graph that ignores new input
    with pytest.raises(ValueError, match="the graph's logits differ"):
        speeds(engine, engine.session, toy_pixels(1)[None], seconds=0.001, device="cpu")


@pytest.mark.skipif(num_cuda_devices() > 0, reason="there is a GPU")
def test_without_cuda_the_error_gives_the_reason() -> None:
    workload = Workload("toy", SIZE_PX, "image/png", (SIZE_PX, SIZE_PX))
    folder = toy_bundle().parent
    inputs = WorkloadInputs(workload, folder, [])
    (folder / "same").symlink_to(toy_bundle())
    try:
        with pytest.raises(DeviceError, match="asked for cuda"):
            measure_workload(inputs, 0.001)
    finally:
        (folder / "same").unlink()
