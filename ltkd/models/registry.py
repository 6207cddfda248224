"""Build networks by name, load their weights from a file, and normalise their input.

A name has one of four forms:

    resnet20                   a network of the distillation benchmarks, a key of MODELS
    torchvision/resnet18       any classifier of torchvision
    timm/vit_tiny_patch16_224  any model of timm, which the extra ltkd[timm] installs
    package.module:function    your own: function(num_classes) returns a torch.nn.Module

Every network takes normalised float images [N, 3, S, S] and returns logits [N, C]. Networks are built without trained
weights; ``load_weights`` loads them.
"""

import difflib
import importlib
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ltkd.contract.task import Task
from ltkd.errors import UsageError
from ltkd.models.cifar import MobileNetV2, WideResNet, resnet, resnet50, shufflenet_v1

Builder = Callable[[int], nn.Module]

_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)
_KEYS = ("state_dict", "model", "network")  # keys under which training scripts store the state dict in a checkpoint
_EXPECTED_IN_A_PICKLE = (
    f"tensors by name, at the top level or under {', '.join(_KEYS[:-1])} or {_KEYS[-1]}; "
    "save them with: torch.save(network.state_dict(), path)"
)

MODELS: dict[str, Builder] = {
    **{f"resnet{depth}": partial(resnet, depth=depth, widths=_NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(resnet, depth=depth, widths=_WIDE) for depth in (8, 32)},
    **{f"wrn_{depth}_{k}": partial(WideResNet, depth=depth, widening=k) for depth in (16, 40) for k in (1, 2)},
    "resnet50": resnet50,
    "shufflenetv1": shufflenet_v1,
    "mobilenetv2": MobileNetV2,
}


def model_builder(name: str) -> Builder:
    """Find the function that builds the named network for a number of classes.

    A name of the form ``package.module:function`` imports that module, so only use run configurations that you would
    trust as code.

    Raises:
        UsageError: The name is unknown, or its module or function cannot be imported.
    """
    if name in MODELS:
        return MODELS[name]
    library, _, entry = name.partition("/")
    if library == "torchvision" and entry:
        return _torchvision_model(entry)
    if library == "timm" and entry:
        return _timm_model(entry)
    module, colon, function = name.partition(":")
    if module and colon and function:
        return partial(_build_own, name, _own_function(name, module, function))
    raise UsageError(
        f"unknown model '{name}'{_similar(name, MODELS)}; known: {', '.join(MODELS)}; "
        "torchvision/NAME; timm/NAME; or your own as package.module:function."
    )


def build_network(name: str, num_classes: int, seed: int) -> nn.Module:
    """Build a network with random weights; the caller's random state does not change.

    Raises:
        UsageError: As in ``model_builder``, or your own function returned something other than a network.
    """
    with seeded(seed):
        return model_builder(name)(num_classes)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random draws on the CPU inside the context; the caller's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also change the state of the GPUs
        yield


def _torchvision_model(entry: str) -> Builder:
    models = _library("torchvision.models", "torchvision", "train")
    known = models.list_models(module=models)
    if entry not in known:
        raise UsageError(f"torchvision has no classifier '{entry}'{_similar(entry, known)}.")
    # in training mode these two return auxiliary logits by default; without init_weights they warn
    extra = {"aux_logits": False, "init_weights": True} if entry in ("googlenet", "inception_v3") else {}
    return lambda num_classes: models.get_model(entry, weights=None, num_classes=num_classes, **extra)


def _timm_model(entry: str) -> Builder:
    timm = _library("timm", "timm", "timm")
    known = timm.list_models()
    if entry not in known:
        # create_model would download hf-hub:NAME, and ignore the weights named by the tag of NAME.TAG
        untagged = re.split("[.:]", entry)[0]
        hint = "; give the name without a tag or a hub prefix" if untagged != entry else ""
        raise UsageError(f"timm has no model '{entry}'{_similar(untagged, known)}{hint}.")
    return lambda num_classes: timm.create_model(entry, pretrained=False, num_classes=num_classes)


def _library(module: str, package: str, extra: str) -> ModuleType:
    """Import a library that only some names need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as reason:
        missing = (reason.name or package).partition(".")[0]
        raise UsageError(
            f"models named {package}/NAME need {missing}, which is not installed: pip install 'ltkd[{extra}]'"
        ) from None


def _own_function(name: str, module_name: str, function_name: str) -> Callable[[int], object]:
    """The function of ``package.module:function``, from the current directory or the installed packages."""
    with _importable(Path.cwd()):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as reason:
            if reason.name is not None and f"{module_name}.".startswith(f"{reason.name}."):
                raise UsageError(
                    f"model '{name}': there is no module '{reason.name}' in {Path.cwd()} or among the installed "
                    "packages; run the command in the folder that contains it, or install it."
                ) from None
            raise UsageError(f"model '{name}': {module_name} needs {reason.name}, which is not installed.") from None
    if not hasattr(module, function_name):
        raise UsageError(
            f"model '{name}': {module.__file__ or module_name} has no '{function_name}'"
            f"{_similar(function_name, vars(module))}."
        )
    function = getattr(module, function_name)
    if not callable(function):
        raise UsageError(
            f"model '{name}': '{function_name}' is of type {type(function).__name__}, expected a function that takes "
            "the number of classes and returns a torch.nn.Module."
        )
    return function  # type: ignore[no-any-return]


def _build_own(name: str, function: Callable[[int], object], num_classes: int) -> nn.Module:
    with _importable(Path.cwd()):
        network = function(num_classes)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model '{name}' returned a value of type {type(network).__name__}, expected a torch.nn.Module that takes "
            "images [N, 3, S, S] and returns logits."
        )
    return network


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Import from a folder first; without this, the command ``ltkd`` does not import from the current directory."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _similar(name: str, known: Collection[str]) -> str:
    """A suggestion to append to an unknown name; empty if no known name is similar."""
    longer = [candidate for candidate in known if name and candidate.startswith(name)]
    close = (longer or difflib.get_close_matches(name, known))[:3]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def load_weights(network: nn.Module, path: Path) -> None:
    """Load trained weights from a ``.safetensors`` file or a state dict saved by torch.

    A torch file may contain the state dict itself or a checkpoint with it under ``state_dict``, ``model`` or
    ``network``. The prefix ``module.`` of data-parallel training is removed. Only tensors are unpickled. On an error
    the network does not change.

    Raises:
        UsageError: The file is missing or damaged, contains code, or belongs to another network.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give the weights as .safetensors or as a state dict saved by torch.")
    tensors = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    expected = network.state_dict()
    prefix = "module."
    if all(name.startswith(prefix) for name in tensors) and not all(name.startswith(prefix) for name in expected):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    # older versions of torch did not store this count, and no result depends on it
    missing = [name for name in expected if name not in tensors and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    differing = {"are missing": missing, "are unexpected": unexpected, "have another shape": shapes}
    if any(differing.values()):
        differences = "; ".join(f"{len(names)} {how}, first {names[0]}" for how, names in differing.items() if names)
        raise UsageError(
            f"{path} belongs to another network: of {len(expected)} tensors, {differences}. "
            "Use the architecture and the number of classes that it was trained with."
        )
    network.load_state_dict(tensors, strict=False)  # only batch counts can be missing here


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as reason:
        problem = str(reason).splitlines()[0]
        raise UsageError(f"{path} is not a complete safetensors file ({problem}); copy or save it again.") from None


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """Read a state dict written by ``torch.save``, alone or inside a checkpoint."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns before it rejects some formats
            content = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as reason:
        rejected = re.search(r"GLOBAL ([\w.]+)", str(reason))
        if rejected:
            raise UsageError(
                f"{path} contains {rejected[1]}, but only tensors are read from a pickle, because other objects can "
                "run code. In the code that trained it, save only the tensors: "
                "torch.save(network.state_dict(), path)"
            ) from None
        problem = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
        raise UsageError(f"{path} is not a complete torch file ({problem}); copy or save it again.") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} contains a {type(content).__name__}, expected {_EXPECTED_IN_A_PICKLE}")
    content = next((content[key] for key in _KEYS if isinstance(content.get(key), Mapping)), content)
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        names = shorten(", ".join(map(str, content)) or "nothing", 60)
        raise UsageError(f"{path} contains a dict of {names}, expected {_EXPECTED_IN_A_PICKLE}")
    return dict(content)


class Normalise(nn.Module):
    """Turn pixels into network input: uint8 [N, S, S, 3] to float32 [N, 3, S, S], with one multiply and one add."""

    scale: Tensor
    shift: Tensor

    def __init__(self, task: Task) -> None:
        super().__init__()
        mean, std = torch.tensor(task.mean).view(1, 3, 1, 1), torch.tensor(task.std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, pixels_NSS3: Tensor) -> Tensor:
        """The normalised images, in channels-last memory format."""
        return pixels_NSS3.permute(0, 3, 1, 2).to(self.scale.dtype) * self.scale + self.shift
