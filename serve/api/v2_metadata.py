"""What the Open Inference Protocol says of servers and models.

A model's inputs are alternatives, which the protocol's metadata cannot say; Triton's model configuration calls them
optional.
"""

import ltkd
from ltkd.contract.records import Record
from ltkd.contract.task import Task
from serve.api.v2_tensors import FILES, LOGITS, PIXELS

PLATFORM = "onnxruntime_onnx"


class ServerMetadata(Record):
    """Which server this is, and which extensions of the protocol it has."""

    name: str = "ltkd"
    version: str = ltkd.__version__
    extensions: tuple[str, ...] = ("binary_tensor_data", "classification", "model_configuration")


class Live(Record):
    """The process answers."""

    live: bool = True


class ServerReady(Record):
    """Requests are taken."""

    ready: bool = True


class ModelReady(Record):
    """The model takes requests."""

    name: str
    ready: bool = True


class TensorMetadata(Record):
    """One input or output; -1 stands for the number of images."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(Record):
    """What a model takes and gives. A request has one of the inputs."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class IndexEntry(Record):
    """One version of a model in the index of the repository."""

    name: str
    version: str
    state: str = "READY"
    reason: str = ""


class Reshape(Record):
    """The shape that a tensor really has, without the number of images."""

    shape: tuple[int, ...]


class TensorConfig(Record):
    """One input or output in the words of Triton's model configuration."""

    name: str
    data_type: str
    format: str = "FORMAT_NONE"
    dims: tuple[int, ...]
    reshape: Reshape | None = None
    optional: bool = False


class ModelConfig(Record):
    """A model in the words of Triton's model configuration."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: tuple[TensorConfig, ...]
    output: tuple[TensorConfig, ...]


def metadata_of(task: Task, name: str, versions: tuple[str, ...]) -> ModelMetadata:
    """What a model takes and gives."""
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
    """The same in the words of Triton's model configuration."""
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
