"""The command ``pipeline``: training, distillation, export and classification in one command."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ltkd.cli.export import print_verdicts
from ltkd.cli.options import (
    data_options,
    device_option,
    make_console,
    make_execution,
    seed_option,
    student_model_option,
    teacher_model_option,
)
from ltkd.cli.serve import answer_sentence
from ltkd.contract.resources import keep_freed_memory

if TYPE_CHECKING:
    from ltkd.config import DataConfig


@click.command(short_help="Run all steps: train, distil, export and classify.")
@data_options
@teacher_model_option
@student_model_option
@device_option
@click.option(
    "--recipe",
    default="demo",
    show_default=True,
    help="Training schedule: demo (12 epochs, batches of 32), short (12 epochs, batches of 64) or paper (240 epochs, "
    "for a GPU).",
)
@seed_option
@click.option(
    "--out",
    "name",
    default="demo",
    show_default=True,
    help="Name of the results, which are written to runs/NAME and bundles/NAME.",
)
def pipeline(
    data_config: "DataConfig",
    teacher_model: str,
    student_model: str,
    device: str,
    recipe: str,
    seed: int,
    name: str,
) -> None:
    """Run all steps, from training to the classification of one image.

    The command trains a teacher, trains students with the methods CE, KD and LTKD, certifies the LTKD student as a
    bundle, and classifies one image of the rarest class. At the end it prints where the results are and how to serve
    the bundle.
    """
    import numpy as np

    from export.bundling import export_run
    from ltkd.contract.image_decoding import save_image
    from ltkd.evaluation.compare import Experiment, parse_method
    from ltkd.evaluation.compare import compare as run_comparison
    from ltkd.evaluation.results import comparison_tables
    from ltkd.recipes import find_recipe
    from ltkd.training.progress import load_with_progress
    from serve.classify_files import classify_files

    keep_freed_memory()
    console = make_console()
    runs, bundle = Path("runs") / name, Path("bundles") / name
    schedule = find_recipe(recipe)
    images = load_with_progress(data_config, console)
    experiment = Experiment(
        data=data_config,
        recipe=schedule,
        teacher_model=teacher_model,
        student_model=student_model,
        methods=[parse_method(method) for method in ("ce", "kd", "ltkd")],
        seeds=[seed],
        gammas=[data_config.gamma],
        execution=make_execution(device),
    )
    comparison = run_comparison(experiment, runs, console, load=lambda config, console: images)
    for table in comparison_tables(comparison):
        console.print(table)
    print_verdicts(export_run(runs / f"seed{seed}" / "ltkd", bundle, data=images, on_message=console.print))
    counts = images.task.train_counts
    rarest = min(np.unique(images.test_labels).tolist(), key=lambda label: counts[label])
    sample = runs / "tail.png"
    save_image(images.test_images[np.flatnonzero(images.test_labels == rarest)[:1]][0], sample)
    console.print(
        f"\nOne image of the rarest class, {images.task.class_names[rarest]} ({counts[rarest]} training images):",
        highlight=False,
    )
    click.echo(answer_sentence(sample, classify_files(bundle, [sample])[0]))
    click.echo(
        f"\nruns: {runs}   plot: {runs / 'compare.png'}   bundle: {bundle}\n"
        f"Serve it:   {_command_name()} serve {bundle}\n"
        f"Classify:   curl --data-binary @{sample} -H 'Content-Type: image/png' http://127.0.0.1:8000/v1/classify"
    )


def _command_name() -> str:
    """The name that runs this command in the user's shell: ``ltkd`` if it is on the search path."""
    return "ltkd" if shutil.which("ltkd") else sys.argv[0]
