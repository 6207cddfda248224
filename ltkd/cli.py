"""The command ``ltkd``: the front door to training, export and service.

Nothing heavy is imported before a command runs, so ``--help`` answers at once, and an install without torch serves.
This is the one module of ``ltkd`` that knows the rooms ``export`` and ``serve``.
"""

import ctypes
import errno
import functools
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ltkd import __version__
from ltkd.errors import LtkdError, StoppedError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from export.bundling import Export
    from ltkd.bundle import Precision as ModelPrecision
    from ltkd.config import DataConfig, Execution, Parameter, Precision, RunConfig
    from ltkd.ranks import Ranks
    from serve.answers import Answer, Refused

Command = TypeVar("Command", bound=Callable[..., Any])
Number = TypeVar("Number", int, float)

MODEL_HELP = "A network of ltkd.networks.MODELS, torchvision/NAME, timm/NAME or your own package.module:function."
METHODS_HELP = "ltkd, ltkd_plus, kd, dkd, bkd or reviewkd."

INTERRUPTED = 130
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)

# How long a thread of torch's OpenMP runtime waits for the others before it sleeps. The runtime's own 300,000 rounds
# make training twenty times slower as soon as another process wants a core (docs/lab-book.md).
SPIN_COUNT = "10000"


# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def main() -> None:
    """Run a command; what the user can put right ends in one line on stderr and exit code 2."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except StoppedError as stop:
        click.echo(str(stop), err=True)
        sys.exit(128 + stop.signal_number)
    except LtkdError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror}; make room and give the same command again.", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = EXTRA_OF_PACKAGE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        click.echo(f"error: this command needs {error.name}; install it with: pip install 'ltkd[{extra}]'", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; what is complete is kept: the same command goes on from there.", err=True)
        sys.exit(INTERRUPTED)


EXTRA_OF_PACKAGE = {
    **dict.fromkeys(("torch", "torchvision", "safetensors", "matplotlib"), "train"),
    "tensorboard": "tensorboard",
    **dict.fromkeys(("onnx", "onnxscript", "scipy"), "export"),
    **dict.fromkeys(("onnxruntime", "fastapi", "uvicorn", "prometheus_client"), "serve"),
}


DATA_PARAMETERS = ("data", "gamma", "groups", "input_px", "holdout", "skip_unreadable", "train_list", "test_list")


def data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Which images, how long a tail, which groups: the command is handed one ``data_config``."""

    @functools.wraps(command)
    def with_data_config(**options: Any) -> None:  # noqa: ANN401  # whatever else the command takes
        from ltkd.data import data_config

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
        precision: "Precision",
        compiled: bool,
        **others: Any,  # noqa: ANN401  # whatever else the command takes
    ) -> None:
        _keep_freed_memory()
        command(execution=_execution(device, precision, compiled), **others)

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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ltkd")
def cli() -> None:
    r"""Train, certify and serve classifiers that look after the tail of long-tailed data.

    \b
    The whole journey on rendered characters, in a few minutes:
        ltkd pipeline
    Step by step, on images of your own (train/CLASS/*.png and test/CLASS/*.png):
        ltkd train --data photos --model resnet20 --out runs/teacher
        ltkd distill runs/teacher --method ltkd --model resnet8 --out runs/student
        ltkd export runs/student --out bundles/student
        ltkd serve bundles/student
    """


@cli.command(short_help="Train a network from labels alone.")
@data_options
@click.option("--model", default="resnet20", show_default=True, help=MODEL_HELP)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Start with these: .safetensors or a torch state dict. With --recipe adopt, a teacher from elsewhere.",
)
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="A parameter of ce; repeatable.")
@training_options
@single_run_options
def train(
    data_config: "DataConfig",
    model: str,
    weights: Path | None,
    changes: tuple[str, ...],
    recipe: str,
    execution: "Execution",
    seed: int,
    tensorboard: bool,
    out: Path,
) -> None:
    r"""Train a network from labels alone: a teacher, or a plain student.

    An interrupted training goes on when the same command is given again. On several devices:

    \b
        torchrun --nproc-per-node 4 -m ltkd train ...
    """
    from ltkd.methods import method_config
    from ltkd.ranks import joined_ranks
    from ltkd.recipes import recipe_of
    from ltkd.runs import run_config

    with joined_ranks(execution.device) as ranks:
        config = run_config(
            data_config,
            model,
            method_config("ce", _parameters(changes)),
            recipe_of(recipe),
            seed=seed,
            execution=execution.model_copy(update={"num_devices": ranks.size}),
            weights_from=weights,
        )
        _train(config, out, f"{model}, seed {seed}", ranks, tensorboard)
        if ranks.leads:
            click.echo(f"{out} is complete. Next: ltkd distill {out} --out STUDENT, or ltkd export {out} --out BUNDLE")


