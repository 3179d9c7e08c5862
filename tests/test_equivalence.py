"""One recipe on 1, 2 and 4 ranks, and in accumulated batches: the same run, in float64 to 1e-9 over 20 steps."""

import csv
import os
import signal
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from tests.processes import on_ranks, printed
from xception_pl.build import build_module
from xception_pl.recipe import load_recipe

RECIPE = """
model: {num_classes: 10, width: 0.125, middle_blocks: 1, bn_momentum: 0.1, dropout: 0}
data: {source: sample, val_split: test, image_size: 71, global_batch: 8, eval_batch: 4, workers: 0, shuffle_window: 512}
optim: {lr: 0.005, ema_decay: 0.9, schedule: cosine, decay_rate: 0.94, warmup_epochs: 0.01}
trainer: {accelerator: cpu, precision: 64-true, max_epochs: 2, limit_train_batches: 10, limit_val_batches: 1,
  log_every_n_steps: 1}
run: {tensorboard: false}
"""


def train(rank: int, argv: list[str], stop: int | None) -> dict[str, Any]:
    """A run of the command; what this rank saw: (step, images, loss) of each batch, the first step's batches and gradients.

    The last rank gets a signal in step `stop`.
    """
    from xception_pl.fit import main
    from xception_pl.module import XceptionModule
    from xception_pl.run import log

    seen: dict[str, Any] = {"seen": [], "batches": [], "gradients": None}
    original = XceptionModule.training_step

    def training_step(self: XceptionModule, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        step = self.trainer.global_step
        if step == 0:
            seen["batches"].append((batch["image"].clone(), batch["label"].clone()))
        if step + 1 == stop and rank == self.trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = original(self, batch, index)
        seen["seen"].append((step, batch["id"].tolist(), loss.item()))
        return loss

    def on_before_optimizer_step(self: XceptionModule, optimizer: Any) -> None:
        if seen["gradients"] is None:
            seen["gradients"] = {
                name: value.grad.clone() for name, value in self.network.named_parameters() if value.grad is not None
            }

    log._Clock.seconds = lambda self: 2.0  # type: ignore[method-assign]  # of each step
    XceptionModule.training_step = training_step  # type: ignore[method-assign]
    XceptionModule.on_before_optimizer_step = on_before_optimizer_step  # type: ignore[method-assign]
    seen["code"] = main(argv)
    return seen


class Run:
    """What a job of some ranks left behind, or one that was stopped and went on with other ranks.

    Args:
        worlds: Ranks of each start.
        stops: After which step each start but the last ends, by a signal to its last rank.
    """

    def __init__(self, folder: Path, worlds: tuple[int, ...], *overrides: str, stops: tuple[int, ...] = ()) -> None:
        folder.mkdir()
        (folder / "tiny.yaml").write_text(RECIPE)
        self.folder, self.run = folder, folder / "run"  # one folder for all
        argv = ["tiny.yaml", "--into=run", "--resume=auto", *overrides]
        self.starts = []
        for world, stop in zip(worlds, (*stops, None), strict=True):
            ranks = on_ranks(world, train, folder, argv, stop)
            code = 0 if stop is None else 128 + signal.SIGTERM
            assert [rank["code"] for rank in ranks] == [code] * world, printed(folder, "err")
            self.starts.append(ranks)
        self.ranks = self.starts[-1]
        self.state = torch.load(self.run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        with open(self.run / "metrics.csv", newline="") as file:
            self.rows = list(csv.DictReader(file))
        self.batches: dict[int, list[list[int]]] = defaultdict(list)
        """Of each step: the images of its micro-batches, ranks side by side in each."""
        losses: dict[int, list[float]] = defaultdict(list)
        for ranks in self.starts:
            for together in zip(*(rank["seen"] for rank in ranks), strict=True):
                for step, ids, loss in together:
                    self.batches[step].append(ids)
                    losses[step].append(loss)
        self.losses = [fmean(losses[step]) for step in sorted(losses)]
        """Of each step: the mean over its micro-batches, on all ranks."""

    @property
    def rates(self) -> list[str]:
        return [row["lr"] for row in self.rows if row["lr"]]

    @property
    def global_batches(self) -> list[list[int]]:
        """Images of each step."""
        return [[i for ids in self.batches[step] for i in ids] for step in sorted(self.batches)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("equivalence")

    @cache
    def run(*worlds: int, more: tuple[str, ...] = (), stops: tuple[int, ...] = ()) -> Run:
        name = "_".join([*map(str, worlds), *more]).replace("/", "_")
        return Run(folder / name, worlds, *more, stops=stops)

    return run


SYNC = ("--trainer.sync_batchnorm=true",)


def assert_same_run(one: Run, other: Run) -> None:
    assert [sorted(ids) for ids in one.global_batches] == [sorted(ids) for ids in other.global_batches]
    assert len(one.losses) == 20
    assert one.losses == pytest.approx(other.losses, rel=0, abs=1e-9)
    assert one.rates == other.rates
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        if not name.endswith("num_batches_tracked"):  # counts micro-batches
            torch.testing.assert_close(value, other.state[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("world", [2, 4])
def test_with_synchronised_batch_norm_the_world_changes_nothing(runs: Any, world: int) -> None:
    alone, together = runs(1), runs(world, more=SYNC)
    assert alone.global_batches == together.global_batches
    assert_same_run(alone, together)


def test_accumulated_batches_equal_ranks(runs: Any) -> None:
    """Of two images each, on one, two and four ranks: weights, averaged weights and running statistics."""
    most = ("--trainer.max_device_batch=2",)
    assert_same_run(runs(4), runs(1, more=most))
    assert_same_run(runs(4), runs(2, more=most))
    # and it is not the same as one batch of eight: there batch norm sees other batches
    assert runs(1).losses != pytest.approx(runs(4).losses, abs=1e-6)


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)], ids=["to fewer", "to more"])
def test_a_run_that_goes_on_with_other_ranks_inside_an_epoch_is_the_same(runs: Any, worlds: tuple[int, ...]) -> None:
    """The same images in each global batch, the same rates, and all that follows from them."""
    moved = runs(*worlds, more=SYNC, stops=(13,))
    assert [len(ranks) for ranks in moved.starts] == list(worlds)
    assert [step for step, _, _ in moved.ranks[0]["seen"]] == list(range(13, 20))  # no step is made again
    assert moved.global_batches == runs(1).global_batches
    assert_same_run(moved, runs(1))


def test_a_run_that_goes_on_with_fewer_ranks_accumulates_more(runs: Any) -> None:
    moved = runs(2, 1, more=("--trainer.max_device_batch=4",), stops=(13,))
    assert [step for step, _, _ in moved.ranks[0]["seen"]] == sorted([*range(13, 20)] * 2)
    assert_same_run(moved, runs(2))


def test_with_batch_norm_of_each_rank_gradients_are_the_mean_of_the_ranks(runs: Any) -> None:
    job = runs(4)
    recipe = load_recipe(job.folder / "tiny.yaml")
    gradients = []
    for rank in job.ranks:
        module = build_module(recipe, images_per_epoch=4000, total_steps=20).double().train()
        ((images, labels),) = rank["batches"]
        module.loss(module.network(images.double()), labels).backward()
        gradients.append({name: value.grad for name, value in module.network.named_parameters()})
    for rank in job.ranks:
        assert rank["gradients"].keys() == gradients[0].keys()
        for name, value in rank["gradients"].items():
            mean = torch.stack([one[name] for one in gradients]).mean(0)
            torch.testing.assert_close(value, mean, rtol=0, atol=1e-12, msg=name)


def test_metrics_are_logged_once_and_count_all_ranks(runs: Any) -> None:
    job = runs(4)
    assert [int(row["step"]) for row in job.rows if row["train_loss"]] == list(range(1, 21))
    assert [float(row["val_images"]) for row in job.rows if row["val_images"]] == [16.0, 16.0]  # 4 ranks × 4
    assert {float(row["images_per_second"]) for row in job.rows if row["train_loss"]} == {4.0}  # 8 in 2 s: the job's
    assert printed(job.folder, "out").count("batch     8 = 4 devices × 2 × 1 accumulated") == 1
    assert printed(job.folder, "out").count("held-out images\n") == 1  # the final table
    assert printed(job.folder, "err") == ""


def test_compressed_gradients_are_rounded_to_bfloat16(runs: Any) -> None:
    plain, compressed = runs(2, more=SYNC), runs(2, more=(*SYNC, "--trainer.compress_gradients=true"))
    assert all(
        torch.equal(value, value.bfloat16().double()) for value in compressed.ranks[0]["gradients"].values()
    )  # the mean of two ranks, rounded
    for name, value in compressed.ranks[0]["gradients"].items():
        exact = plain.ranks[0]["gradients"][name]
        torch.testing.assert_close(value, exact, rtol=0, atol=0.02 * float(exact.abs().max()), msg=name)
    assert compressed.losses != plain.losses
