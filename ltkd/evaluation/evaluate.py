"""Evaluation of a complete run on the test images, by class and against its teacher; saved in the run folder.

Shape legend: N images, C classes, K class groups.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ltkd.contract.metrics import class_accuracy
from ltkd.contract.records import VersionedRecord, read_record, write_record
from ltkd.data.datasets import Dataset
from ltkd.errors import RunError
from ltkd.methods.losses import GroupIndex, group_kl, log_prior, without_prior
from ltkd.models.registry import Normalise
from ltkd.training.loop import predict
from ltkd.training.run_folder import Run, open_run

EVALUATION_FILE = "evaluation.json"
TEMPERATURE = 4.0  # for group masses and divergences; the temperature of the distillation
MASS_BATCH = 64  # images per sum of group masses; the paper's batch size


class Evaluation(VersionedRecord):
    """The results of a network on the test images.

    Attributes:
        class_accuracy: Accuracy of each class, a fraction; None for a class without test images.
        adjusted_class_accuracy: The same after post-hoc logit adjustment of strength 1 (arXiv 2007.07314).
        batch_masses: For consecutive batches of shuffled test images, the probability that the network assigns to each
            group at the temperature ``TEMPERATURE``, summed over the batch.
        teacher_kl: For a distilled student, the mean KL(teacher || student) in nats, by true group and over all.
    """

    class_accuracy: tuple[float | None, ...]
    adjusted_class_accuracy: tuple[float | None, ...]
    batch_masses: tuple[tuple[float, ...], ...]
    teacher_kl: dict[str, float] | None


TestLogits = Callable[[], NDArray[np.floating]]


def evaluate_run(run: Run, data: Dataset, teacher_logits: TestLogits | None = None) -> Evaluation:
    """Evaluate a run on the test images and save the result, or read a saved result.

    Args:
        run: A complete run.
        data: The images of its config.
        teacher_logits: Returns the test logits of the run's teacher; None computes them from the teacher's run.

    Raises:
        RunError: The run was trained on other images or groups.
    """
    if run.task != data.task:
        raise RunError(f"{run.path} was trained on other images or groups than these; load the data of its config.")
    path = run.path / EVALUATION_FILE
    if path.is_file():
        return read_record(path, Evaluation, RunError)
    logits_NC = torch.from_numpy(logits_on_test(run, data))
    teacher_NC = None
    if run.config.teacher is not None:
        teacher_NC = teacher_logits() if teacher_logits else logits_on_test(open_run(run.config.teacher), data)
    adjusted_NC = without_prior(logits_NC, log_prior(torch.tensor(data.task.train_counts)))
    num_classes = len(data.task.class_names)
    evaluation = Evaluation(
        class_accuracy=class_accuracy(logits_NC.argmax(1).numpy(), data.test_labels, num_classes),
        adjusted_class_accuracy=class_accuracy(adjusted_NC.argmax(1).numpy(), data.test_labels, num_classes),
        batch_masses=_batch_masses(logits_NC, data),
        teacher_kl=None if teacher_NC is None else _teacher_kl(logits_NC, teacher_NC, data),
    )
    write_record(path, evaluation)
    return evaluation


def logits_on_test(run: Run, data: Dataset) -> NDArray[np.floating]:
    """Logits [N, C] of a run's network on the test images."""
    device = torch.device(run.config.execution.device)
    network = nn.Sequential(Normalise(data.task), run.load_network()).to(device).to(memory_format=torch.channels_last)
    return predict(network, data.test_images)


def _batch_masses(logits_NC: torch.Tensor, data: Dataset) -> tuple[tuple[float, ...], ...]:
    mass_NK = GroupIndex(data.task.groups).sum((logits_NC / TEMPERATURE).softmax(1))
    order_N = torch.randperm(len(mass_NK), generator=torch.Generator().manual_seed(0))
    batches = [batch for batch in torch.split(mass_NK[order_N], MASS_BATCH) if len(batch) == MASS_BATCH]
    return tuple(tuple(batch.sum(0).tolist()) for batch in batches)


def _teacher_kl(student_NC: torch.Tensor, teacher_NC: NDArray[np.floating], data: Dataset) -> dict[str, float]:
    groups = data.task.groups
    split = group_kl(student_NC, torch.from_numpy(teacher_NC), GroupIndex(groups), temperature=TEMPERATURE)
    mass_NK = split.teacher_log_mass_NK.exp()
    across_N = (mass_NK * (split.teacher_log_mass_NK - split.student_log_mass_NK)).sum(1)
    kl_N = (across_N + (mass_NK * split.within_NK).sum(1)).numpy()
    group_N = groups.index[data.test_labels]
    present = [group for group in range(len(groups.names)) if (group_N == group).any()]
    return {
        **{groups.names[group]: float(kl_N[group_N == group].mean()) for group in present},
        "all": float(kl_N.mean()),
    }
