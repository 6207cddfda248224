"""The commands ``train``, ``distill`` and ``compare``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ltkd.cli.options import (
    MODEL_NAMES,
    data_options,
    make_console,
    out_option,
    parse_numbers,
    parse_parameters,
    path_argument,
    set_option,
    single_run_options,
    student_model_option,
    teacher_model_option,
    training_options,
)

if TYPE_CHECKING:
    from ltkd.config import DataConfig, Execution, RunConfig
    from ltkd.training.distributed import Distributed


@click.command(short_help="Train a network on labels alone, such as a teacher.")
@data_options
@click.option("--model", default="resnet20", show_default=True, help=f"Network: {MODEL_NAMES}")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="File with the initial weights: .safetensors or a torch state dict. With --recipe adopt they are used as "
    "they are, for a teacher that was trained elsewhere.  [default: random weights]",
)
@set_option("the method ce (cross-entropy)", "logit_adjustment=1")
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
    """Train a network on labels alone: a teacher, or a student without distillation.

    To resume an interrupted training, run the same command again.

    \b
    To train on several devices of one machine, here four:
        torchrun --nproc-per-node 4 -m ltkd train ...
    """  # noqa: D301  # click does not rewrap a paragraph that starts with the character \b
    from ltkd.methods.registry import method_config
    from ltkd.recipes import find_recipe
    from ltkd.training.distributed import init_distributed
    from ltkd.training.run import run_config

    with init_distributed(execution.device) as distributed:
        config = run_config(
            data_config,
            model,
            method_config("ce", parse_parameters(changes)),
            find_recipe(recipe),
            seed=seed,
            execution=execution.model_copy(update={"num_devices": distributed.size}),
            weights_from=weights,
        )
        _train(config, out, f"{model}, seed {seed}", distributed, tensorboard)
        if distributed.is_main:
            click.echo(f"{out} is complete. Next: ltkd distill {out} --out STUDENT, or ltkd export {out} --out BUNDLE")


@click.command(short_help="Distil a trained teacher into a student.")
@path_argument("teacher")
@click.option(
    "--method",
    default="ltkd",
    show_default=True,
    help="Distillation method: ltkd, ltkd_plus, kd, dkd, bkd or reviewkd.",
)
@set_option("the method", "alpha=3")
@click.option("--model", default="resnet8", show_default=True, help=f"Network of the student: {MODEL_NAMES}")
@click.option(
    "--teacher-views",
    type=click.IntRange(min=1),
    help="Use this many fixed augmented views of every image, and compute the teacher's logits of each view only once. "
    " [default: a new random view in every epoch]",
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
    """Train a student by distillation from TEACHER, the run folder of a trained teacher.

    The student is trained on the teacher's images and class groups. To resume an interrupted training, run the same
    command again.

    \b
    To train on several devices of one machine, here four:
        torchrun --nproc-per-node 4 -m ltkd distill TEACHER ...
    """  # noqa: D301  # click does not rewrap a paragraph that starts with the character \b
    from ltkd.methods.registry import method_config
    from ltkd.recipes import find_recipe
    from ltkd.training.distributed import init_distributed
    from ltkd.training.run import run_config
    from ltkd.training.run_folder import open_run

    chosen, schedule = method_config(method, parse_parameters(changes)), find_recipe(recipe)
    teacher_run = open_run(teacher)
    with init_distributed(execution.device) as distributed:
        config = run_config(
            teacher_run.config.data,
            model,
            chosen,
            schedule,
            seed=seed,
            execution=execution.model_copy(update={"num_devices": distributed.size}),
            teacher=teacher_run,
            teacher_views=teacher_views,
        )
        _train(config, out, f"{method} {model}, seed {seed}", distributed, tensorboard)
        if distributed.is_main:
            click.echo(f"{out} is complete. Next: ltkd export {out} --out BUNDLE")


def _train(config: "RunConfig", out: Path, title: str, distributed: "Distributed", tensorboard: bool) -> None:
    from ltkd.training.progress import load_with_progress
    from ltkd.training.run import train_run

    console = make_console(quiet=not distributed.is_main)
    data = load_with_progress(config.data, console)
    train_run(config, data, out, console, title, distributed=distributed, tensorboard=tensorboard)


@click.command(short_help="Compare methods over imbalance ratios and seeds.")
@data_options
@teacher_model_option
@student_model_option
@click.option(
    "--methods",
    default="ce,kd,dkd,ltkd",
    show_default=True,
    help="Methods to compare, separated by commas. Parameters follow after colons, as in ltkd:alpha=3:beta=2.",
)
@click.option("--seeds", default="0,1,2", show_default=True, help="Random seeds, separated by commas.")
@click.option("--gammas", help="Several imbalance ratios, separated by commas; replaces --gamma.")
@training_options
@out_option("Folder of the comparison and of all its runs.")
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
    """Train a teacher, and a student with each method, for every imbalance ratio and seed.

    The results are tables, plots and the file compare.json. To resume an interrupted comparison, run the same command
    again.
    """
    from ltkd.evaluation.compare import Experiment, parse_method
    from ltkd.evaluation.compare import compare as run_comparison
    from ltkd.evaluation.results import comparison_tables
    from ltkd.recipes import find_recipe

    console = make_console()
    experiment = Experiment(
        data=data_config,
        recipe=find_recipe(recipe),
        teacher_model=teacher_model,
        student_model=student_model,
        methods=[parse_method(text) for text in methods.split(",")],
        seeds=parse_numbers("--seeds", seeds, int, 0),
        gammas=parse_numbers("--gammas", gammas, float, 1) if gammas else [data_config.gamma],
        execution=execution,
    )
    comparison = run_comparison(experiment, out, console)
    for table in comparison_tables(comparison):
        console.print(table)
    console.print(f"all results are in {out}", highlight=False)
