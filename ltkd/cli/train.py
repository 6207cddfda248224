"""The commands ``train``, ``distill`` and ``compare``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ltkd.cli.options import (
    METHODS_HELP,
    MODEL_HELP,
    data_options,
    make_console,
    out_option,
    parse_numbers,
    parse_parameters,
    path_argument,
    single_run_options,
    training_options,
)

if TYPE_CHECKING:
    from ltkd.config import DataConfig, Execution, RunConfig
    from ltkd.training.distributed import Distributed


@click.command(short_help="Train a network from labels alone.")
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
    from ltkd.config import find_recipe
    from ltkd.methods.registry import method_config
    from ltkd.training.distributed import init_distributed
    from ltkd.training.run import run_config

    with init_distributed(execution.device) as ranks:
        config = run_config(
            data_config,
            model,
            method_config("ce", parse_parameters(changes)),
            find_recipe(recipe),
            seed=seed,
            execution=execution.model_copy(update={"num_devices": ranks.size}),
            weights_from=weights,
        )
        _train(config, out, f"{model}, seed {seed}", ranks, tensorboard)
        if ranks.is_main:
            click.echo(f"{out} is complete. Next: ltkd distill {out} --out STUDENT, or ltkd export {out} --out BUNDLE")


@click.command(short_help="Distil a teacher's run into a student.")
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
    from ltkd.config import find_recipe
    from ltkd.methods.registry import method_config
    from ltkd.training.distributed import init_distributed
    from ltkd.training.run import run_config
    from ltkd.training.run_folder import open_run

    chosen, schedule = method_config(method, parse_parameters(changes)), find_recipe(recipe)
    taught_by = open_run(teacher)
    with init_distributed(execution.device) as ranks:
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
        if ranks.is_main:
            click.echo(f"{out} is complete. Next: ltkd export {out} --out BUNDLE")


def _train(config: "RunConfig", out: Path, title: str, ranks: "Distributed", tensorboard: bool) -> None:
    from ltkd.training.progress import load_with_progress
    from ltkd.training.run import train_run

    console = make_console(quiet=not ranks.is_main)
    data = load_with_progress(config.data, console)
    train_run(config, data, out, console, title, ranks=ranks, tensorboard=tensorboard)


@click.command(short_help="Train by several methods, tails and seeds; tables and plots.")
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
    from ltkd.config import find_recipe
    from ltkd.evaluation.compare import Experiment, parse_method
    from ltkd.evaluation.compare import compare as run_comparison
    from ltkd.evaluation.results import comparison_tables

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
    console.print(f"everything in {out}", highlight=False)
