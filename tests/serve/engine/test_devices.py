"""Which device each engine process runs on; the number of GPUs is an argument."""

import pytest

from ltkd.errors import DeviceError, UsageError
from serve.engine.devices import engine_devices, parse_device


@pytest.mark.parametrize("kind", ["cuda", "auto"])
def test_there_is_one_process_for_each_gpu_by_default_and_any_multiple_on_request(kind: str) -> None:
    assert engine_devices(kind, None, 1) == [f"{kind}:0"]
    assert engine_devices(kind, None, 3) == [f"{kind}:0", f"{kind}:1", f"{kind}:2"]
    assert engine_devices(kind, 4, 2) == [f"{kind}:0", f"{kind}:1", f"{kind}:0", f"{kind}:1"]
    assert engine_devices(kind, 3, 1) == [f"{kind}:0"] * 3


@pytest.mark.parametrize(("processes", "num_gpus"), [(1, 2), (3, 2), (5, 4)])
def test_processes_that_cannot_be_divided_equally_are_an_error(processes: int, num_gpus: int) -> None:
    message = f"{processes} processes cannot be divided equally among {num_gpus} GPUs; give a multiple of {num_gpus}"
    with pytest.raises(UsageError, match=message):
        engine_devices("cuda", processes, num_gpus)


def test_one_gpu_by_its_index_runs_all_processes() -> None:
    assert engine_devices("cuda:1", None, 2) == ["cuda:1"]
    assert engine_devices("cuda:1", 3, 2) == ["cuda:1"] * 3


def test_an_index_without_a_gpu_is_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(DeviceError, match="asked for cuda:2, but there are 2 GPUs, cuda:0 to cuda:1; choose one"):
        engine_devices("cuda:2", None, 2)
    with pytest.raises(DeviceError, match="asked for cuda:1, but there is 1 GPU, cuda:0; choose"):
        engine_devices("cuda:1", None, 1)


def test_a_cpu_has_one_process_by_default_and_auto_without_a_gpu_is_the_cpu() -> None:
    assert engine_devices("cpu", None, 4) == ["cpu"]
    assert engine_devices("auto", 2, 0) == ["cpu", "cpu"]
    assert engine_devices("cuda", None, 0) == ["cuda"]  # the engine process reports why CUDA does not work


@pytest.mark.parametrize("device", ["tpu", "cpu:1", "cuda:", "cuda:-1", "cuda:x", "CUDA", "", "cuda:0 "])
def test_another_device_is_an_error_with_the_choices(device: str) -> None:
    with pytest.raises(UsageError, match="choose auto, cpu, cuda or one GPU, such as cuda:0"):
        parse_device(device)
