"""Metadata of the server and the models in the formats of the Open Inference Protocol and of Triton.

A request has exactly one of a model's two inputs. The metadata of the protocol cannot express that; Triton's model
configuration marks the inputs as optional.
"""

from typing import Literal

import ltkd
from ltkd.contract.records import Record
from ltkd.contract.task import Task
from serve.api.v2_tensors import FILES, LOGITS, PIXELS

PLATFORM = "onnxruntime_onnx"


class ServerMetadata(Record):
    """Name and version of the server, and the extensions of the protocol that it supports."""

    name: str = "ltkd"
    version: str = ltkd.__version__
    extensions: tuple[str, ...] = ("binary_tensor_data", "classification", "model_configuration")


class Live(Record):
    """The server process is running."""

    live: bool = True


class ServerReady(Record):
    """At least one model answers."""

    ready: bool = True


class ModelReady(Record):
    """The model answers."""

    name: str
    ready: bool = True


class TensorMetadata(Record):
    """One input or output; -1 stands for the number of images."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(Record):
    """The inputs and outputs of a model. A request has exactly one of the inputs."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class IndexEntry(Record):
    """One version of a model in the index of the repository; the reason says why it is not ready."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class Reshape(Record):
    """The actual shape of a tensor per image, if it differs from ``dims``."""

    shape: tuple[int, ...]


class TensorConfig(Record):
    """One input or output in the format of Triton's model configuration."""

    name: str
    data_type: str
    format: str = "FORMAT_NONE"
    dims: tuple[int, ...]
    reshape: Reshape | None = None
    optional: bool = False


class ModelConfig(Record):
    """A model in the format of Triton's model configuration."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: tuple[TensorConfig, ...]
    output: tuple[TensorConfig, ...]


def metadata_of(task: Task, name: str, versions: tuple[str, ...]) -> ModelMetadata:
    """Describe the inputs and outputs of a model."""
    return ModelMetadata(
        name=name,
        versions=versions,
        platform=PLATFORM,
        inputs=(
            TensorMetadata(name=PIXELS, datatype="UINT8", shape=(-1, task.input_px, task.input_px, 3)),
            TensorMetadata(name=FILES, datatype="BYTES", shape=(-1,)),
        ),
        outputs=(TensorMetadata(name=LOGITS, datatype="FP32", shape=(-1, len(task.class_names))),),
    )


def config_of(task: Task, name: str, max_images: int) -> ModelConfig:
    """Describe a model in the format of Triton's model configuration."""
    pixels = (task.input_px, task.input_px, 3)
    return ModelConfig(
        name=name,
        platform=PLATFORM,
        backend="onnxruntime",
        max_batch_size=max_images,
        input=(
            TensorConfig(name=PIXELS, data_type="TYPE_UINT8", format="FORMAT_NHWC", dims=pixels, optional=True),
            TensorConfig(name=FILES, data_type="TYPE_STRING", dims=(1,), reshape=Reshape(shape=()), optional=True),
        ),
        output=(TensorConfig(name=LOGITS, data_type="TYPE_FP32", dims=(len(task.class_names),)),),
    )
