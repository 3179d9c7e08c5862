"""Two ranks on this machine, as `fit` starts them: one is lost, and the other does not wait for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from xception_pl.run.watch import LOST

pytestmark = pytest.mark.slow
TINY = """
model: {num_classes: 10, width: 0.05, middle_blocks: 1}
data: {source: sample, val_split: test, image_size: 71, global_batch: 4, workers: WORKERS, shuffle_window: 512}
optim: {lr: 0.02}
trainer: {max_epochs: 1000, limit_train_batches: 40, limit_val_batches: 2, enable_progress_bar: false, devices: 2}
run: {tensorboard: false, save_every_steps: 1, rank_timeout_seconds: 5}
"""


def start(folder: Path, workers: int = 0) -> "tuple[subprocess.Popen[str], int]":
    """A run that has saved its first checkpoint, and the process of its rank 1."""
    (folder / "tiny.yaml").write_text(TINY.replace("WORKERS", str(workers)))
    command = [sys.executable, "-m", "xception_pl.fit", "tiny.yaml", "--into", "run", "--resume=auto"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not (folder / "run/checkpoints/last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (rank1,) = [int(pid) for pid in children if b"xception_pl.fit" in Path(f"/proc/{pid}/cmdline").read_bytes()][:1]
    return process, rank1


def assert_gone(pid: int) -> None:
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def assert_good_checkpoint(folder: Path) -> None:
    assert torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] > 0


@pytest.mark.parametrize(("number", "says"), [(signal.SIGKILL, "error: "), (signal.SIGSTOP, "has been silent for 5 s")])
def test_a_lost_rank_ends_the_run(tmp_path: Path, number: signal.Signals, says: str) -> None:
    process, rank1 = start(tmp_path)
    os.kill(rank1, number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == LOST, errors
    assert says in errors
    assert "Traceback" not in errors
    assert_gone(rank1)
    assert_good_checkpoint(tmp_path)


@pytest.mark.parametrize("stopped", [False, True])
def test_no_rank_outlives_rank_0(tmp_path: Path, stopped: bool) -> None:
    process, rank1 = start(tmp_path)
    if stopped:
        os.kill(rank1, signal.SIGSTOP)
    process.kill()
    _, errors = process.communicate(timeout=200)
    assert "error: rank 0 (" in errors
    assert " is gone; it was at " in errors
    assert_gone(rank1)
    assert_good_checkpoint(tmp_path)


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path: Path) -> None:
    """With loader workers; the exit code is the signal's."""
    process, rank1 = start(tmp_path, workers=1)
    os.kill(rank1, signal.SIGTERM)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert printed.count("SIGTERM: stopped after step ") == 1
    assert "Traceback" not in errors
    assert_gone(rank1)
