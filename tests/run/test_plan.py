"""The plan's numbers: those that follow from the world, and those that do not."""

import pytest

from xception_pl.recipe import Recipe
from xception_pl.run.plan import Plan


def lines(recipe: Recipe, ranks: int, images: int | None = 1000) -> dict[str, str]:
    plan = Plan(recipe=recipe, ranks=ranks, train_images=images, val_images=images)
    shown = plan.lines(parameters=1, hardware="cpu", learning_rate=lambda step: 0.2, folder="runs")
    return {line[:10].strip(): line[10:] for line in shown}


@pytest.mark.parametrize(
    ("ranks", "batch"), [(1, "1 devices × 16 × 4"), (2, "2 devices × 16 × 2"), (8, "8 devices × 8 × 1")]
)
def test_only_how_the_batch_is_shared_follows_the_world(ranks: int, batch: str) -> None:
    recipe = Recipe()
    recipe.data.global_batch, recipe.trainer.max_device_batch = 64, 16
    recipe.trainer.limit_train_batches, recipe.trainer.max_epochs = 10, 2
    shown = lines(recipe, ranks)
    assert shown["batch"] == f"64 = {batch} accumulated"
    assert shown["steps"].endswith("20 in 2 epochs")


def test_the_linear_rule_is_printed_where_it_changes_the_rate() -> None:
    recipe = Recipe()
    recipe.data.global_batch, recipe.optim.lr, recipe.optim.lr_batch = 512, 0.1, 256
    rule = "optim.lr 0.1 × data.global_batch 512 / optim.lr_batch 256"
    assert rule in lines(recipe, 1)["rate"]
    assert lines(recipe, 1, None)["rate"] == f"0.2 at the start, staircase; {rule}"
    recipe.data.global_batch = 256
    assert "×" not in lines(recipe, 1)["rate"]
