"""Add a method of your own: a frozen dataclass that computes the loss, and an entry in METHODS.

Run it with: python examples/add_a_method.py

Its fields are the parameters that --set changes and that a run records. To use the method in the commands too, define
it in ltkd/methods/registry.py: ltkd distill TEACHER --method logits --set match_weight=0.5 --out STUDENT
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from custom_dataset import waves  # the small data set of another example
from rich.console import Console
from torch import Tensor

from ltkd.config import DataConfig, Execution, Recipe
from ltkd.data.datasets import load_dataset
from ltkd.data.formats import DATASETS
from ltkd.methods.registry import METHODS, Distillation, LossInputs, NotNegative, method_config
from ltkd.training.run import run_config, train_run


@dataclass(frozen=True, kw_only=True)
class LogitMatching(Distillation):
    """``CE + match_weight * mean squared distance`` of the centred logits (Ba and Caruana, arXiv 1312.6184)."""

    match_weight: NotNegative = 0.5

    def __call__(self, batch: LossInputs) -> Tensor:
        """The loss of one batch."""
        student_NC, teacher_NC = (
            logits_NC - logits_NC.mean(1, keepdim=True) for logits_NC in (batch.student_NC, self.teacher(batch))
        )
        return self.cross_entropy(batch) + self.match_weight * F.mse_loss(student_NC, teacher_NC)


METHODS["logits"] = LogitMatching


def main() -> None:
    """Distil one teacher with the new method and with LTKD; the training is too short to compare the two."""
    DATASETS["waves"] = waves
    config = DataConfig(name="waves", gamma=20)
    data = load_dataset(config)
    recipe = Recipe(name="example", epochs=6, batch_size=32, peak_learning_rate=0.1, schedule="one-cycle", eval_every=6)
    with tempfile.TemporaryDirectory() as folder:
        teacher = None
        for method in ("ce", "logits", "ltkd"):
            run_settings = run_config(
                config, "resnet8", method_config(method), recipe, seed=0, execution=Execution(), teacher=teacher
            )
            run = train_run(run_settings, data, Path(folder) / method, Console(quiet=True), method)
            teacher = teacher or run
            print(f"{method}: {', '.join(f'{group} {value:.0%}' for group, value in run.accuracy().items())} correct")


if __name__ == "__main__":
    main()
