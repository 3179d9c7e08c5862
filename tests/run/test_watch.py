"""Ranks without training: processes that watch each other, of which one is killed, stopped, hangs or fails."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xception_pl.run.watch import LOST

RANK = """
import sys, time
from pathlib import Path
from xception_pl.run.watch import Watch
rank, does = int(sys.argv[1]), sys.argv[2]
def asked(sentence):
    print("requeue", flush=True)
watch = Watch(rank, 3, silence_seconds=4, stall_seconds=3 if does == "wait" else 60, at_loss=asked)
if rank == 0:
    Path("port.new").write_text(str(watch.listen()))
    Path("port.new").rename("port")
else:
    while not Path("port").exists():
        time.sleep(0.02)
    watch.connect("127.0.0.1", int(Path("port").read_text()))
step = 0
Path(f"up {rank}").touch()
while not Path("finish").exists():
    time.sleep(0.05)
    if step < {"hang": 5, "wait": 7}.get(does, 10**9):  # the thread goes on talking
        step += 1
        watch.at(f"step {step}")
    if does == "fail" and step == 10:
        watch.fail("ZeroDivisionError: of course")
if does == "late":
    time.sleep(1)
watch.close()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list["subprocess.Popen[str]"]]]:
    started: list[subprocess.Popen[str]] = []

    def ranks(*does: str) -> list["subprocess.Popen[str]"]:
        for rank, what in enumerate(does):
            command = [sys.executable, "-c", RANK, str(rank), what]
            started.append(
                subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("up *"))) < len(does):
            assert time.monotonic() < end
            time.sleep(0.05)
        return started

    yield ranks
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ends(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    return [(p.wait(60), *p.communicate()) for p in processes]


def test_a_run_that_ends_well_is_left_alone(
    start: Callable[..., list["subprocess.Popen[str]"]], tmp_path: Path
) -> None:
    ranks = start("run", "late", "run")
    (tmp_path / "finish").touch()
    assert ends(ranks) == [(0, "", "")] * 3


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_and_ends_the_others(
    start: Callable[..., list["subprocess.Popen[str]"]], victim: int
) -> None:
    ranks = start("run", "run", "run")
    time.sleep(1.5)
    ranks[victim].kill()
    ended = ends(ranks)
    assert [code for code, _, _ in ended] == [-signal.SIGKILL if rank == victim else LOST for rank in range(3)]
    said = [(out, err) for out, err in (end[1:] for end in ended) if err]
    assert len(said) == 1
    assert said[0][0] == "requeue\n"
    assert said[0][1].startswith(f"error: rank {victim}")
    assert " is gone; it was at step " in said[0][1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_ends_the_others(
    start: Callable[..., list["subprocess.Popen[str]"]], victim: int
) -> None:
    ranks = start("run", "run", "run")
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    others = [rank for rank in range(3) if rank != victim]
    ended = ends([ranks[rank] for rank in others])
    assert [code for code, _, _ in ended] == [LOST, LOST]
    (said,) = [err for _, _, err in ended if err]
    assert said.startswith(f"error: rank {victim}")
    assert "has been silent for 4 s" in said
    os.kill(ranks[victim].pid, signal.SIGCONT)  # it finds the others gone
    assert ranks[victim].wait(60) == LOST


def test_a_suspended_job_goes_on(start: Callable[..., list["subprocess.Popen[str]"]], tmp_path: Path) -> None:
    """Ctrl-Z, or `scontrol suspend`: for longer than the bound, and nobody is blamed."""
    ranks = start("run", "run", "run")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            os.kill(rank.pid, number)
        time.sleep(6)
    (tmp_path / "finish").touch()
    assert ends(ranks) == [(0, "", "")] * 3


def test_a_rank_that_hangs_in_a_call_is_named(start: Callable[..., list["subprocess.Popen[str]"]]) -> None:
    ended = ends(start("wait", "hang", "wait"))
    assert [code for code, _, _ in ended] == [LOST, LOST, LOST]
    (said,) = [err for _, _, err in ended if err]
    assert said.startswith("error: no rank made progress for 3 s; furthest behind is rank 1 (")
    assert "), at step 5. " in said


def test_a_rank_that_fails_says_so_once(start: Callable[..., list["subprocess.Popen[str]"]]) -> None:
    ended = ends(start("run", "fail", "run"))
    assert [code for code, _, _ in ended] == [1, 1, 1]
    (said,) = [err for _, _, err in ended if err]
    assert said.startswith("error: rank 1 (")
    assert said.endswith("): ZeroDivisionError: of course\n")
