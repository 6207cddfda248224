"""Recipes by name: how long and how fast a network is trained. A published figure belongs to a recipe without flags."""

from collections.abc import Callable

from ltkd.config import Recipe
from ltkd.errors import UsageError


def demo() -> Recipe:
    """Train on glyphs with two CPU cores in a few minutes."""
    return Recipe(name="demo", epochs=12, batch_size=32, peak_learning_rate=0.1, schedule="one-cycle", eval_every=3)


def short() -> Recipe:
    """Train a teacher and six students on CIFAR-100-LT for three seeds, on two CPU cores in about two hours."""
    return Recipe(name="short", epochs=12, peak_learning_rate=0.1, schedule="one-cycle", eval_every=4)


def paper() -> Recipe:
    """The benchmark's full recipe for residual networks (240 epochs, batch size 64), intended for a GPU."""
    return Recipe(
        name="paper", epochs=240, peak_learning_rate=0.05, schedule="steps", milestones=(150, 180, 210), eval_every=1
    )


def adopt() -> Recipe:
    """Evaluate a network without training it; for a teacher that was trained elsewhere."""
    return Recipe(name="adopt", epochs=0, peak_learning_rate=0.1, schedule="one-cycle")


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo, "short": short, "paper": paper, "adopt": adopt}


def find_recipe(name: str) -> Recipe:
    """Look up a recipe by name.

    Raises:
        UsageError: The name is not in RECIPES.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown recipe '{name}'; choose one of: {', '.join(RECIPES)}.")
    return RECIPES[name]()
