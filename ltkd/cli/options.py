"""Options and arguments that several commands share, and the functions that parse their values."""

import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ltkd.contract.resources import keep_freed_memory
from ltkd.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from ltkd.config import ComputePrecision, Execution, Parameter
    from ltkd.contract.bundle import Precision as ModelPrecision

Command = TypeVar("Command", bound=Callable[..., Any])
Number = TypeVar("Number", int, float)

MODEL_NAMES = (
    "a built-in one such as resnet20, resnet32x4, wrn_16_2 or mobilenetv2; torchvision/NAME; timm/NAME; or your own "
    "package.module:function."
)
DEVICES = ["auto", "cpu", "cuda"]

DATA_PARAMETERS = ("data", "gamma", "groups", "input_px", "holdout", "skip_unreadable", "train_list", "test_list")


def data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose images, imbalance ratio and class groups; the command takes one ``data_config``."""

    @functools.wraps(command)
    def with_data_config(**options: Any) -> None:  # noqa: ANN401  # the other parameters of the command
        from ltkd.data.datasets import data_config

        data = {name: options.pop(name) for name in DATA_PARAMETERS}
        command(data_config=data_config(**data), **options)

    wrapped: Callable[..., None] = with_data_config
    for option in (
        click.option(
            "--test-list",
            type=click.Path(path_type=Path),
            help="The same for the test images. Needs --train-list.",
        ),
        click.option(
            "--train-list",
            type=click.Path(path_type=Path),
            help="File with one line 'path label' per training image; the paths are relative to --data. "
            "Needs --test-list.",
        ),
        click.option(
            "--skip-unreadable",
            is_flag=True,
            help="Leave out image files that cannot be read, instead of stopping with an error.",
        ),
        click.option(
            "--holdout",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.0,
            show_default=True,
            help="Hold out this share of the training images and evaluate on it instead of the test set. Use it to "
            "choose parameters.",
        ),
        click.option(
            "--input-px",
            type=int,
            help="Side of the square network input in pixels.  [default: the images' size if they are squares of one "
            "size, at most 224 px; else 64]",
        ),
        click.option(
            "--groups",
            default="share",
            show_default=True,
            help="How classes are grouped by their number of training images: share (33 % of the classes are head, "
            "34 % medium, 33 % tail), count (many: more than 100 images, medium: 20 to 100, few: fewer than 20), "
            "quantile:K (K groups of nearly equal size), or a JSON file that maps group names to lists of classes.",
        ),
        click.option(
            "--gamma",
            type=click.FloatRange(min=1),
            help="Imbalance ratio: size of the largest training class divided by the size of the smallest. Training "
            "images are left out to reach it.  [default: 100 for glyphs, cifar100 and tiny-imagenet-200; your own "
            "images are all used]",
        ),
        click.option(
            "--data",
            default="glyphs",
            show_default=True,
            help="Data set: glyphs (characters rendered from fonts), cifar100, or a directory with train/CLASS/ and "
            "test/CLASS/, or the unpacked tiny-imagenet-200.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for how and where to train; the command takes a ``recipe`` and one ``execution``."""

    @functools.wraps(command)
    def with_execution(
        device: str,
        precision: "ComputePrecision",
        compiled: bool,
        **others: Any,  # noqa: ANN401  # the other parameters of the command
    ) -> None:
        keep_freed_memory()
        command(execution=make_execution(device, precision, compiled), **others)

    wrapped: Callable[..., None] = with_execution
    for option in (
        click.option("--compile", "compiled", is_flag=True, help="Compile the network with torch.compile."),
        click.option(
            "--precision",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            show_default=True,
            help="Number format of the forward passes; loss and weights are always float32.",
        ),
        device_option,
        click.option(
            "--recipe",
            default="short",
            show_default=True,
            help="Training schedule: demo (12 epochs, batches of 32), short (12 epochs, batches of 64), paper (240 "
            "epochs, for a GPU) or adopt (no training: the network is evaluated with the weights it has).",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def single_run_options(command: Command) -> Command:
    """Add the options that a command has if it trains exactly one run."""
    for option in (
        out_option("Run folder to write."),
        click.option("--tensorboard", is_flag=True, help="Also write the metrics for TensorBoard."),
        seed_option,
    ):
        command = option(command)
    return command


device_option = click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="Device to train on. auto: CUDA if there is a GPU, else the CPU. cuda: stop with an error without a GPU.",
)

seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed of the training."
)

