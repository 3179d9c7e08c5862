"""A real SLURM cluster of two nodes on this machine: `slurm-wlm` of Debian, its daemons started and stopped here."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import free_port

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SlurmdTimeout=15
KillWait=5
ReturnToService=2
JobRequeue=1
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=debug Nodes=ALL Default=YES MaxTime=1:00:00 State=UP
"""


def why_not() -> str | None:
    """Why this machine cannot have a cluster; None where it can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
    if missing:
        return f"there is no {', '.join(missing)} on this machine: apt-get install slurm-wlm"
    if os.geteuid() != 0:
        return "SLURM's daemons need root here"
    return None


class Cluster:
    """The running cluster; jobs see the environment of the test with `SLURM_CONF`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        conf = folder / "slurm.conf"
        ports = [free_port() for _ in range(3)]
        conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=ports))
        (folder / "state").mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(conf), "GLOO_SOCKET_IFNAME": "lo"}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *names: str) -> None:
        commands = {"ctld": ["slurmctld", "-D"], "n1": ["slurmd", "-D", "-N", "n1"], "n2": ["slurmd", "-D", "-N", "n2"]}
        for name in names or commands:
            with open(self.folder / f"{name}.out", "ab") as out:
                self.daemons[name] = subprocess.Popen(
                    [*commands[name], "-f", self.environment["SLURM_CONF"]],
                    env=self.environment,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
        up = {"idle", "mix", "alloc"}  # a job may be waiting for the node
        self.wait(lambda: up.issuperset(self.states().get(name, "") for name in ("n1", "n2")), 60, "both nodes up")

    def stop(self) -> None:
        subprocess.run(["scancel", "--state=RUNNING"], env=self.environment, check=False, capture_output=True)
        for name in ("n1", "n2", "ctld"):
            if name in self.daemons:
                self.daemons[name].terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=120, cwd=self.folder
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def states(self) -> dict[str, str]:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%N %t"], env=self.environment, capture_output=True, text=True
        )
        return dict(line.split() for line in done.stdout.splitlines())

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", number).split() if "=" in word)

    def kill_node(self, name: str) -> None:
        """As if the machine lost power: its slurmd and all that it started are gone at once."""
        daemon = self.daemons.pop(name)
        tasks, step_daemons = [], set()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environ = (process / "environ").read_bytes().split(b"\0")
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                parents_name = Path("/proc", parent, "comm").read_text()
            except OSError:
                continue
            mine = b"SLURM_CONF=" + self.environment["SLURM_CONF"].encode() in environ
            if mine and b"SLURMD_NODENAME=" + name.encode() in environ:
                tasks.append(int(process.name))
                if parents_name.startswith("slurmstepd"):
                    step_daemons.add(int(parent))
        for pid in (daemon.pid, *step_daemons, *tasks):  # who could tell of it goes first
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        daemon.wait()

    def wait(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"not within {seconds} s: {what}\n{self.diagnosis()}"
            time.sleep(0.3)

    def diagnosis(self) -> str:
        queue = subprocess.run(["squeue", "--long"], env=self.environment, capture_output=True, text=True).stdout
        logs = [path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("**/slurm-*.log"))]
        daemons = [path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log"))]
        return "\n".join([queue, str(self.states()), *logs, *daemons])


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster for a while; skips the test where there can be none, which CI does not accept."""
    reason = why_not()
    if reason is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
