"""Methods against each other: teachers and students over several tails and seeds, as tables, one JSON and pictures."""

import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ltkd.config import DataConfig, Execution, MethodConfig, Parameter, Recipe
from ltkd.contract.records import write_record
from ltkd.data.datasets import Dataset
from ltkd.errors import UsageError
from ltkd.evaluation.evaluate import TestLogits, evaluate_run, logits_on_test
from ltkd.evaluation.plots import draw_comparison
from ltkd.evaluation.results import COMPARISON_FILE, TEACHER, Comparison, RunResult, run_result
from ltkd.methods.registry import build_method, method_config
from ltkd.models.registry import model_builder
from ltkd.training.progress import load_with_progress
from ltkd.training.run import run_config, train_run
from ltkd.training.run_folder import Run

# Teacher logits of one seed are kept for all its students up to this size; beyond it every student asks the teacher.
KEPT_LOGITS_BYTES = 2**30


@dataclass(frozen=True)
class MethodSpec:
    """A method as the comparison names it: ``ltkd`` or ``ltkd:alpha=3:beta=2``."""

    name: str
    method: MethodConfig

    @property
    def folder(self) -> str:
        """The name of its runs' folders."""
        return self.name.replace(":", "-")


def parse_method(text: str) -> MethodSpec:
    """Read ``NAME`` or ``NAME:PARAMETER=VALUE:...``.

    Raises:
        UsageError: The method or a parameter does not exist, or a value is missing.
    """
    name, *changes = text.split(":")
    parameters: dict[str, Parameter] = {}
    for change in changes:
        parameter, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"'{text}' is no method: a parameter is NAME=VALUE, got '{change}'; say ltkd:alpha=3.")
        parameters[parameter] = value
    return MethodSpec(text, method_config(name, parameters))


@dataclass(frozen=True)
class Experiment:
    """What is compared: every contestant for every tail and seed.

    Attributes:
        data: The images; its own gamma is not used.
        gammas: The tails; None leaves a set as it is.
    """

    data: DataConfig
    recipe: Recipe
    teacher_model: str
    student_model: str
    methods: Sequence[MethodSpec]
    seeds: Sequence[int]
    gammas: Sequence[float | None]
    execution: Execution


def compare(
    experiment: Experiment,
    out: Path,
    console: Console,
    *,
    load: Callable[[DataConfig, Console], Dataset] = load_with_progress,
) -> Comparison:
    """Train a teacher and a student by every method, for every tail and seed, in folders below ``out``.

    Runs that are complete are taken as they are, so an interrupted comparison goes on where it stopped. The
    comparison's files are renewed after every run. Students of one seed share their teacher's logits: every epoch
    is a view of its own, so nothing of what they see changes.

    Raises:
        UsageError: A model, a method or a parameter does not exist, or two contestants are the same.
    """
    for model in (experiment.teacher_model, experiment.student_model):
        model_builder(model)  # before the images are loaded, which may take long
    recipe, gammas, methods = experiment.recipe, experiment.gammas, experiment.methods
    names = [each.name for each in methods]
    if len(set(names)) != len(names):
        raise UsageError(f"a method is named twice: {', '.join(names)}; name each once.")
    rows: list[RunResult] = []
    train_counts: list[tuple[int, ...]] = []

    def note(network: str, run: Run, data: Dataset, teacher_logits: TestLogits) -> Comparison:
        rows.append(run_result(network, run, evaluate_run(run, data, teacher_logits), data, out))
        comparison = Comparison(
            data=experiment.data.model_copy(update={"gamma": gammas[0]}),
            recipe=recipe,
            methods={each.name: each.method for each in methods},
            execution=experiment.execution,
            versions=run.config.versions,
            hardware=_hardware(run.config.execution.device),
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            num_test=len(data.test_labels),
            train_counts=tuple(train_counts),
            group_names=data.task.groups.names,
            rows=tuple(rows),
        )
        write_record(out / COMPARISON_FILE, comparison)
        return comparison

    for gamma in gammas:
        tailed = experiment.data.model_copy(update={"gamma": gamma})
        data = load(tailed, console)
        train_counts.append(data.task.train_counts)
        views = _views(recipe, data, methods)
        for seed in experiment.seeds:
            folder = out / f"seed{seed}" if len(gammas) == 1 else out / f"gamma{gamma:g}" / f"seed{seed}"
            title = f"seed {seed}" if len(gammas) == 1 else f"gamma {gamma:g}, seed {seed}"
            config = run_config(
                tailed,
                experiment.teacher_model,
                method_config("ce"),
                recipe,
                seed=seed,
                execution=experiment.execution,
            )
            teacher = train_run(config, data, folder / TEACHER, console, f"teacher, {title}")
            teacher_logits = functools.cache(functools.partial(logits_on_test, teacher, data))
            comparison = note(TEACHER, teacher, data, teacher_logits)
            for each in methods:
                taught = build_method(each.method).needs_teacher
                config = run_config(
                    tailed,
                    experiment.student_model,
                    each.method,
                    recipe,
                    seed=seed,
                    execution=experiment.execution,
                    teacher=teacher if taught else None,
                    teacher_views=views if taught and not build_method(each.method).needs_features else None,
                )
                run = train_run(config, data, folder / each.folder, console, f"{each.name}, {title}")
                comparison = note(each.name, run, data, teacher_logits)
            draw_comparison(comparison, data.test_labels, out, several_tails=len(gammas) > 1)
    return comparison


def _hardware(device: str) -> str:
    return (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )


def _views(recipe: Recipe, data: Dataset, methods: Sequence[MethodSpec]) -> int | None:
    """As many views as epochs, where several students can share the teacher's logits and these are not too large."""
    num_taught = sum(build_method(each.method).needs_teacher for each in methods)
    logits_bytes = 4 * recipe.epochs * len(data.train_labels) * len(data.task.class_names)
    in_memory = isinstance(data.train_images, np.ndarray)
    return recipe.epochs if num_taught > 1 and in_memory and logits_bytes <= KEPT_LOGITS_BYTES else None
