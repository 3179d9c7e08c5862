"""What a run is going to do, in a few lines, before it does it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from xception_pl.recipe import Recipe, accumulated_batches


@dataclass(kw_only=True)
class Plan:
    """The numbers that a recipe, its data and this machine give together.

    Args:
        ranks: Processes, one a device.
        train_images: Images of the training split, or None where the source could not be asked.
        val_images: Images of the held-out split, or None.
        unchecked: What could not be checked here, a sentence each.
    """

    recipe: Recipe
    ranks: int
    train_images: int | None
    val_images: int | None
    unchecked: list[str] = field(default_factory=list)

    @property
    def device_batch(self) -> int:
        """Images a device and batch."""
        return self.recipe.data.global_batch // (self.ranks * self.accumulated)

    @property
    def accumulated(self) -> int:
        """Batches of a device that make one optimiser step."""
        return accumulated_batches(self.recipe, self.ranks)

    @property
    def epoch_steps(self) -> int | None:
        """Optimiser steps an epoch; images that fill no global batch are dropped."""
        if self.train_images is None:
            return None
        steps = self.train_images // self.recipe.data.global_batch
        limit = self.recipe.trainer.limit_train_batches
        if limit is None:
            return steps
        fixed = self.recipe.trainer.accumulate_grad_batches
        return min(steps, limit if fixed == "auto" else limit // fixed)

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps of the whole run."""
        if self.epoch_steps is None:
            return self.recipe.trainer.max_steps if self.recipe.trainer.max_steps > 0 else None
        steps = self.epoch_steps * self.recipe.trainer.max_epochs
        return min(steps, self.recipe.trainer.max_steps) if self.recipe.trainer.max_steps > 0 else steps

    def problems(self) -> list[str]:
        """What makes the run impossible."""
        batch, images = self.recipe.data.global_batch, self.train_images
        if images is not None and images < batch:
            return [
                f"data.global_batch {batch} is more than the {images} training images: an epoch would have no step; "
                "choose a smaller batch."
            ]
        return self._interval_problems()

    def _interval_problems(self) -> list[str]:
        interval, accumulate = self.recipe.trainer.val_check_interval, self.accumulated
        if self.epoch_steps is None:
            return []
        batches = self.epoch_steps * accumulate
        counted = self.epoch_steps if self.recipe.trainer.accumulate_grad_batches == "auto" else batches
        if isinstance(interval, int) and interval > counted:
            return [
                f"trainer.val_check_interval {interval} is more than the {counted} batches of an epoch; choose fewer."
            ]
        if isinstance(interval, float) and max(1, int(batches * interval)) % accumulate:
            return [
                f"trainer.val_check_interval {interval} of {batches} batches is {max(1, int(batches * interval))}, no multiple of "
                f"trainer.accumulate_grad_batches {accumulate}: a validation would fall into a step."
            ]
        return []

    def lines(self, *, parameters: int, hardware: str, learning_rate: Callable[[int], float], folder: str) -> list[str]:
        """The plan as text: network, data, batch, steps, learning rate, output."""
        model, data, trainer = self.recipe.model, self.recipe.data, self.recipe.trainer
        rows = {
            "network": f"{model.name}, {parameters:,} parameters, {model.num_classes} classes, {trainer.precision} on {hardware}",
            "data": f"{data.source}: {_count(self.train_images)} training and {_count(self.val_images)} held-out images, "
            f"{data.image_size}×{data.image_size}",
            "batch": f"{data.global_batch} = {self.ranks} devices × {self.device_batch} × {self.accumulated} accumulated",
            "steps": self._steps_line(),
            "rate": self._rate_line(learning_rate),
            "averaging": f"decay {self.recipe.optim.ema_decay}" if self.recipe.optim.ema_decay else "off",
            "output": folder,
        }
        return [f"{name:<10}{text}" for name, text in rows.items()] + [f"unchecked {text}" for text in self.unchecked]

    def _steps_line(self) -> str:
        if self.epoch_steps is None or self.train_images is None:
            return "not known without the number of training images; give data.train_images"
        left = self.train_images - self.epoch_steps * self.recipe.data.global_batch
        return f"{self.epoch_steps:,} an epoch ({left:,} images left out), {self.total_steps:,} in {self.recipe.trainer.max_epochs} epochs"

    def _rate_line(self, learning_rate: Callable[[int], float]) -> str:
        optim, total = self.recipe.optim, self.total_steps
        if total is None or self.train_images is None:
            scale = self.recipe.data.global_batch / optim.lr_batch if optim.lr_batch is not None else 1
            return f"{optim.lr * scale:.6g} at the start, {optim.schedule}{self._scaled()}"
        start, middle, end = (learning_rate(step) for step in (0, total // 2, total - 1))
        return (
            f"{start:.6g} at the start, {middle:.6g} in the middle, {end:.6g} at the end "
            f"({optim.name}, {optim.schedule}{self._scaled()})"
        )

    def _scaled(self) -> str:
        """The linear rule, where it changes the rate."""
        batch, lr_batch = self.recipe.data.global_batch, self.recipe.optim.lr_batch
        if lr_batch in (None, batch):
            return ""
        return f"; optim.lr {self.recipe.optim.lr:.6g} × data.global_batch {batch} / optim.lr_batch {lr_batch}"


def _count(images: int | None) -> str:
    return "an unknown number of" if images is None else f"{images:,}"
