"""Ranks in processes of their own agree on a run, and say a mistake once."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import on_ranks, printed
from xception_pl.recipe import Recipe
from xception_pl.run.folder import choose_output

TINY = """
model: {num_classes: 10, width: 0.125, middle_blocks: 1}
data: {source: sample, val_split: test, image_size: 71, global_batch: 8, workers: 0, shuffle_window: 512}
trainer: {accelerator: cpu, max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1, log_every_n_steps: 1}
run: {tensorboard: false}
"""


def broken() -> None:
    raise FloatingPointError("this device is broken")


def without_worker() -> None:
    (worker,) = multiprocessing.active_children()
    worker.kill()


def fit(rank: int, argv: list[str], fails_on: int | None = None, fails: Callable[[], None] = broken) -> int:
    """The command; something may happen to one rank before its second batch."""
    from xception_pl.fit import main
    from xception_pl.module import XceptionModule

    if rank == fails_on:
        original = XceptionModule.training_step

        def training_step(self: XceptionModule, batch: Any, index: int) -> Any:
            if index == 1:
                fails()
            return original(self, batch, index)

        XceptionModule.training_step = training_step  # type: ignore[method-assign]
    try:
        return main(argv)
    except SystemExit as ended:
        return int(ended.code or 0)


def write(folder: Path, text: str = TINY) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(text)


def test_a_mistake_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    write(tmp_path)
    assert on_ranks(2, fit, tmp_path, ["tiny.yaml", "--optim.lrr=1"]) == [2, 2]
    assert printed(tmp_path, "err") == "error: unknown option --optim.lrr. Did you mean optim.lr?\n"


def fit_elsewhere(rank: int, argv: list[str]) -> int:
    """Rank 1 is on a node that does not see the recipe."""
    if rank == 1:
        os.mkdir("elsewhere")
        os.chdir("elsewhere")
    return fit(rank, argv)


def test_a_mistake_of_one_rank_is_said_with_its_rank(tmp_path: Path) -> None:
    write(tmp_path)
    assert on_ranks(2, fit_elsewhere, tmp_path, ["tiny.yaml"]) == [2, 2]
    assert printed(tmp_path, "err") == "error: rank 1: there is no recipe tiny.yaml.\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--trainer.devices=4", "trainer.devices is 4, but torchrun started 2 processes a node: set it to auto,"),
        ("--trainer.num_nodes=2", "trainer.num_nodes is 2, but torchrun started processes on 1 nodes:"),
        (
            "--data.global_batch=9",
            "data.global_batch 9 does not divide by trainer.devices 2 × trainer.num_nodes 1 = 2;",
        ),
        ("--data.source=./nowhere", "./nowhere"),
    ],
)
def test_what_the_world_does_not_allow_is_refused_by_all(tmp_path: Path, argv: str, said: str) -> None:
    write(tmp_path)
    assert on_ranks(2, fit, tmp_path, ["tiny.yaml", argv]) == [2, 2]
    errors = printed(tmp_path, "err")
    assert said in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def decide(rank: int, start: int, agent: tuple[str, str], late: int | None = None) -> Any:
    """What the ranks of one start agree on, over a store that has seen other starts."""
    import torch
    from torch import distributed as dist

    from xception_pl.run.launcher import find_launcher
    from xception_pl.run.ranks import Ranks

    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = agent
    if rank == late:
        time.sleep(1)
    ranks = Ranks(find_launcher())
    chosen = ranks.first(lambda: start)
    ranks.connect("gloo", 60)
    total = torch.tensor(start)
    dist.all_reduce(total)
    return chosen, total.item()


def test_a_start_takes_nothing_from_those_before_it(tmp_path: Path) -> None:
    """torchrun's store outlives the processes that it starts again."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = ("127.0.0.1", str(store.port))
    for start, late in enumerate([None, 0, 1], start=1):
        assert on_ranks(2, decide, tmp_path / str(start), start, agent, late) == [(start, 2 * start)] * 2


def test_an_error_on_rank_3_alone_is_shown_once_with_the_rank(tmp_path: Path) -> None:
    write(tmp_path)
    codes = on_ranks(4, fit, tmp_path, ["tiny.yaml"], 3)
    assert 0 not in codes
    errors = printed(tmp_path, "err")
    assert errors.count("error: ") == 1
    assert "error: rank 3 (" in errors
    assert "): FloatingPointError: this device is broken. There is no checkpoint yet.\n" in errors
    assert errors.count("Traceback") == 1


def test_a_killed_loader_worker_of_one_rank_ends_all(tmp_path: Path) -> None:
    write(tmp_path)
    more = ["--data.workers=1", "--data.prefetch=1", "--trainer.limit_train_batches=20"]
    assert on_ranks(2, fit, tmp_path, ["tiny.yaml", *more], 1, without_worker) == [1, 1]
    (said,) = [line for line in printed(tmp_path, "err").splitlines() if line]
    assert said.startswith("error: rank 1 (")
    assert "): A loader worker was killed, by the system if memory ran out: lower data.workers, " in said


def signalled(rank: int, argv: list[str]) -> int:
    """Rank 0 gets a signal while it waits for rank 1, which is still to come."""
    sent = Path("sent")

    def send() -> None:
        while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        sent.touch()

    if rank == 0:
        threading.Thread(target=send).start()
    while rank and not sent.exists():
        time.sleep(0.05)
    return fit(rank, argv)


def test_a_signal_before_the_ranks_have_met_is_not_lost(tmp_path: Path) -> None:
    write(tmp_path)
    assert on_ranks(2, signalled, tmp_path, ["tiny.yaml"]) == [128 + signal.SIGTERM] * 2, printed(tmp_path, "err")
    assert printed(tmp_path, "out").count("SIGTERM: stopped before the first step; there is nothing to save.\n") == 1
    assert printed(tmp_path, "err") == ""


def test_all_ranks_write_to_one_folder_and_resume_one_checkpoint(tmp_path: Path) -> None:
    write(tmp_path)
    assert on_ranks(2, fit, tmp_path, ["tiny.yaml"], nodes=2) == [0, 0]
    (folder,) = tmp_path.glob("runs/tiny/*")
    assert "on 1 × cpu × 2 nodes" in (tmp_path / "out 0").read_text()
    assert (tmp_path / "out 1").read_text() == ""
    assert on_ranks(2, fit, tmp_path, ["tiny.yaml", "--trainer.max_epochs=2", "--resume=last"]) == [0, 0]
    assert [folder] == list(tmp_path.glob("runs/tiny/*"))
    assert "step 4/4" in (tmp_path / "out 0").read_text()


def test_processes_that_lightning_starts_take_the_choice_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe()
    recipe.run.folder, recipe.run.name = str(tmp_path), "mine"
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("XCEPTION_PL_OUTPUT", "")  # restored afterwards
    chosen = choose_output(recipe, None, None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    chosen[0].mkdir(parents=True)  # the first has begun to write
    assert choose_output(recipe, "last", None) == chosen