teacher_model_option = click.option(
    "--teacher-model", default="resnet20", show_default=True, help=f"Network of the teacher: {MODEL_NAMES}"
)

student_model_option = click.option(
    "--student-model",
    default="resnet8",
    show_default=True,
    help="Network of the students, named as for --teacher-model.",
)


def set_option(method: str, example: str) -> Callable[[Command], Command]:
    """Parameters of the training method, as ``NAME=VALUE``."""
    return click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="NAME=VALUE",
        help=f"Set a parameter of {method}, for example {example}. Can be given several times.",
    )


def out_option(help_text: str) -> Callable[[Command], Command]:
    """The path of the result."""
    return click.option("--out", type=click.Path(path_type=Path), required=True, help=help_text)


def margin_option(defaults: str) -> Callable[[Command], Command]:
    """Acceptable losses of accuracy, by class group."""
    return click.option(
        "--margin",
        "margins",
        multiple=True,
        metavar="GROUP=LOSS",
        help="Acceptable loss of accuracy, as in tail=2pp (percentage points) or tail=0.02. GROUP is a class group, or "
        f"all for all images together. Can be given several times.  [default: {defaults}]",
    )


def path_argument(name: str, **options: Any) -> Callable[[Command], Command]:  # noqa: ANN401  # passed to click
    """A path. The command checks it, because its error message can say what was expected there."""
    return click.argument(name, type=click.Path(path_type=Path), **options)


def make_execution(device: str, precision: "ComputePrecision" = "float32", compiled: bool = False) -> "Execution":
    """Build the execution settings; ``auto`` is replaced with the device that is available."""
    from ltkd.config import Execution
    from ltkd.training.run import resolve_device

    return Execution(device=resolve_device(device).type, precision=precision, compiled=compiled)


def make_console(quiet: bool = False) -> "Console":
    """A console as wide as the terminal, or 120 columns wide if the output is redirected."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # tables need a width, a file has none
    return Console(quiet=quiet, width=width)


def parse_precisions(text: str) -> "tuple[ModelPrecision, ...]":
    """Read precisions such as ``fp32,int8``; the result is in the order of MODEL_FILES."""
    from ltkd.contract.bundle import MODEL_FILES

    names = text.split(",")
    if unknown := [name for name in names if name not in MODEL_FILES]:
        raise UsageError(f"--precisions contains {unknown[0]!r}; expected one or more of {', '.join(MODEL_FILES)}.")
    return tuple(precision for precision in MODEL_FILES if precision in names)


def parse_margins(texts: tuple[str, ...]) -> dict[str, float]:
    """Read margins such as ``tail=2pp`` into a mapping from group name (or ``all``) to a fraction."""
    margins = {}
    for text in texts:
        group, equals, loss = text.rpartition("=")
        try:
            margin = float(loss.removesuffix("pp")) / (100 if loss.endswith("pp") else 1)
        except ValueError:
            margin = math.nan
        if not equals or not 0 < margin < 1:
            raise UsageError(
                f"--margin takes GROUP=LOSS with a loss between 0 and 100pp, for example tail=2pp; got '{text}'."
            )
        margins[group] = margin
    return margins


def parse_parameters(changes: tuple[str, ...]) -> "dict[str, Parameter]":
    """Read ``NAME=VALUE`` pairs into a mapping."""
    pairs = [change.partition("=") for change in changes]
    for name, equals, _ in pairs:
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, for example --set alpha=3; got '{name}'.")
    return {name: value for name, _, value in pairs}


def parse_numbers(option: str, text: str, kind: type[Number], minimum: int) -> list[Number]:
    """Read distinct numbers that are separated by commas."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) != len(numbers) or not all(minimum <= number < math.inf for number in numbers):
        raise UsageError(
            f"{option} takes distinct numbers of at least {minimum}, separated by commas, for example 1,10,100; "
            f"got '{text}'."
        )
    return numbers
