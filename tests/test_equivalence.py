"""One recipe on 1, 2 and 4 ranks, and in accumulated batches: the same run, in float64 to 1e-9 over 20 steps."""

import csv
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


def train(rank: int, argv: list[str]) -> dict[str, Any]:
    """A run of the command; which images this rank saw in each batch, and the first step's batches and gradients."""
    from xception_pl.fit import main
    from xception_pl.module import XceptionModule

    seen: dict[str, Any] = {"ids": [], "losses": [], "batches": [], "gradients": None}
    original = XceptionModule.training_step

    def training_step(self: XceptionModule, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        seen["ids"].append(batch["id"].tolist())
        if self.trainer.global_step == 0:
            seen["batches"].append((batch["image"].clone(), batch["label"].clone()))
        loss = original(self, batch, index)
        seen["losses"].append(loss.item())
        return loss

    def on_before_optimizer_step(self: XceptionModule, optimizer: Any) -> None:
        if seen["gradients"] is None:
            seen["gradients"] = {
                name: value.grad.clone() for name, value in self.network.named_parameters() if value.grad is not None
            }

    XceptionModule.training_step = training_step  # type: ignore[method-assign]
    XceptionModule.on_before_optimizer_step = on_before_optimizer_step  # type: ignore[method-assign]
    seen["code"] = main(argv)
    return seen


class Run:
    """What a job of some ranks left behind."""

    def __init__(self, folder: Path, world: int, *overrides: str) -> None:
        folder.mkdir()
        (folder / "tiny.yaml").write_text(RECIPE)
        self.folder = folder
        self.ranks = on_ranks(world, train, folder, ["tiny.yaml", *overrides])
        assert [rank["code"] for rank in self.ranks] == [0] * world, printed(folder, "err")
        (self.run,) = folder.glob("runs/tiny/*")  # one folder for all
        self.state = torch.load(self.run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        with open(self.run / "metrics.csv", newline="") as file:
            self.rows = list(csv.DictReader(file))

    def losses(self, micro_batches: int = 1) -> list[float]:
        """Of each step: the mean over its micro-batches, on all ranks."""
        every = [rank["losses"] for rank in self.ranks]
        starts = range(0, len(every[0]), micro_batches)
        return [fmean(x for losses in every for x in losses[i : i + micro_batches]) for i in starts]

    @property
    def rates(self) -> list[str]:
        return [row["lr"] for row in self.rows if row["lr"]]

    def global_batches(self, micro_batches: int = 1) -> list[list[int]]:
        """Images of each step: those of each rank's micro-batches, ranks side by side in each."""
        every = [rank["ids"] for rank in self.ranks]
        together = [sum(parts, start=[]) for parts in zip(*every, strict=True)]  # noqa: RUF017
        starts = range(0, len(together), micro_batches)
        return [sum(together[start : start + micro_batches], start=[]) for start in starts]  # noqa: RUF017


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("equivalence")

    @cache
    def run(world: int, *overrides: str) -> Run:
        return Run(folder / "_".join([str(world), *overrides]).replace("/", "_"), world, *overrides)

    return run


SYNC = "--trainer.sync_batchnorm=true"


def assert_same_run(one: Run, other: Run, micro_batches: int = 1) -> None:
    assert [sorted(ids) for ids in one.global_batches()] == [sorted(x) for x in other.global_batches(micro_batches)]
    assert len(one.losses()) == 20
    assert one.losses() == pytest.approx(other.losses(micro_batches), rel=0, abs=1e-9)
    assert one.rates == other.rates
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        if not name.endswith("num_batches_tracked"):  # counts micro-batches
            torch.testing.assert_close(value, other.state[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("world", [2, 4])
def test_with_synchronised_batch_norm_the_world_changes_nothing(runs: Any, world: int) -> None:
    alone, together = runs(1), runs(world, SYNC)
    assert alone.global_batches() == together.global_batches()
    assert_same_run(alone, together)


def test_accumulated_batches_equal_ranks(runs: Any) -> None:
    """Of two images each, on one, two and four ranks: weights, averaged weights and running statistics."""
    accumulated = runs(1, "--trainer.max_device_batch=2")
    assert_same_run(runs(4), accumulated, micro_batches=4)
    assert_same_run(runs(4), runs(2, "--trainer.max_device_batch=2"), micro_batches=2)
    # and it is not the same as one batch of eight: there batch norm sees other batches
    assert runs(1).losses() != pytest.approx(runs(4).losses(), abs=1e-6)


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
    assert printed(job.folder, "out").count("batch     8 = 4 devices × 2 × 1 accumulated") == 1
    assert printed(job.folder, "out").count("held-out images\n") == 1  # the final table
    assert printed(job.folder, "err") == ""


def test_compressed_gradients_are_rounded_to_bfloat16(runs: Any) -> None:
    plain, compressed = runs(2, SYNC), runs(2, SYNC, "--trainer.compress_gradients=true")
    assert all(
        torch.equal(value, value.bfloat16().double()) for value in compressed.ranks[0]["gradients"].values()
    )  # the mean of two ranks, rounded
    for name, value in compressed.ranks[0]["gradients"].items():
        exact = plain.ranks[0]["gradients"][name]
        torch.testing.assert_close(value, exact, rtol=0, atol=0.02 * float(exact.abs().max()), msg=name)
    assert compressed.losses() != plain.losses()
