import pytest

from ltkd.errors import UsageError
from ltkd.recipes import RECIPES, find_recipe


def test_every_recipe_is_named_by_its_key_and_lowers_its_learning_rate_before_the_last_epoch() -> None:
    for name in RECIPES:
        recipe = find_recipe(name)
        assert recipe.name == name
        assert recipe.schedule == "one-cycle" or 0 < max(recipe.milestones) < recipe.epochs


def test_the_benchmark_recipe_has_the_published_values() -> None:
    recipe = find_recipe("paper")
    assert (recipe.epochs, recipe.batch_size, recipe.peak_learning_rate) == (240, 64, 0.05)
    assert (recipe.momentum, recipe.weight_decay, recipe.milestones) == (0.9, 5e-4, (150, 180, 210))


def test_the_error_for_an_unknown_recipe_lists_the_known_recipes() -> None:
    with pytest.raises(UsageError, match=r"unknown recipe 'long'; choose one of: demo, short, paper, adopt\."):
        find_recipe("long")
