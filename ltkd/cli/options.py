"""Options and arguments that several commands share, and how their values are parsed."""

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

MODEL_HELP = (
    "A network of ltkd.models.registry.MODELS, torchvision/NAME, timm/NAME or your own package.module:function."
)
METHODS_HELP = "ltkd, ltkd_plus, kd, dkd, bkd or reviewkd."


DATA_PARAMETERS = ("data", "gamma", "groups", "input_px", "holdout", "skip_unreadable", "train_list", "test_list")


def data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Which images, how long a tail, which groups: the command is handed one ``data_config``."""

    @functools.wraps(command)
    def with_data_config(**options: Any) -> None:  # noqa: ANN401  # whatever else the command takes
        from ltkd.data.datasets import data_config

        given = {name: options.pop(name) for name in DATA_PARAMETERS}
        command(data_config=data_config(**given), **options)

    wrapped: Callable[..., None] = with_data_config
    for option in (
        click.option(
            "--test-list", type=click.Path(path_type=Path), help="The same of the test images; with --train-list."
        ),
        click.option(
            "--train-list",
            type=click.Path(path_type=Path),
            help="File of lines 'path label' that names the training images below --data.",
        ),
        click.option(
            "--skip-unreadable", is_flag=True, help="Leave out images that cannot be read, instead of stopping."
        ),
        click.option(
            "--holdout",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.0,
            help="Measure on this share of the training images instead of the test set, to choose parameters.",
        ),
        click.option("--input-px", type=int, help="Side of the square input; default: the images' own size."),
        click.option(
            "--groups", default="share", show_default=True, help="share (33/34/33), count, quantile:K or a JSON file."
        ),
        click.option(
            "--gamma", type=click.FloatRange(min=1), help="Largest over smallest class. Default: 100; a tree as it is."
        ),
        click.option(
            "--data",
            default="glyphs",
            show_default=True,
            help="glyphs, cifar100, or a directory: train/CLASS/ with test/CLASS/, or tiny-imagenet-200.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """How long, where and how to train: the command is handed a ``recipe`` and one ``execution``."""

    @functools.wraps(command)
    def with_execution(
        device: str,
        precision: "ComputePrecision",
        compiled: bool,
        **others: Any,  # noqa: ANN401  # whatever else the command takes
    ) -> None:
        keep_freed_memory()
        command(execution=make_execution(device, precision, compiled), **others)

    wrapped: Callable[..., None] = with_execution
    for option in (
        click.option("--compile", "compiled", is_flag=True, help="Make the passes with torch.compile."),
        click.option(
            "--precision",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            show_default=True,
            help="Of the forward passes.",
        ),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--recipe", default="short", show_default=True, help="demo, short, paper or adopt."),
    ):
        wrapped = option(wrapped)
    return wrapped


def single_run_options(command: Command) -> Command:
    """What belongs to one run."""
    for option in (
        out_option("run folder"),
        click.option("--tensorboard", is_flag=True, help="Write the metrics for TensorBoard too."),
        seed_option,
    ):
        command = option(command)
    return command


def seed_option(command: Command) -> Command:
    """One seed."""
    return click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)(command)


def out_option(kind: str) -> Callable[[Command], Command]:
    """Where the result goes."""
    return click.option("--out", type=click.Path(path_type=Path), required=True, help=f"The {kind} to make.")


def path_argument(name: str, **options: Any) -> Callable[[Command], Command]:  # noqa: ANN401  # passed to click
    """A path that the command checks itself, with an error that helps."""
    return click.argument(name, type=click.Path(path_type=Path), **options)


def make_execution(device: str, precision: "ComputePrecision" = "float32", compiled: bool = False) -> "Execution":
    """Where and how passes are computed; ``auto`` becomes the device that is there."""
    from ltkd.config import Execution
    from ltkd.training.run import resolve_device

    return Execution(device=resolve_device(device).type, precision=precision, compiled=compiled)


margin_option = click.option(
    "--margin",
    "margins",
    multiple=True,
    metavar="GROUP=LOSS",
    help="Acceptable loss of accuracy, as in tail=2pp (or tail=0.02); GROUP may be all. Repeatable.  [default: fp32 "
    "0.5pp a group and 0.2pp of all, fp16 1 and 0.5, int8 2 and 1]",
)


def make_console(quiet: bool = False) -> "Console":
    """A console as wide as the terminal; output that goes to a file gets a fixed width."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # a file has no width, tables have
    return Console(quiet=quiet, width=wide)


def parse_precisions(text: str) -> "tuple[ModelPrecision, ...]":
    """Read ``fp32,int8``; the result is in the order of MODEL_FILES."""
    from ltkd.contract.bundle import MODEL_FILES

    names = text.split(",")
    if unknown := [name for name in names if name not in MODEL_FILES]:
        raise UsageError(f"--precisions has {unknown[0]!r}, expected some of {', '.join(MODEL_FILES)}.")
    return tuple(precision for precision in MODEL_FILES if precision in names)


def parse_margins(texts: tuple[str, ...]) -> dict[str, float]:
    """The name of a group, or ``all``, to a fraction."""
    margins = {}
    for text in texts:
        group, equals, loss = text.rpartition("=")
        try:
            margin = float(loss.removesuffix("pp")) / (100 if loss.endswith("pp") else 1)
        except ValueError:
            margin = math.nan
        if not equals or not 0 < margin < 1:
            raise UsageError(f"--margin takes GROUP=LOSS, a loss between 0 and 100pp, got '{text}'; such as tail=2pp.")
        margins[group] = margin
    return margins


def parse_parameters(changes: tuple[str, ...]) -> "dict[str, Parameter]":
    """Read ``NAME=VALUE`` pairs."""
    pairs = [change.partition("=") for change in changes]
    for name, equals, _ in pairs:
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, got '{name}'; for example --set alpha=3.")
    return {name: value for name, _, value in pairs}


def parse_numbers(option: str, text: str, kind: type[Number], least: int) -> list[Number]:
    """Different numbers separated by commas."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) != len(numbers) or not all(least <= number < math.inf for number in numbers):
        raise UsageError(
            f"{option} takes different numbers from {least} on, separated by commas, got '{text}'; such as 1,10,100."
        )
    return numbers
