"""torchrun with two agents, as on two nodes: a process that dies is started again, an agent that dies ends the job; no weight changes."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.processes import free_port, on_ranks, printed

pytestmark = pytest.mark.slow
STEPS = 200
RECIPE = f"""
model: {{num_classes: 10, width: 0.125, middle_blocks: 1, bn_momentum: 0.1, dropout: 0.5}}
data: {{source: sample, val_split: test, image_size: 71, global_batch: 8, workers: 0, shuffle_window: 512}}
optim: {{lr: 0.02, ema_decay: 0.9, schedule: cosine, decay_rate: 0.94}}
trainer: {{accelerator: cpu, max_epochs: 1, limit_train_batches: {STEPS}, log_every_n_steps: 1}}
run: {{tensorboard: false, save_every_steps: 5}}
"""


def fit(rank: int, argv: list[str]) -> int:
    from xception_pl.fit import main

    return main(argv)


class Agents:
    """The two agents, each with one process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            "--max-restarts=3",
        ]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}", "--local-addr=127.0.0.1"]
        command += ["-m", "xception_pl.fit", "tiny.yaml", "--into", "run", "--resume", "auto"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        with open(self.folder / f"agent {len(self.processes)}", "wb") as log:
            self.processes.append(
                subprocess.Popen(
                    command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def workers(self, *agents: subprocess.Popen[bytes]) -> list[int]:
        """Of these agents, or of all that live."""
        parents = {process.pid for process in agents or self.processes if process.poll() is None}
        found = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                status = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(status[1]) in parents and status[0] != "Z":
                found.append(int(pid))
        return found

    def first_listens(self) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(self.folder.glob("agent *")))

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 240
        while not holds():
            assert time.monotonic() < end, f"{what}\n{self.logs()}"
            time.sleep(0.2)

    def step(self) -> int:
        metrics = self.folder / "run" / "metrics.csv"
        if not metrics.exists():
            return -1
        return max((int(row["step"]) for row in csv.DictReader(metrics.read_text().splitlines())), default=-1)

    def kill(self) -> None:
        for process in self.processes:
            for pid in [process.pid, *self.workers(process)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(RECIPE)
    assert on_ranks(2, fit, folder, ["tiny.yaml", "--into=run"], nodes=2) == [0, 0], printed(folder, "err")
    return folder / "run"


def test_a_process_and_an_agent_that_die_change_no_weight(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "disturbed"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(RECIPE)
    agents = Agents(folder)
    try:
        agents.start()
        agents.wait(agents.first_listens, "the first agent holds the rendezvous, which is lost with it")
        agents.start()
        agents.wait(lambda: agents.step() >= 20, "trains")
        workers = agents.workers()
        assert len(workers) == 2
        os.kill(max(workers), signal.SIGKILL)
        agents.wait(lambda: len(set(agents.workers()) - set(workers)) == 2, "torchrun starts both processes again")
        reached = agents.step()
        agents.wait(lambda: agents.step() >= reached + 40, "trains again")

        first, second = agents.processes
        for pid in [second.pid, *agents.workers(second)]:
            os.kill(pid, signal.SIGKILL)
        second.wait()
        agents.wait(lambda: "is gone; it was at" in agents.logs(), "the rank that is left names the one that is lost")
        first.terminate()  # it would wait for the node; a scheduler, or who watches, starts all of it again
        first.wait(60)
        agents.port = free_port()
        agents.start()
        agents.wait(agents.first_listens, "the first agent is back")
        agents.start()
        again = agents.processes[2:]
        agents.wait(lambda: all(process.poll() is not None for process in again), "ends")
        assert [process.returncode for process in again] == [0, 0], agents.logs()
    finally:
        agents.kill()
    results = json.loads((folder / "run" / "results.json").read_text())
    assert (results["steps"], results["val_images"]) == (STEPS, 1000)
    states = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (undisturbed, folder / "run")
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
