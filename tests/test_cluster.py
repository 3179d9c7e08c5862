"""On a real cluster of two nodes: the submitted job trains, is preempted, requeued, loses a node, and ends the same."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.slurm_cluster import Cluster, running_cluster

RECIPE = """
model: {num_classes: 10, width: 0.125, middle_blocks: 1, bn_momentum: 0.1, dropout: 0.5}
data: {source: sample, val_split: test, image_size: 71, global_batch: 8, workers: 0, shuffle_window: 512}
optim: {lr: 0.02, ema_decay: 0.9, schedule: cosine, decay_rate: 0.94}
trainer: {max_epochs: 1, log_every_n_steps: 1}
run: {tensorboard: false, save_every_steps: 5}
"""
START = 180  # seconds that two processes may take to import and meet on a busy machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm")) as running:
        (running.folder / "tiny.yaml").write_text(RECIPE)
        yield running


def submit(cluster: Cluster, name: str, steps: int, *overrides: str) -> tuple[str, Path]:
    """Submits the recipe to both nodes; the job and its run's folder."""
    world = ["--nodes", "2", "--gpus-per-node", "0", "--time", "20:00"]
    more = [f"--run.name={name}", f"--trainer.limit_train_batches={steps}", *overrides]
    printed = cluster.call(sys.executable, "-m", "xception_pl.submit", "tiny.yaml", *world, *more)
    found = re.search(r"submitted job (\d+): (.*)/job.sbatch", printed)
    assert found, printed
    return found[1], Path(found[2])


def finish(cluster: Cluster, job: str, folder: Path) -> dict[str, float]:
    """Waits for the job to end well; the run's results."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    cluster.wait(lambda: cluster.job(job)["JobState"] in ended, START + 120, f"job {job} ends")
    assert cluster.job(job)["JobState"] == "COMPLETED", cluster.diagnosis()
    results: dict[str, float] = json.loads((folder / "results.json").read_text())
    return results


def wait_for_step(cluster: Cluster, job: str, folder: Path, step: int, start: int) -> None:
    """Waits until start number `start` of the job, from 0, has gone beyond a step."""

    def reached() -> bool:
        if cluster.job(job)["Restarts"] != str(start) or not (folder / "metrics.csv").exists():
            return False
        with open(folder / "metrics.csv", newline="") as file:
            return any(int(row["step"]) >= step for row in csv.DictReader(file))

    cluster.wait(reached, START, f"job {job}, start {start}, at step {step}")


def log_of(folder: Path, job: str) -> str:
    return (folder / f"slurm-{job}.log").read_text()


def assert_same_weights(one: Path, other: Path) -> None:
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (one, other)
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_two_nodes_train_together(cluster: Cluster) -> None:
    job, folder = submit(cluster, "short", 6, "--trainer.limit_val_batches=1")
    results = finish(cluster, job, folder)
    assert (results["steps"], results["val_images"]) == (6, 128)  # 2 ranks × 64
    log = log_of(folder, job)
    assert log.count("batch     8 = 2 devices × 4 × 1 accumulated") == 1
    assert log.count("on 1 × cpu × 2 nodes") == 1
    assert "Traceback" not in log


STEPS = 150


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Path:
    job, folder = submit(cluster, "undisturbed", STEPS)
    assert finish(cluster, job, folder)["val_images"] == 1000  # each held-out image once
    return folder


def assert_went_on(cluster: Cluster, job: str, folder: Path, undisturbed: Path) -> None:
    """The job ends, with the weights and the rows of the run that nothing disturbed."""
    results = finish(cluster, job, folder)
    assert (results["steps"], results["val_images"]) == (STEPS, 1000)
    assert_same_weights(undisturbed, folder)
    rows = [int(row["step"]) for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines()) if row["lr"]]
    assert rows == list(range(1, STEPS + 1))  # no step twice, none left out


@pytest.mark.slow
def test_preemption_and_requeueing_change_no_weight(cluster: Cluster, undisturbed: Path) -> None:
    job, folder = submit(cluster, "requeued", STEPS)
    wait_for_step(cluster, job, folder, 10, start=0)
    cluster.call("scancel", "--signal=USR1", job)  # as SLURM does before the time ends
    wait_for_step(cluster, job, folder, 40, start=1)
    assert "SIGUSR1: stopped after step" in log_of(folder, job)
    cluster.call("scontrol", "requeue", job)
    assert_went_on(cluster, job, folder, undisturbed)
    assert cluster.job(job)["Restarts"] == "2"


@pytest.mark.slow
def test_a_node_that_dies_changes_no_weight(cluster: Cluster, undisturbed: Path) -> None:
    job, folder = submit(cluster, "smaller", STEPS)
    wait_for_step(cluster, job, folder, 10, start=0)
    cluster.kill_node("n2")
    cluster.wait(lambda: cluster.job(job)["JobState"] in ("PENDING", "REQUEUED", "CONFIGURING"), 120, "requeued")
    assert re.search(r"error: rank 1 .* is gone", log_of(folder, job))
    cluster.start("n2")
    assert_went_on(cluster, job, folder, undisturbed)


@pytest.mark.slow
def test_an_ablation_runs_as_an_array(cluster: Cluster) -> None:
    (cluster.folder / "ablation.yaml").write_text(
        "base: tiny.yaml\nvariants:\n  one: {optim.lr: 0.02}\n  two: {optim.lr: 0.01}\nseeds: [0]\n"
    )
    small = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    printed = cluster.call(sys.executable, "-m", "xception_pl.ablate", "ablation.yaml", "--slurm", "--submit", *small)
    job = re.search(r"submitted job array (\d+)", printed)
    assert job, printed
    cluster.wait(
        lambda: not cluster.call("squeue", "--noheader", "--job", job[1]).strip(), START + 60, "the array ends"
    )
    done = subprocess.run(
        [sys.executable, "-m", "xception_pl.ablate", "ablation.yaml", "--dry-run", *small],
        cwd=cluster.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("finished") == 2, done.stdout + cluster.diagnosis()
