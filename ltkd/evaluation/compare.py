"""Comparison of methods: train teachers and students for several gammas and seeds and collect the results.

The trainings are ordinary runs (``training.run``). ``results`` has the records and tables, ``plots`` the plots.
"""

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

# up to this size the teacher's logits of a seed are cached for all students; above it, every student computes them
MAX_CACHED_LOGITS_BYTES = 2**30


@dataclass(frozen=True)
class MethodSpec:
    """A method with its name in the comparison: ``ltkd`` or ``ltkd:alpha=3:beta=2``."""

    name: str
    method: MethodConfig

    @property
    def folder(self) -> str:
        """The name of the folder of its runs."""
        return self.name.replace(":", "-")


def parse_method(text: str) -> MethodSpec:
    """Parse ``NAME`` or ``NAME:PARAMETER=VALUE:...``.

    Raises:
        UsageError: The method or a parameter does not exist, or a value is missing.
    """
    name, *changes = text.split(":")
    parameters: dict[str, Parameter] = {}
    for change in changes:
        parameter, equals, value = change.partition("=")
        if not equals:
            raise UsageError(
                f"'{text}' is not a method: parameters have the form NAME=VALUE, got '{change}'; example: ltkd:alpha=3."
            )
        parameters[parameter] = value
    return MethodSpec(text, method_config(name, parameters))


@dataclass(frozen=True)
class Experiment:
    """The trainings of a comparison: every method for every gamma and seed.

    Attributes:
        data: The images; ``gamma`` in it is not used.
        methods: The students' methods.
        gammas: Imbalance ratios of the training images; None uses all training images.
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
    """Train a teacher and one student per method, for every gamma and seed, in folders below ``out``.

    Complete runs are reused, so an interrupted comparison is resumed. compare.json is written again after every run,
    the plots after every seed. The students of a seed share the cached logits of their teacher. Every epoch has its own
    view, so the cache does not change the students' images.

    Raises:
        UsageError: A model does not exist, or a method is given twice.
    """
    for model in (experiment.teacher_model, experiment.student_model):
        model_builder(model)  # raises if there is no such model; before the images are loaded, which may take long
    recipe, gammas, methods = experiment.recipe, experiment.gammas, experiment.methods
    names = [spec.name for spec in methods]
    if len(set(names)) != len(names):
        raise UsageError(f"a method is given twice: {', '.join(names)}; give each method once.")
    results: list[RunResult] = []
    train_counts: list[tuple[int, ...]] = []

    def add_result(network: str, run: Run, data: Dataset, teacher_logits: TestLogits) -> Comparison:
        results.append(run_result(network, run, evaluate_run(run, data, teacher_logits), data, out))
        comparison = Comparison(
            data=experiment.data.model_copy(update={"gamma": gammas[0]}),
            recipe=recipe,
            methods={spec.name: spec.method for spec in methods},
            execution=experiment.execution,
            versions=run.config.versions,
            hardware=_hardware(run.config.execution.device),
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            num_test=len(data.test_labels),
            train_counts=tuple(train_counts),
            group_names=data.task.groups.names,
            rows=tuple(results),
        )
        write_record(out / COMPARISON_FILE, comparison)
        return comparison

    for gamma in gammas:
        data_config = experiment.data.model_copy(update={"gamma": gamma})
        data = load(data_config, console)
        train_counts.append(data.task.train_counts)
        views = _teacher_views(recipe, data, methods)
        for seed in experiment.seeds:
            folder = out / f"seed{seed}" if len(gammas) == 1 else out / f"gamma{gamma:g}" / f"seed{seed}"
            title = f"seed {seed}" if len(gammas) == 1 else f"gamma {gamma:g}, seed {seed}"
            config = run_config(
                data_config,
                experiment.teacher_model,
                method_config("ce"),
                recipe,
                seed=seed,
                execution=experiment.execution,
            )
            teacher = train_run(config, data, folder / TEACHER, console, f"teacher, {title}")
            teacher_logits = functools.cache(functools.partial(logits_on_test, teacher, data))
            comparison = add_result(TEACHER, teacher, data, teacher_logits)
            for spec in methods:
                method = build_method(spec.method)
                config = run_config(
                    data_config,
                    experiment.student_model,
                    spec.method,
                    recipe,
                    seed=seed,
                    execution=experiment.execution,
                    teacher=teacher if method.needs_teacher else None,
                    teacher_views=views if method.needs_teacher and not method.needs_features else None,
                )
                run = train_run(config, data, folder / spec.folder, console, f"{spec.name}, {title}")
                comparison = add_result(spec.name, run, data, teacher_logits)
            draw_comparison(comparison, data.test_labels, out, several_gammas=len(gammas) > 1)
    return comparison


def _hardware(device: str) -> str:
    return (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )


def _teacher_views(recipe: Recipe, data: Dataset, methods: Sequence[MethodSpec]) -> int | None:
    """One view per epoch if several students can share cached teacher logits of acceptable size, otherwise None."""
    num_distilled = sum(build_method(spec.method).needs_teacher for spec in methods)
    logits_bytes = 4 * recipe.epochs * len(data.train_labels) * len(data.task.class_names)
    in_memory = isinstance(data.train_images, np.ndarray)
    return recipe.epochs if num_distilled > 1 and in_memory and logits_bytes <= MAX_CACHED_LOGITS_BYTES else None
