"""Write a bundle as a model repository for NVIDIA Triton Inference Server.

    OUT/NAME_PRECISION/config.pbtxt   input, labels, batching, warm-up
    OUT/NAME_PRECISION/labels.txt     one class name per line, in the order of the logits
    OUT/NAME_PRECISION/1/model.onnx   the certified file, unchanged

Every precision becomes a separate model, which runs on the kind of device on which it was certified. A repository is
written and replaced as a whole. A directory with anything else in it is not replaced.
"""

import re
from pathlib import Path

from export.conversion.session import CUDA, INPUT, OUTPUT
from ltkd.contract.bundle import Bundle, CertifiedModel, Precision
from ltkd.contract.staging import staged
from ltkd.errors import BundleError

CONFIG_FILE, LABEL_FILE, MODEL_FILE = "config.pbtxt", "labels.txt", "1/model.onnx"
MAX_BATCH, PREFERRED_BATCHES = 32, (8, 16, 32)
QUEUE_DELAY_US = 2000
"""How long a request waits for others to join its batch; short compared with the time of a batch of 32 on a CPU."""
_MARK = "# A model repository made from the bundle"


def write_triton(bundle: Bundle, out: Path) -> Path:
    """Write a repository with all precisions of a bundle, completely or not at all.

    Raises:
        BundleError: There is something other than such a repository at ``out``, or the bundle was changed.
    """
    with staged(out, check_replaceable) as stage:
        for precision, model in bundle.manifest.precisions.items():
            folder = stage / model_name(bundle, precision)
            (folder / MODEL_FILE).parent.mkdir(parents=True)
            (folder / MODEL_FILE).write_bytes(bundle.read(model))
            (folder / CONFIG_FILE).write_text(model_config(bundle, precision, model), encoding="utf-8")
            labels = "".join(f"{_single_line(name)}\n" for name in bundle.manifest.task.class_names)
            (folder / LABEL_FILE).write_text(labels, encoding="utf-8")
    return out


def model_name(bundle: Bundle, precision: Precision) -> str:
    """The name of the model in Triton's requests."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", bundle.manifest.name).lstrip(".-") or "model"
    return f"{plain}_{precision}"


def model_config(bundle: Bundle, precision: Precision, model: CertifiedModel) -> str:
    """The config.pbtxt of one precision: protobuf text of Triton's ModelConfig."""
    task = bundle.manifest.task
    side, num_classes = task.input_px, len(task.class_names)
    kind = "KIND_GPU" if model.provider == CUDA else "KIND_CPU"
    preferred = ", ".join(str(size) for size in PREFERRED_BATCHES)
    warm_up = "".join(_warm_up(size, side) for size in (1, MAX_BATCH))
    return f"""\
{_MARK} {_single_line(bundle.manifest.name)}, sha256 {model.sha256}
name: {_quoted(model_name(bundle, precision))}
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: {MAX_BATCH}
input [
  {{ name: "{INPUT}" data_type: TYPE_UINT8 dims: [ {side}, {side}, 3 ] }}
]
output [
  {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ {num_classes} ] label_filename: "{LABEL_FILE}" }}
]
instance_group [
  {{ kind: {kind} count: 1 }}
]
dynamic_batching {{
  preferred_batch_size: [ {preferred} ]
  max_queue_delay_microseconds: {QUEUE_DELAY_US}
}}
{warm_up}"""


def check_replaceable(out: Path) -> None:
    """Check that ``out`` does not exist, or contains nothing but models that this module has written.

    Raises:
        BundleError: Something else is there; the message names it.
    """
    if not out.exists():
        return
    models = sorted(out.iterdir()) if out.is_dir() else [out]
    foreign = next((model for model in models if not _is_from_bundle(model)), None)
    if foreign is not None:
        raise BundleError(
            f"{foreign} was not written from a bundle, so {out} is not replaced; give another directory. "
            "Triton accepts several: --model-repository A --model-repository B."
        )


def _is_from_bundle(model: Path) -> bool:
    try:
        return (model / CONFIG_FILE).read_text(encoding="utf-8").startswith(_MARK)
    except (OSError, UnicodeDecodeError):
        return False


def _warm_up(batch: int, side: int) -> str:
    return f"""\
model_warmup {{
  name: "batch of {batch}"
  batch_size: {batch}
  inputs {{ key: "{INPUT}" value {{ data_type: TYPE_UINT8 dims: [ {side}, {side}, 3 ] zero_data: true }} }}
}}
"""


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _single_line(text: str) -> str:
    """Replace line breaks, which would shift all later labels in the file, and other white space with spaces."""
    return " ".join(text.split())
