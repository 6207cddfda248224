"""Recipes by name: a reported number belongs to a recipe, without flags."""

from collections.abc import Callable

from ltkd.config import Recipe
from ltkd.errors import UsageError


def demo() -> Recipe:
    """Glyphs on two CPU cores in a few minutes."""
    return Recipe(name="demo", epochs=12, batch_size=32, peak_learning_rate=0.1, schedule="one-cycle", eval_every=3)


def short() -> Recipe:
    """CIFAR-100-LT, a teacher and six students for three seeds, on two CPU cores in about two hours."""
    return Recipe(name="short", epochs=12, peak_learning_rate=0.1, schedule="one-cycle", eval_every=4)


def paper() -> Recipe:
    """The benchmark's full recipe for the residual networks (METHOD: 240 epochs, batch 64); for a GPU."""
    return Recipe(
        name="paper", epochs=240, peak_learning_rate=0.05, schedule="steps", milestones=(150, 180, 210), eval_every=1
    )


def adopt() -> Recipe:
    """No training: the network as its weights are, measured; for a teacher from elsewhere."""
    return Recipe(name="adopt", epochs=0, peak_learning_rate=0.1, schedule="one-cycle")


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo, "short": short, "paper": paper, "adopt": adopt}


def recipe_of(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        UsageError: The name is not in RECIPES.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown recipe '{name}'; known: {', '.join(RECIPES)}.")
    return RECIPES[name]()
