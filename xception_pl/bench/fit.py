"""`python -m xception_pl.bench fit RECIPE`: input alone, compute alone, both through the Trainer, and what bounds them.

All are measured in turns inside one run: the Trainer asks its loader for a batch, and the loader takes a turn of the
others before it answers. Files go to a folder that is deleted; nothing of the run is kept.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from xception_pl.bench.timing import Spread, ratios
from xception_pl.commands import one_sentence_errors, recipe_help, split_arguments

if TYPE_CHECKING:
    from xception_pl.recipe import Recipe
    from xception_pl.training import Prepared

OPTIONS = {
    "--rounds N": "turns of each that count (default 7)",
    "--steps N": "steps a turn (default: as many as take two seconds)",
    "--json FILE": "write the numbers there as well",
    "--help": "print this and stop",
}
TURN_SECONDS = 2.0
COMPUTE_BOUND = 0.95  # of compute alone: from here on the input does not matter

Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Images a second of one device, in turns; shares and ratios are pair by pair.

    Args:
        steps: A turn's.
        batch: Images a step.
        input: Batches from the loader, on the host, with nothing else to do.
        compute: A bare loop over one batch that is there: transfer, transforms, forward, backward, optimiser, averaging.
        trainer: The Trainer over that batch, with all callbacks.
        both: The Trainer over the loader.
        overhead: Time of the Trainer over that of the bare loop, less one.
        share: Rate of both over that of compute alone.
    """

    steps: int
    batch: int
    input: Spread
    compute: Spread
    trainer: Spread
    both: Spread
    overhead: Spread
    share: Spread

    @property
    def verdict(self) -> str:
        """What bounds the run, in a few words."""
        share = f"{self.share.median:.0%} of compute"
        if self.share.median >= COMPUTE_BOUND:
            return f"compute-bound, {share}"
        if self.input.median < self.compute.median:
            return f"input-bound, {share}"
        return f"input and compute take turns, {share}: the loader shares its processor with the network"


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code: 0 done, 2 a mistake in the recipe or the options."""
    if not arguments or {"-h", "--help"} & set(arguments):
        text = "Measures input, compute and both through the Trainer."
        print(recipe_help("bench fit", text, OPTIONS))
        return 0
    with one_sentence_errors(ValueError):
        given = split_arguments(arguments, options=("rounds", "steps", "json"))
        recipe = given.load()
        rounds, steps = _count(given.options, "rounds") or 7, _count(given.options, "steps")
        out = Path(given.options["json"]) if "json" in given.options else None
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"--json {out} cannot be written: {out.parent} is no folder.")
    from xception_pl.training import prepare

    with tempfile.TemporaryDirectory() as folder, one_sentence_errors(ValueError):
        prepared = prepare(one_device(recipe))
        speeds = measure(prepared, Path(folder), rounds=rounds, steps=steps)
    print("\n".join(report(prepared, speeds)))
    if out is not None:
        out.write_text(json.dumps(asdict(speeds) | {"verdict": speeds.verdict}, indent=2) + "\n")
    return 0


def _count(options: dict[str, str], name: str) -> int | None:
    if name not in options:
        return None
    if not options[name].isdecimal() or int(options[name]) < 1:
        raise ValueError(f"--{name} must be a whole number of 1 or more, not {options[name]!r}.")
    return int(options[name])


def one_device(recipe: "Recipe") -> "Recipe":
    """The recipe for one of its devices: that device's share of the batch, one epoch, no validation in it."""
    from xception_pl.build import find_devices, find_nodes
    from xception_pl.recipe import RecipeError, check_batch

    _, devices, _ = find_devices(recipe.trainer)
    problems = check_batch(recipe, devices)
    if problems:
        raise RecipeError(problems)
    ranks = devices * find_nodes(recipe.trainer)[0]
    trainer = replace(
        recipe.trainer,
        devices=1,
        num_nodes=1,
        strategy="auto",
        max_epochs=1,
        max_steps=-1,
        check_val_every_n_epoch=10**9,
        val_check_interval=1.0,
    )
    data = replace(recipe.data, global_batch=recipe.data.global_batch // ranks)
    run = replace(recipe.run, wandb=None, save_every_steps=0, save_every_minutes=0.0)
    return replace(recipe, trainer=trainer, data=data, run=run)


def measure(prepared: "Prepared", folder: Path, *, rounds: int, steps: int | None) -> Speeds:
    """Trains for a while, in turns with the bare loop and the loader alone."""
    from xception_pl.build import build_trainer
    from xception_pl.run.interrupt import SignalFlag
    from xception_pl.run.progress import ProgressLine

    recipe, data = prepared.plan.recipe, prepared.data
    bare = BareLoop(prepared)
    # The module's loader, before the Trainer's takes its place: it begins at the first batch and knows no trainer.
    loader = data.train_dataloader()
    # A pass after the other, wherever the Trainer is.
    loader.position = ((epoch, 0) for epoch in count()).__next__
    ahead = recipe.data.workers * recipe.data.prefetch
    gate = Gate(loader, bare, ahead=ahead, rounds=rounds, steps=steps, accumulate=prepared.plan.accumulated)
    recipe.trainer.limit_train_batches = None
    trainer, _ = build_trainer(recipe, folder, accelerator=prepared.accelerator, devices=1, signals=SignalFlag())
    # The line would count the turns as steps of the recipe: it is made, and not shown.
    hidden = patch.object(ProgressLine, "_show", lambda self, trainer, text: None)
    with patch.object(data, "train_dataloader", lambda: gate), hidden:
        trainer.fit(prepared.module, datamodule=data)
    batch = recipe.data.global_batch // prepared.plan.accumulated

    def rate(taken: list[float]) -> Spread:
        return Spread.of([batch / seconds for seconds in taken])

    taken = gate.taken
    slower = ratios(taken["compute"], taken["trainer"])
    return Speeds(
        steps=gate.steps,
        batch=batch,
        input=rate(taken["input"]),
        compute=rate(taken["compute"]),
        trainer=rate(taken["trainer"]),
        both=rate(taken["both"]),
        overhead=Spread(slower.median - 1, slower.low - 1, slower.high - 1, slower.n),
        share=ratios(taken["both"], taken["compute"]),
    )


class BareLoop:
    """The training step of a recipe without the Trainer: a copy of its network, loss, optimiser and average."""

    def __init__(self, prepared: "Prepared") -> None:
        import torch

        recipe = prepared.plan.recipe
        self.device = torch.device("cuda" if prepared.accelerator == "gpu" else "cpu")
        precision = recipe.trainer.precision
        self.module = deepcopy(prepared.module).to(
            self.device, torch.float64 if precision == "64-true" else torch.float32
        )
        self.module.train()
        if recipe.model.compile:
            self.module.network.compile()
        self.optimizer = self.module.configure_optimizers()
        self.transforms = prepared.data.on_after_batch_transfer
        self.accumulate = prepared.plan.accumulated
        self.clip = recipe.trainer.gradient_clip_val, recipe.trainer.gradient_clip_algorithm
        self.autocast = torch.autocast(
            self.device.type,
            torch.bfloat16 if precision == "bf16-mixed" else torch.float16,
            enabled=precision.endswith("mixed"),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "16-mixed")
        self.batches = 0

    def step(self, batch: Batch) -> None:
        """Forward and backward; an optimiser step after the last of the accumulated batches."""
        from torch.nn.utils import clip_grad_norm_, clip_grad_value_

        on_device = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        on_device = self.transforms(on_device, 0)
        with self.autocast:
            logits = self.module.network(self.module._layout(on_device["image"]))
            loss = self.module.loss(logits, on_device.get("target", on_device["label"]))
        self.scaler.scale(loss / self.accumulate).backward()
        self.batches += 1
        if self.batches % self.accumulate:
            return
        value, algorithm = self.clip
        if value is not None:
            self.scaler.unscale_(self.optimizer)
            clip = clip_grad_norm_ if algorithm == "norm" else clip_grad_value_
            clip(self.module.network.parameters(), value)
        rate = self.module.learning_rate(self.batches // self.accumulate - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.module.average is not None:
            self.module.average.update(self.module.network)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)


class Gate:
    """The Trainer's loader: between the Trainer's turns it takes those of the bare loop and of the real loader.

    Attributes:
        taken: Seconds a step, one number a round, of `input`, `compute`, `trainer` and `both`.
        steps: A turn's.
    """

    WARM = 3

    def __init__(
        self, loader: Any, bare: BareLoop, *, ahead: int, rounds: int, steps: int | None, accumulate: int
    ) -> None:
        self.loader, self.bare, self.ahead, self.rounds, self.accumulate = loader, bare, ahead, rounds, accumulate
        self.taken: dict[str, list[float]] = {name: [] for name in ("input", "compute", "trainer", "both")}
        self._batches = self._endless()
        self.first = next(self._batches)
        self.steps = self._whole(steps or self._enough())

    def __len__(self) -> int:
        return self._whole(self.WARM) + self.rounds * 2 * (self.steps + self.accumulate) + self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._whole(self.WARM)):
            yield self.first
        for _ in range(self.rounds):
            self._turn("compute", lambda: self.bare.step(self.first))
            yield from self._trainers_turn("trainer", lambda: self.first)
            self._refill()
            self._turn("input", lambda: next(self._batches))
            self._refill()
            yield from self._trainers_turn("both", lambda: next(self._batches))
        for _ in range(self.accumulate):  # the Trainer does not ask again after the last one
            yield self.first

    def _turn(self, name: str, step: Callable[[], object]) -> None:
        for _ in range(self.accumulate):
            step()
        self.bare.wait()
        start = time.perf_counter()
        for _ in range(self.steps):
            step()
        self.bare.wait()
        self.taken[name].append((time.perf_counter() - start) / self.steps)

    def _trainers_turn(self, name: str, batch: Callable[[], Batch]) -> Iterator[Batch]:
        """The Trainer asks for the next batch when it is done with the last: the time between is its own."""
        for _ in range(self.accumulate):
            yield batch()
        self.bare.wait()
        start = time.perf_counter()
        for _ in range(self.steps):
            yield batch()
        self.bare.wait()
        self.taken[name].append((time.perf_counter() - start) / self.steps)

    def _refill(self) -> None:
        """Takes the batches that workers made ahead while others were measured."""
        for _ in range(self.ahead):
            next(self._batches)

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self.loader

    def _enough(self) -> int:
        self.bare.step(self.first)
        self.bare.wait()
        start = time.perf_counter()
        for _ in range(2):
            self.bare.step(self.first)
        self.bare.wait()
        return max(1, round(2 * TURN_SECONDS / (time.perf_counter() - start)))

    def _whole(self, steps: int) -> int:
        """So many steps or a few more: all that are accumulated into one."""
        return -(-steps // self.accumulate) * self.accumulate


def report(prepared: "Prepared", speeds: Speeds) -> list[str]:
    """The speeds as text, the verdict last."""
    rows = {
        "input alone": speeds.input,
        "compute alone, bare loop": speeds.compute,
        "compute alone, Trainer": speeds.trainer,
        "both, Trainer": speeds.both,
    }
    data, hardware = prepared.plan.recipe.data, prepared.accelerator
    lines = [
        f"{prepared.plan.recipe.run.name}: {speeds.batch} images of {data.image_size} px a step, {hardware}, "
        f"{data.workers} workers; medians (quartiles) of {speeds.both.n} turns of {speeds.steps} steps",
        "",
    ]
    lines += [f"{name:<28}{_spread(rate)} images/s" for name, rate in rows.items()]
    overhead = speeds.overhead
    lines += [
        f"{'the Trainer costs':<28}{overhead.median:+.1%} ({overhead.low:+.1%} to {overhead.high:+.1%}) of the bare loop",
        "",
        speeds.verdict,
    ]
    return lines


def _spread(spread: Spread) -> str:
    return f"{spread.median:8,.1f} ({spread.low:,.1f}–{spread.high:,.1f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