@cli.command(short_help="Distil a teacher's run into a student.")
@path_argument("teacher")
@click.option("--method", default="ltkd", show_default=True, help=METHODS_HELP)
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="A parameter of the method; repeatable.")
@click.option("--model", default="resnet8", show_default=True, help=MODEL_HELP)
@click.option(
    "--teacher-views",
    type=click.IntRange(min=1),
    help="Show every image in this many fixed views and keep the teacher's logits of each.  [default: new ones each "
    "epoch]",
)
@training_options
@single_run_options
def distill(
    teacher: Path,
    method: str,
    changes: tuple[str, ...],
    model: str,
    teacher_views: int | None,
    recipe: str,
    execution: "Execution",
    seed: int,
    tensorboard: bool,
    out: Path,
) -> None:
    r"""Distil the run TEACHER into a student.

    Images and class groups are the teacher's. An interrupted training goes on when the same command is given again. On
    several devices:

    \b
        torchrun --nproc-per-node 4 -m ltkd distill TEACHER ...
    """
    from ltkd.methods import method_config
    from ltkd.ranks import joined_ranks
    from ltkd.recipes import recipe_of
    from ltkd.runs import open_run, run_config

    chosen, schedule = method_config(method, _parameters(changes)), recipe_of(recipe)
    taught_by = open_run(teacher)
    with joined_ranks(execution.device) as ranks:
        config = run_config(
            taught_by.config.data,
            model,
            chosen,
            schedule,
            seed=seed,
            execution=execution.model_copy(update={"num_devices": ranks.size}),
            teacher=taught_by,
            teacher_views=teacher_views,
        )
        _train(config, out, f"{method} {model}, seed {seed}", ranks, tensorboard)
        if ranks.leads:
            click.echo(f"{out} is complete. Next: ltkd export {out} --out BUNDLE")


