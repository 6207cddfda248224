"""The devices of engine processes: which GPUs there are, and how the processes are divided among them.

The server process uses this module too, so it does not import ONNX Runtime.
"""

import ctypes
import re
import sys
from functools import cache

from ltkd.errors import DeviceError, UsageError

_DEVICE = re.compile(r"(auto|cpu|cuda)|(auto|cuda):(\d{1,3})")
DEVICE_CHOICES = "auto, cpu, cuda or one GPU, such as cuda:0"


def parse_device(device: str) -> tuple[str, int | None]:
    """Split a device into its kind and the index of the GPU, None without one.

    Raises:
        UsageError: It is not a device.
    """
    parts = _DEVICE.fullmatch(device)
    if not parts:
        raise UsageError(f"the device is '{device}'; choose {DEVICE_CHOICES}.")
    return (parts[1], None) if parts[1] else (parts[2], int(parts[3]))


def engine_devices(device: str, processes: int | None, num_gpus: int) -> list[str]:
    """The device of each engine process of a model version.

    Args:
        device: ``cuda`` and ``auto`` use all GPUs, ``cuda:1`` only that one. Without a GPU, ``auto`` is the CPU.
        processes: How many processes; None is one for each GPU, or one on a CPU.
        num_gpus: How many GPUs are visible.

    Returns:
        ``cpu``, or ``cuda:INDEX`` and ``auto:INDEX``; the second allows the CPU if CUDA does not work.

    Raises:
        UsageError: The processes cannot be divided equally among the GPUs.
        DeviceError: There is no such GPU.
    """
    kind, index = parse_device(device)
    if kind == "cpu" or not num_gpus:
        return ["cpu" if kind == "auto" else device] * (processes or 1)  # the engine reports why there is no CUDA
    if index is not None:
        require_gpu(index, num_gpus)
        return [device] * (processes or 1)
    processes = processes or num_gpus
    if processes % num_gpus:
        raise UsageError(
            f"{processes} processes cannot be divided equally among {num_gpus} GPUs; give a multiple of {num_gpus}, "
            "or choose one GPU, such as --device cuda:0."
        )
    return [f"{kind}:{number % num_gpus}" for number in range(processes)]


def require_gpu(index: int, num_gpus: int) -> None:
    """Raise a DeviceError unless there is a GPU with this index."""
    if index >= num_gpus:
        have = "is 1 GPU, cuda:0" if num_gpus == 1 else f"are {num_gpus} GPUs, cuda:0 to cuda:{num_gpus - 1}"
        raise DeviceError(f"asked for cuda:{index}, but there {have}; choose one of them, or cuda for all.")


@cache
def num_cuda_devices() -> int:
    """How many NVIDIA GPUs the driver reports; 0 without a driver. ONNX Runtime would log an error without one."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value
