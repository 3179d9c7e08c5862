"""What SLURM is asked for, seen by a scontrol that notes its arguments."""

from pathlib import Path

import pytest

from xception_pl.run.requeue import requeue


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the arguments are noted; job 7 is the one that runs."""
    program = tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$2" != 8 ] || {{ echo no such job >&2; exit 1; }}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "asked"


def test_a_job_is_requeued(asked: Path) -> None:
    assert requeue() == "SLURM job 7 is requeued."
    assert asked.read_text() == "requeue 7\n"


def test_a_task_of_an_array_is_requeued_alone(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue() == "SLURM job 5_2 is requeued."


def test_a_refusal_is_told(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert requeue() == "SLURM job 8 could not be requeued: no such job."


def test_a_job_that_only_fails_is_not_requeued_for_ever(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert requeue(failed=True, saved=True) == "SLURM job 7 is requeued."
    assert (
        requeue(failed=True, saved=False)
        == "SLURM job 7 is not requeued: 3 starts failed, the last without a checkpoint."
    )
    assert asked.read_text() == "requeue 7\n"


def test_outside_slurm_nothing_happens(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue() is None
    assert not asked.exists()
