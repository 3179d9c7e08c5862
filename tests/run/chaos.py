"""Run by test_chaos: one training run of two ranks under random kills, beside one that nothing disturbs.

python -m tests.run.chaos FOLDER KILLS SEED

Each start is the real `fit --resume auto`, with torchrun's environment, forked from this process, which has imported
everything: imports would take most of the time. Prints what was done and what was found, as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import xception_pl.training  # noqa: F401
from tests.processes import free_port
from xception_pl import durable, fit
from xception_pl.run.checkpoints import check_checkpoint
from xception_pl.run.metrics_csv import read_metrics
from xception_pl.run.trace import same_state
from xception_pl.run.watch import LOST

WORLD = 2
RECIPE = """
model: {num_classes: 10, width: 0.05, middle_blocks: 1, dropout: 0.5, bn_momentum: 0.1}
data: {source: sample, val_split: test, image_size: 71, global_batch: 4, eval_batch: 2, workers: 0, shuffle_window: 512}
optim: {lr: 0.02, ema_decay: 0.9}
trainer: {max_epochs: EPOCHS, limit_train_batches: 20, limit_val_batches: 2, val_check_interval: 10, log_every_n_steps: 5,
          enable_progress_bar: false}
run: {tensorboard: false, save_every_steps: 1, rank_timeout_seconds: 3}
"""
KINDS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP", "write", "fsync", "replace")
BOUND_SECONDS = 60
"""Longest time from a kill to the end of all ranks; most of it is for a machine that is busy with other things."""


def start(folder: Path, before: Callable[[int], None] = lambda rank: None) -> list[int]:
    """Processes of a start of the run in `folder`; `before` is called in each."""
    port, ranks = free_port(), []
    for rank in range(WORLD):
        pid = os.fork()
        if pid:
            ranks.append(pid)
            continue
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(WORLD),
            "LOCAL_WORLD_SIZE": str(WORLD),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "chaos",
        }
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 70
        try:
            before(rank)
            recipe = str(folder.parent / "chaos.yaml")
            code = fit.main([recipe, "--into", str(folder), "--resume=auto", f"--trainer.devices={WORLD}"])
        finally:
            sys.stdout.flush()
            os._exit(code)
    return ranks


def wait(ranks: list[int]) -> list[int]:
    """Exit codes, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def killer(moment: str, save: int) -> Callable[[int], None]:
    """Has rank 0 kill itself in its `save`-th checkpoint: in the middle of its bytes, before they are flushed, or renamed."""

    def before(rank: int) -> None:
        count = 0

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        original = durable._File.__init__

        def opened(self: Any, path: Path, mode: str) -> None:
            nonlocal count
            original(self, path, mode)
            count += path.name == "last.ckpt.partial"
            if count < save:
                return
            if moment == "write":
                write = durable._File.write
                durable._File.write = lambda self, data: (write(self, bytes(data)[: len(data) // 2]), die())
            else:
                setattr(os, moment, die)

        durable._File.__init__ = opened

    return before


def saves(folder: Path, ranks: list[int], number: int) -> bool:
    """Waits for so many new checkpoints; False where a rank ends before."""
    path = folder / "checkpoints" / "last.ckpt"
    seen = {_identity(path)}
    while len(seen) <= number:
        if any(ended(pid) for pid in ranks):
            return False
        seen.add(_identity(path))
        time.sleep(0.002)
    return True


def _identity(path: Path) -> tuple[int, int]:
    try:
        return path.stat().st_ino, path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0, 0


def disturb(folder: Path, kind: str, rng: random.Random) -> dict[str, Any]:
    """One start of the run, and one kill; the exit codes and the seconds that the ranks took to end."""
    after, victim, delay = rng.randint(1, 3), rng.randrange(WORLD), rng.random() * 0.05
    if kind in ("write", "fsync", "replace"):
        ranks = start(folder, killer(kind, after))
        while not any(ended(pid) for pid in ranks):
            time.sleep(0.01)
        victim = 0
    else:
        ranks = start(folder)
        if saves(folder, ranks, after):
            time.sleep(delay)
            os.kill(ranks[victim], signal.Signals[kind].value)
    begun = time.monotonic()
    if kind == "SIGSTOP":
        wait_for = [pid for pid in ranks if pid != ranks[victim]]
        while not all(ended(pid) for pid in wait_for):
            time.sleep(0.01)
    seconds = time.monotonic() - begun
    if kind == "SIGSTOP":
        os.kill(ranks[victim], signal.SIGKILL)  # as a launcher does
    codes = wait(ranks)
    if kind != "SIGSTOP":
        seconds = time.monotonic() - begun
    return {"kind": kind, "victim": victim, "codes": codes, "seconds": seconds}


def expected(done: dict[str, Any]) -> bool:
    """Whether each rank ended as it should, in time; a signal that comes when the run is just done changes nothing."""
    if done["kind"] == "SIGTERM":
        codes = [128 + signal.SIGTERM] * WORLD
    else:
        codes = [LOST] * WORLD
        codes[done["victim"]] = -signal.SIGKILL
    return done["codes"] in (codes, [0] * WORLD) and done["seconds"] < BOUND_SECONDS


def final(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, float]]]:
    """The last checkpoint, the averaged weights, the metrics that no clock decides."""
    rows = [
        {name: value for name, value in row.items() if name not in ("images_per_second", "data_wait")}
        for row in read_metrics(folder / "metrics.csv")
    ]
    checkpoints = folder / "checkpoints"
    return (
        torch.load(checkpoints / "last.ckpt", weights_only=True),
        load_file(checkpoints / "averaged.safetensors"),
        rows,
    )


def main() -> None:
    folder, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    (folder / "chaos.yaml").write_text(RECIPE.replace("EPOCHS", str(1 + kills // 5)))
    whole, parts = folder / "whole", folder / "parts"
    assert wait(start(whole)) == [0] * WORLD, whole.with_suffix(".log").read_text()
    history, unreadable = [], []
    kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
    rng.shuffle(kinds)
    for kind in kinds:
        history.append(disturb(parts, kind, rng))
        for path in sorted(parts.glob("checkpoints/*.ckpt")):
            try:
                check_checkpoint(path)
            except Exception as error:
                unreadable.append(f"{path.name} after {kind}: {error}")
    finished = wait(start(parts))
    one, other = final(whole), final(parts)
    report = {
        "kills": len(history),
        "unexpected": [done for done in history if not expected(done)],
        "unreadable": unreadable,
        "finished": finished,
        "differences": same_state(list(one), list(other)),
        "slowest_seconds": max(done["seconds"] for done in history),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
