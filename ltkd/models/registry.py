"""Networks by name, weights from elsewhere, and what turns pixels into a network's input.

A name is one of four forms:

    resnet20                   a network of the distillation benchmarks, a key of MODELS
    torchvision/resnet18       any classifier of torchvision
    timm/vit_tiny_patch16_224  any model of timm, which the extra ltkd[timm] installs
    package.module:function    your own: function(num_classes) gives a torch.nn.Module

Every network takes normalised float images [N, 3, S, S] and gives logits [N, C]. None comes with trained weights; those
are filled in by ``load_weights``.
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
_KEYS = ("state_dict", "model", "network")  # where training scripts put the state dict in their checkpoints
_EXPECTED_IN_A_PICKLE = (
    f"tensors by name, alone or below {', '.join(_KEYS[:-1])} or {_KEYS[-1]}; "
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
    """What builds a network of that name for a number of classes.

    A name of your own imports the module it names, so a run's configuration is to be trusted like code.

    Raises:
        UsageError: Nothing has that name, or what it names cannot be imported.
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
    """A freshly initialised network; the caller's random state is left as it was.

    Raises:
        UsageError: As in ``model_builder``; or your own function gave something that is no network.
    """
    with seeded(seed):
        return model_builder(name)(num_classes)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random draws on the CPU that depend on the seed alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too, for the caller as well
        yield


def _torchvision_model(entry: str) -> Builder:
    models = _library("torchvision.models", "torchvision", "train")
    known = models.list_models(module=models)
    if entry not in known:
        raise UsageError(f"torchvision has no classifier '{entry}'{_similar(entry, known)}.")
    # in training these two would give three logits instead of one; their old initialisation must be asked for
    extra = {"aux_logits": False, "init_weights": True} if entry in ("googlenet", "inception_v3") else {}
    return lambda num_classes: models.get_model(entry, weights=None, num_classes=num_classes, **extra)


def _timm_model(entry: str) -> Builder:
    timm = _library("timm", "timm", "timm")
    known = timm.list_models()
    if entry not in known:
        # create_model would download what hf-hub:NAME describes, and ignore the weights that NAME.TAG stands for
        untagged = re.split("[.:]", entry)[0]
        tagged = "; give a name without a tag of weights or a place" if untagged != entry else ""
        raise UsageError(f"timm has no model '{entry}'{_similar(untagged, known)}{tagged}.")
    return lambda num_classes: timm.create_model(entry, pretrained=False, num_classes=num_classes)


def _library(module: str, package: str, extra: str) -> ModuleType:
    """A library that only some names need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as reason:
        needed = (reason.name or package).partition(".")[0]
        raise UsageError(
            f"models named {package}/NAME need {needed}, which is not installed: pip install 'ltkd[{extra}]'"
        ) from None


def _own_function(name: str, module_name: str, function_name: str) -> Callable[[int], object]:
    """What ``package.module:function`` names, found in the current directory or among the installed packages."""
    with _importable(Path.cwd()):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as reason:
            if reason.name is not None and f"{module_name}.".startswith(f"{reason.name}."):
                raise UsageError(
                    f"model '{name}': there is no module '{reason.name}' in {Path.cwd()} or among the installed "
                    "packages; start in the folder that holds it, or install it."
                ) from None
            raise UsageError(f"model '{name}': {module_name} needs {reason.name}, which is not installed.") from None
    if not hasattr(module, function_name):
        raise UsageError(
            f"model '{name}': {module.__file__ or module_name} has no '{function_name}'"
            f"{_similar(function_name, vars(module))}."
        )
    found = getattr(module, function_name)
    if not callable(found):
        raise UsageError(
            f"model '{name}': '{function_name}' is of type {type(found).__name__}, expected a function that takes the "
            "number of classes and gives a torch.nn.Module."
        )
    return found  # type: ignore[no-any-return]


def _build_own(name: str, function: Callable[[int], object], num_classes: int) -> nn.Module:
    with _importable(Path.cwd()):
        network = function(num_classes)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model '{name}' gave a value of type {type(network).__name__}, expected a torch.nn.Module that takes "
            "images [N, 3, S, S] and gives logits."
        )
    return network


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """A folder as the first place to import from; the command ``ltkd`` does not look in the current directory."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _similar(name: str, known: Collection[str]) -> str:
    """A question after an unknown name, or nothing."""
    longer = [candidate for candidate in known if name and candidate.startswith(name)]
    close = (longer or difflib.get_close_matches(name, known))[:3]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill a network with trained weights from a ``.safetensors`` file or a state dict that torch saved.

    A torch file may hold the state dict itself or have it below ``state_dict``, ``model`` or ``network``, as training
    scripts save it; the prefix ``module.`` that data-parallel training leaves is dropped. Only tensors are
    unpickled. The network is filled whole or, on an error, not at all.

    Raises:
        UsageError: The file is missing, damaged, holds code, or is of another network.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file; give the weights as .safetensors or as a state dict saved by torch.")
    tensors = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    expected = network.state_dict()
    prefix = "module."
    if all(name.startswith(prefix) for name in tensors) and not all(name.startswith(prefix) for name in expected):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    # older versions of torch did not count batches; nothing is computed from the count
    missing = [name for name in expected if name not in tensors and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} {list(tensor.shape)} for {list(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    differing = {"missing": missing, "not expected": unexpected, "of another shape": shapes}
    if any(differing.values()):
        found = "; ".join(f"{len(names)} {how}, first {names[0]}" for how, names in differing.items() if names)
        raise UsageError(
            f"{path} is of another network: of {len(expected)} tensors {found}. "
            "The architecture and the number of classes must be those that it was trained with."
        )
    network.load_state_dict(tensors, strict=False)  # only counts of batches can be missing by now


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as reason:
        problem = str(reason).splitlines()[0]
        raise UsageError(f"{path} is no whole safetensors file ({problem}); copy or save it again.") from None


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """A state dict that ``torch.save`` wrote, alone or inside a checkpoint."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of forms that it may refuse, and then refuses them
            content = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as reason:
        asked = re.search(r"GLOBAL ([\w.]+)", str(reason))
        if asked:
            raise UsageError(
                f"{path} holds {asked[1]}, and only tensors are read from a pickle, because the rest can run code. "
                "Where it was trained, save the tensors alone: torch.save(network.state_dict(), path)"
            ) from None
        problem = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
        raise UsageError(f"{path} is no whole file of torch ({problem}); copy or save it again.") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds a {type(content).__name__}, expected {_EXPECTED_IN_A_PICKLE}")
    content = next((content[key] for key in _KEYS if isinstance(content.get(key), Mapping)), content)
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        names = shorten(", ".join(map(str, content)) or "nothing", 60)
        raise UsageError(f"{path} holds a dict of {names}, expected {_EXPECTED_IN_A_PICKLE}")
    return dict(content)


class Normalise(nn.Module):
    """Pixels to network input: uint8 [N, S, S, 3] to float32 [N, 3, S, S] with one multiply and one add."""

    scale: Tensor
    shift: Tensor

    def __init__(self, task: Task) -> None:
        super().__init__()
        mean, std = torch.tensor(task.mean).view(1, 3, 1, 1), torch.tensor(task.std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, pixels_NSS3: Tensor) -> Tensor:
        """Normalised images, channels last in memory."""
        return pixels_NSS3.permute(0, 3, 1, 2).to(self.scale.dtype) * self.scale + self.shift
