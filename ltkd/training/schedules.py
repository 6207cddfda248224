"""Learning rate schedules."""

import math

from ltkd.config import Recipe


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate of one step, a function of the step alone."""
    peak = recipe.peak_learning_rate
    if recipe.schedule == "steps":
        return peak * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)
    num_steps = recipe.epochs * steps_per_epoch
    rise = num_steps / 4
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (num_steps - rise)))
