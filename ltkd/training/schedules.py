"""Learning rate schedules."""

import math

from ltkd.config import Recipe


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step; it depends on the number of the step alone."""
    peak = recipe.peak_learning_rate
    if recipe.schedule == "steps":
        return peak * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)
    num_steps = recipe.epochs * steps_per_epoch
    rising_steps = num_steps / 4
    if step < rising_steps:
        return peak * (step + 1) / (rising_steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising_steps) / (num_steps - rising_steps)))