def _keep_freed_memory() -> None:
    """Have glibc keep the pages of freed tensors: the kernel's part of a step's time is gone (docs/lab-book.md)."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):  # glibc alone has it
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            allocator.mallopt(option, 2**30)


def _execution(device: str, precision: "Precision" = "float32", compiled: bool = False) -> "Execution":
    from ltkd.config import Execution
    from ltkd.training import device_of

    return Execution(device=device_of(device).type, precision=precision, compiled=compiled)


def _train(config: "RunConfig", out: Path, title: str, ranks: "Ranks", tensorboard: bool) -> None:
    from ltkd.display import shown_loading
    from ltkd.runs import train_run

    console = _console(quiet=not ranks.leads)
    data = shown_loading(config.data, console)
    train_run(config, data, out, console, title, ranks=ranks, tensorboard=tensorboard)


@cli.command(short_help="Train by several methods, tails and seeds; tables and plots.")
@data_options
@click.option("--teacher-model", default="resnet20", show_default=True, help=MODEL_HELP)
@click.option("--student-model", default="resnet8", show_default=True)
@click.option(
    "--methods",
    default="ce,kd,dkd,ltkd",
    show_default=True,
    help="Methods, separated by commas; parameters after colons, as in ltkd:alpha=3:beta=2.",
)
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds, separated by commas.")
@click.option("--gammas", help="Several tails, separated by commas, in place of --gamma.")
@training_options
@out_option("folder of all runs")
def compare(
    data_config: "DataConfig",
    teacher_model: str,
    student_model: str,
    methods: str,
    seeds: str,
    gammas: str | None,
    recipe: str,
    execution: "Execution",
    out: Path,
) -> None:
    """Train a teacher and a student by several methods, tails and seeds; write tables, compare.json and pictures.

    An interrupted comparison goes on when the same command is given again.
    """
    from ltkd.compare import Experiment, comparison_tables, contestant
    from ltkd.compare import compare as run_comparison
    from ltkd.recipes import recipe_of

    console = _console()
    experiment = Experiment(
        data=data_config,
        recipe=recipe_of(recipe),
        teacher_model=teacher_model,
        student_model=student_model,
        contestants=[contestant(text) for text in methods.split(",")],
        seeds=_numbers("--seeds", seeds, int, 0),
        gammas=_numbers("--gammas", gammas, float, 1) if gammas else [data_config.gamma],
        execution=execution,
    )
    comparison = run_comparison(experiment, out, console)
    for table in comparison_tables(comparison):
        console.print(table)
    console.print(f"everything in {out}", highlight=False)


margin_option = click.option(
    "--margin",
    "margins",
    multiple=True,
    metavar="GROUP=LOSS",
    help="Acceptable loss of accuracy, as in tail=2pp (or tail=0.02); GROUP may be all. Repeatable.  [default: fp32 "
    "0.5pp a group and 0.2pp of all, fp16 1 and 0.5, int8 2 and 1]",
)


@cli.command(short_help="Certify a run per class group and bundle it as ONNX.")
@path_argument("run")
@click.option("--out", type=click.Path(path_type=Path), help="Where the bundle goes.")
@click.option(
    "--precisions",
    help="Which to try, separated by commas: fp32, int8 (for the CPU), fp16 (for CUDA).  [default: all that can be "
    "certified here]",
)
@margin_option
@click.option(
    "--target-precision",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.9,
    show_default=True,
    help="Share of accepted predictions of a group that shall be right; below the threshold the service abstains.",
)
@click.option(
    "--target-coverage",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.9,
    show_default=True,
    help="Share of a group's images whose class shall be in the prediction set.",
)
@click.option(
    "--triton", type=click.Path(path_type=Path), help="Write the bundle as a model repository of Triton here, too."
)
def export(
    run: Path,
    out: Path | None,
    precisions: str | None,
    margins: tuple[str, ...],
    target_precision: float,
    target_coverage: float,
    triton: Path | None,
) -> None:
    """Turn the run RUN into a bundle, if every class group demonstrably kept its accuracy.

    Each precision is certified on its own; the bundle has those that passed, with a report (parity.html), what
    confidence means in each group, and a model card. Without a PASS of fp32 no bundle is written. Candidates that did
    not pass go to rejected/ beside it.

    Exit codes: 0 PASS, 1 FAIL, 2 usage or input, 3 INCONCLUSIVE (too few images). Precisions named by --precisions
    all have to pass for a 0.

    With --triton alone RUN may be a bundle that exists.
    """
    from export.bundling import export_run
    from export.certify import Policy
    from export.triton import write_triton
    from ltkd.bundle import open_bundle

    if out is None and triton is None:
        raise UsageError("nothing to write; give --out BUNDLE, or --triton DIRECTORY with a bundle in place of RUN.")
    if out is not None:
        chosen = None if precisions is None else _precisions(precisions)
        policy = Policy(chosen, _margins(margins), target_precision, target_coverage)
        _conclude(export_run(run, out, policy, tell=_console().print), chosen)
    if triton is not None:
        click.echo(f"model repository: {write_triton(open_bundle(out or run), triton)}")


@cli.command(short_help="Hold any two models against each other, per class group.")
@path_argument("reference")
@path_argument("candidate")
@data_options
@margin_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder for parity.json and parity.html.")
def parity(
    reference: Path, candidate: Path, data_config: "DataConfig", margins: tuple[str, ...], out: Path | None
) -> None:
    """Say whether CANDIDATE kept the accuracy of REFERENCE in every group of classes, on the test images of --data.

    Each may be a run, a bundle or an ONNX file, made here or elsewhere: one input, uint8 [N, S, S, 3] or normalised
    float32 [N, 3, S, S], and logits first among its outputs.

    Exit codes: 0 PASS, 1 FAIL, 2 usage or input, 3 INCONCLUSIVE (too few images).
    """
    from export.console import print_report
    from export.parity import EXIT_CODES
    from export.report import write_report
    from export.sides import hold, open_side
    from ltkd.display import shown_loading

    console = _console()
    data = shown_loading(data_config, console)
    report = hold(open_side(reference, data.task), open_side(candidate, data.task), data, _margins(margins))
    print_report(report, console)
    if out is not None:
        write_report(report, out)
        click.echo(f"report: {out}")
    sys.exit(EXIT_CODES[report.verdict])


@cli.command(short_help="Check that a bundle is whole and answers as made.")
@path_argument("bundle")
def verify(bundle: Path) -> None:
    """Check that BUNDLE is whole, sound and certified, and answers its golden images as it did when made."""
    from export.verify import verify_bundle

    checked = verify_bundle(bundle)
    for check in checked.checks:
        click.echo(f"{check.precision}: {check.finding}")
    if checked.strangers:
        click.echo(f"not part of it, and read by nothing: {', '.join(checked.strangers)}")
    certified = ", ".join(checked.manifest.precisions)
    click.echo(f"{bundle} is whole and certified ({certified}), on {checked.manifest.certified_on}.")


@cli.command(short_help="Show what a bundle is.")
@path_argument("bundle")
def inspect(bundle: Path) -> None:
    """Show what BUNDLE holds: classes and groups, accuracy and confidence of each, how it was certified."""
    from export.inspection import inspection
    from export.verify import read_report
    from ltkd.bundle import open_bundle

    opened = open_bundle(bundle)
    _console().print(inspection(opened, read_report(opened)))


@cli.command(short_help="Serve bundles over HTTP.")
@path_argument("bundle")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="TCP port; 0 takes a free one.  [default: 8000]")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="cuda: on CUDA or not at all.  [default: auto]"
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8", "fp16"]),
    help="Which certified model answers.  [default: int8 on the CPU, fp16 on CUDA, if they are there; else fp32]",
)
@click.option("--processes", type=int, help="Engine processes for each model; they share the cores.  [default: 1]")
@click.option("--max-body-bytes", type=int, help="Largest request body.  [default: 20 MiB]")
@click.option("--default-model", help="Which model answers where a request names none and there are several.")
@click.option("--key-file", type=click.Path(path_type=Path), help="Who may use it; lines are made by: ltkd key NAME")
@click.option("--log-format", type=click.Choice(["plain", "json"]), help="json: one object a line.  [default: plain]")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="info: one line a request.  [default: warning]",
)
def serve(bundle: Path, **given: "str | int | Path | None") -> None:
    """Serve BUNDLE over HTTP until SIGTERM or Ctrl-C.

    BUNDLE is a bundle, or a directory of bundles (NAME/) or of their versions (NAME/1/, NAME/2/: the highest answers).
    SIGHUP reads it again: what changed is verified and warm before it answers, and stays out if it fails.

    Every setting, these and the rarer ones, can also be given as a variable LTKD_NAME, such as LTKD_PORT=9000; all of
    them are printed at the start.
    """
    from serve.main import serve as serve_bundle
    from serve.settings import read_settings

    serve_bundle(bundle, read_settings(given), given)


@cli.command(short_help="Make a key for the service.")
@click.argument("name")
@click.option("--admin", is_flag=True, help="The key may also give orders, such as reloading.")
def key(name: str, admin: bool) -> None:
    """Make a key for NAME: printed once on stderr, and on stdout the line of it for the file of --key-file.

    The line has a hash of the key, so the file gives nobody access. In use: ltkd key NAME >> keys
    """
    from serve.keys import make_key

    secret, line = make_key(name, "admin" if admin else "classify")
    click.echo(f"the key of {name}, shown only now: {secret}", err=True)
    click.echo(line)


@cli.command(short_help="Classify image files with a bundle.")
@path_argument("bundle")
@path_argument("images", nargs=-1, required=True)
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object an image, as the service answers.")
def classify(bundle: Path, images: tuple[Path, ...], top_k: int, as_json: bool) -> None:
    """Classify image files with BUNDLE, exactly as the service would. Exits with 1 if an image was refused."""
    from serve.answers import Refused
    from serve.files import classify_files

    results = classify_files(bundle, list(images), top_k)
    for path, result in zip(images, results, strict=True):
        click.echo(result.model_dump_json() if as_json else _sentence(path, result))
    if any(isinstance(result, Refused) for result in results):
        sys.exit(1)


@cli.command(short_help="The whole journey, from data to an answer.")
@data_options
@click.option("--teacher-model", default="resnet20", show_default=True)
@click.option("--student-model", default="resnet8", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--recipe", default="demo", show_default=True, help="demo, short or paper.")
@seed_option
@click.option("--out", "name", default="demo", show_default=True, help="Name: leaves runs/NAME and bundles/NAME.")
def pipeline(
    data_config: "DataConfig",
    teacher_model: str,
    student_model: str,
    device: str,
    recipe: str,
    seed: int,
    name: str,
) -> None:
    """The whole journey: teacher, students, certified bundle, one answer.

    Trains a teacher and students by CE, KD and LTKD, certifies the LTKD student, classifies one image of a tail
    class, and ends with what a reader needs to know.
    """
    import numpy as np

    from export.bundling import export_run
    from ltkd.compare import Experiment, comparison_tables, contestant
    from ltkd.compare import compare as run_comparison
    from ltkd.display import shown_loading
    from ltkd.images import save_image
    from ltkd.recipes import recipe_of
    from serve.files import classify_files

    _keep_freed_memory()
    console = _console()
    runs, bundle = Path("runs") / name, Path("bundles") / name
    schedule = recipe_of(recipe)
    images = shown_loading(data_config, console)
    experiment = Experiment(
        data=data_config,
        recipe=schedule,
        teacher_model=teacher_model,
        student_model=student_model,
        contestants=[contestant(method) for method in ("ce", "kd", "ltkd")],
        seeds=[seed],
        gammas=[data_config.gamma],
        execution=_execution(device),
    )
    comparison = run_comparison(experiment, runs, console, load=lambda config, console: images)
    for table in comparison_tables(comparison):
        console.print(table)
    _conclude(export_run(runs / f"seed{seed}" / "ltkd", bundle, data=images, tell=console.print))
    counts = images.task.train_counts
    rarest = min(np.unique(images.test_labels).tolist(), key=lambda label: counts[label])
    sample = runs / "tail.png"
    save_image(images.test_images[np.flatnonzero(images.test_labels == rarest)[:1]][0], sample)
    console.print(
        f"\nOne image of the rarest class, {images.task.class_names[rarest]} ({counts[rarest]} training images):",
        highlight=False,
    )
    click.echo(_sentence(sample, classify_files(bundle, [sample])[0]))
    click.echo(
        f"\nruns: {runs}   plot: {runs / 'compare.png'}   bundle: {bundle}\n"
        f"Serve it:   {_own_name()} serve {bundle}\n"
        f"Then ask:   curl --data-binary @{sample} -H 'Content-Type: image/png' http://127.0.0.1:8000/v1/classify"
    )


def _own_name() -> str:
    """What to type for this command: its plain name where the shell finds it."""
    return "ltkd" if shutil.which("ltkd") else sys.argv[0]


def _console(quiet: bool = False) -> "Console":
    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # a file has no width, tables have
    return Console(quiet=quiet, width=wide)


def _conclude(export: "Export", chosen: "tuple[ModelPrecision, ...] | None" = None) -> None:
    """Print the verdict of every precision; leave with an exit code unless all that had to pass did."""
    from export.console import print_report
    from export.gates import worst
    from export.parity import EXIT_CODES

    console = _console()
    print_report(export.report, console)
    if export.rejected:
        click.echo(f"did not pass: {export.rejected}")
    if export.bundle:
        click.echo(f"certified: {export.bundle}")
    asked = [report.verdict for report in export.report.candidates if report.precision in (chosen or ("fp32",))]
    if code := EXIT_CODES[worst(asked)]:
        sys.exit(code)


def _sentence(path: Path, result: "Answer | Refused") -> str:
    from serve.answers import Refused

    if isinstance(result, Refused):
        return f"{path}: refused: {result.error.detail}"
    groups = ", ".join(f"{name} {100 * confidence:.1f} %" for name, confidence in result.group_confidence.items())
    return f"{path}: {result.label} ({result.group}) with {100 * result.probability:.1f} %; by group: {groups}"


def _precisions(text: str) -> "tuple[ModelPrecision, ...]":
    from ltkd.bundle import MODEL_FILES

    names = text.split(",")
    if unknown := [name for name in names if name not in MODEL_FILES]:
        raise UsageError(f"--precisions has {unknown[0]!r}, expected some of {', '.join(MODEL_FILES)}.")
    return tuple(precision for precision in MODEL_FILES if precision in names)


def _margins(texts: tuple[str, ...]) -> dict[str, float]:
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


def _parameters(changes: tuple[str, ...]) -> "dict[str, Parameter]":
    pairs = [change.partition("=") for change in changes]
    for name, equals, _ in pairs:
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, got '{name}'; for example --set alpha=3.")
    return {name: value for name, _, value in pairs}


def _numbers(option: str, text: str, kind: type[Number], least: int) -> list[Number]:
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
