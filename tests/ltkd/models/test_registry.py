import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.task import Task
from ltkd.errors import UsageError
from ltkd.models.registry import MODELS, Normalise, build_network, load_weights, model_builder

OWN_MODULE = """
from torch import nn

HIDDEN = 4

def small(num_classes):
    import own_layers
    return nn.Sequential(nn.Conv2d(3, HIDDEN, 3), own_layers.Mean(), nn.Linear(HIDDEN, num_classes))

def broken(num_classes):
    return [num_classes]

def wrong(num_classes):
    raise ZeroDivisionError
"""
OWN_LAYERS = """
from torch import nn

class Mean(nn.Module):
    def forward(self, image):
        return image.mean((2, 3))
"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory that contains a user's own networks."""
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets" / "tiny.py").write_text(OWN_MODULE)
    (tmp_path / "own_layers.py").write_text(OWN_LAYERS)
    (tmp_path / "own_missing.py").write_text("import library_that_does_not_exist\n")
    monkeypatch.chdir(tmp_path)
    for name in ("own_nets", "own_nets.tiny", "own_layers", "own_missing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_every_name_builds_a_network_for_the_number_of_classes(name: str) -> None:
    with torch.device("meta"):
        assert MODELS[name](7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_the_error_for_an_unknown_network_lists_similar_names_and_the_four_forms() -> None:
    with pytest.raises(
        UsageError,
        match=r"^unknown model 'resnet9' \(did you mean resnet\d+ or .*\?\); known: resnet8, .*mobilenetv2; "
        r"torchvision/NAME; timm/NAME; or your own as package\.module:function\.$",
    ):
        build_network("resnet9", 10, seed=0)


@pytest.mark.parametrize("name", ["", "zzz", "torchvision/", "timm/", ":", "module:", ":function", "keras/resnet50"])
def test_an_incomplete_name_is_an_unknown_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"^unknown model '{name}'.*; known: "):
        model_builder(name)


def test_the_seed_determines_the_weights_and_the_random_state_of_the_caller_does_not_change() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_network("resnet8", 10, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    again, other = (build_network("resnet8", 10, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv.weight"], other["conv.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
def test_the_random_state_of_the_gpu_does_not_change() -> None:
    before = torch.cuda.get_rng_state()
    build_network("resnet8", 10, seed=1)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/shufflenet_v2_x0_5", "timm/resnet10t"])
def test_a_network_of_a_library_is_built_for_the_classes_of_the_task(name: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    network = build_network(name, 7, seed=0)
    again = build_network(name, 7, seed=0)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert torch.equal(next(network.parameters()), next(again.parameters()))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_network_with_auxiliary_classifiers_returns_only_its_logits_in_training(name: str) -> None:
    with torch.device("meta"):
        network = model_builder(f"torchvision/{name}")(7).train()
        assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet19", "torchvision has no classifier 'resnet19' \\(did you mean resnet"),
        ("torchvision/fcn_resnet50", "torchvision has no classifier 'fcn_resnet50'"),  # a segmentation network
        ("timm/resnet19", "timm has no model 'resnet19' \\(did you mean resnet"),
        (
            "timm/resnet18.a1_in1k",
            "timm has no model 'resnet18.a1_in1k' \\(did you mean resnet18 .*; give the name without a tag",
        ),
        ("timm/vit_tiny", "timm has no model 'vit_tiny' \\(did you mean vit_tiny_patch16_"),
        ("timm/hf-hub:someone/something", "timm has no model 'hf-hub:someone/something'"),  # it would be downloaded
    ],
)
def test_the_error_for_a_name_that_a_library_does_not_have_suggests_similar_names(name: str, message: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    with pytest.raises(UsageError, match=f"^{message}"):
        model_builder(name)


@pytest.mark.parametrize(("library", "extra"), [("timm", "timm"), ("torchvision", "train")])
def test_the_error_for_a_missing_library_says_how_to_install_it(
    library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"need {library}, which is not installed: pip install 'ltkd\[{extra}\]'$"):
        model_builder(f"{library}/resnet18")


def test_no_library_is_imported_before_a_name_needs_it() -> None:
    script = "import ltkd.models.registry, sys; print(*{'torchvision', 'timm'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.usefixtures("own_folder")
def test_a_user_defined_network_is_imported_from_the_current_directory() -> None:
    path_before = list(sys.path)
    network = build_network("own_nets.tiny:small", 5, seed=0)
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    assert sys.path == path_before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_net.tiny:small", "there is no module 'own_net' in {folder} or among the installed packages; run the"),
        ("own_nets.tine:small", "there is no module 'own_nets.tine' in {folder}"),
        ("own_missing:small", "own_missing needs library_that_does_not_exist, which is not installed."),
        ("own_nets.tiny:smal", "{folder}/own_nets/tiny.py has no 'smal' (did you mean small?)."),
        ("own_nets.tiny:HIDDEN", "'HIDDEN' is of type int, expected a function"),
    ],
)
def test_the_error_for_a_user_defined_network_says_which_part_of_its_name_is_wrong(
    name: str, message: str, own_folder: Path
) -> None:
    with pytest.raises(UsageError, match=re.escape(f"model '{name}': {message.format(folder=own_folder)}")):
        model_builder(name)


@pytest.mark.usefixtures("own_folder")
def test_the_error_for_a_function_that_does_not_return_a_network_names_the_returned_type() -> None:
    with pytest.raises(
        UsageError, match=r"^model 'own_nets.tiny:broken' returned a value of type list, expected a torch"
    ):
        build_network("own_nets.tiny:broken", 5, seed=0)


@pytest.mark.usefixtures("own_folder")
def test_an_exception_in_a_user_defined_function_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        build_network("own_nets.tiny:wrong", 5, seed=0)


def saved_as(form: str, network: nn.Module, folder: Path) -> Path:
    weights = network.state_dict()
    path = folder / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(weights, path)
        return path
    content: dict[str, object] = {
        "bare": weights,
        "state_dict": {"state_dict": weights, "epoch": 240},
        "model": {"best_acc": 0.42, "model": weights},
        "network": {"network": weights},
        "data-parallel": {"model": nn.DataParallel(network).state_dict()},
        "without counts": {name: value for name, value in weights.items() if not name.endswith("batches_tracked")},
    }
    torch.save(content[form], path)
    return path


@pytest.mark.parametrize(
    "form", ["safetensors", "bare", "state_dict", "model", "network", "data-parallel", "without counts"]
)
def test_weights_are_loaded_from_every_supported_file_format(form: str, tmp_path: Path) -> None:
    trained, network = (build_network("resnet8", 10, seed=seed) for seed in (1, 2))
    load_weights(network, saved_as(form, trained, tmp_path))
    weights = network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in trained.state_dict().items())


def test_weights_of_half_precision_are_loaded_into_a_network_of_single_precision(tmp_path: Path) -> None:
    network = build_network("resnet8", 10, seed=2)
    load_weights(network, saved_as("bare", build_network("resnet8", 10, seed=1).half(), tmp_path))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "num_classes", "message"),
    [
        (
            "resnet8",
            20,
            "of 56 tensors, 2 have another shape, first classifier.weight [20, 64], expected [10, 64]. Use the "
            "architecture and the number of classes that it was trained with.",
        ),
        ("resnet14", 10, " are unexpected, first blocks."),
        ("wrn_16_1", 10, " are missing, first blocks.1.shortcut.0.weight; "),
    ],
)
def test_weights_of_another_network_are_rejected_with_the_first_difference_and_change_nothing(
    model: str, num_classes: int, message: str, tmp_path: Path
) -> None:
    network = build_network("resnet8", 10, seed=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = saved_as("bare", build_network(model, num_classes, seed=1), tmp_path)
    with pytest.raises(UsageError, match=f"^{re.escape(str(path))} belongs to another network: .*{re.escape(message)}"):
        load_weights(network, path)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_the_error_for_a_missing_or_damaged_weights_file_names_the_file(name: str, tmp_path: Path) -> None:
    network, path = build_network("resnet8", 10, seed=2), tmp_path / name
    with pytest.raises(UsageError, match=f"{name} is not a file; give"):
        load_weights(network, path)
    whole = saved_as("safetensors" if path.suffix == ".safetensors" else "bare", network, tmp_path).read_bytes()
    for damaged in (b"", b"no weights at all", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=f"{name} is not a complete .*copy or save it again") as caught:
            load_weights(network, path)
        assert "\n" not in str(caught.value)


def test_a_pickle_that_could_run_code_is_rejected_in_one_line(tmp_path: Path) -> None:
    network, path = build_network("resnet8", 10, seed=2), tmp_path / "whole.pth"
    torch.save(network, path)
    with pytest.raises(UsageError, match=r"whole.pth contains ltkd.models.cifar.ResidualNetwork, but only") as caught:
        load_weights(network, path)
    assert "\n" not in str(caught.value)
    path.write_bytes(pickle.dumps(Path))  # the format of older versions of torch
    with pytest.raises(UsageError, match=r"whole.pth "):
        load_weights(network, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "contains a list, expected tensors by name"),
        ({}, "contains a dict of nothing, expected"),
        ({"epoch": 3, "accuracy": 0.4}, "contains a dict of epoch, accuracy, expected"),
        ({"model": {"weight": 0.5}}, "contains a dict of weight, expected"),
    ],
)
def test_the_error_for_a_file_without_a_state_dict_says_what_it_contains(
    content: object, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=f"odd.pth {message}"):
        load_weights(build_network("resnet8", 10, seed=2), tmp_path / "odd.pth")


def test_normalisation_subtracts_the_mean_and_divides_by_the_standard_deviation() -> None:
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    groups = ClassGroups(names=("a", "b"), group_of_class=(0, 1))
    task = Task(class_names=("x", "y"), train_counts=(1, 1), groups=groups, input_px=16, mean=mean, std=std)
    pixels = np.arange(2 * 16 * 16 * 3).reshape(2, 16, 16, 3).astype(np.uint8)  # every level in every channel
    expected = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    normalised = Normalise(task)(torch.from_numpy(pixels))
    assert normalised.dtype == torch.float32
    # float32 values up to 2.1 and two rounded constants: an error of about 1e-6
    np.testing.assert_allclose(normalised.numpy(), expected, atol=2e-6)
    assert not Normalise(task).state_dict()  # so weights files do not contain it
