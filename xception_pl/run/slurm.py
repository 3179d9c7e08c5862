"""Batch jobs of SLURM: their script, their submission, what a partition has. Imports no torch."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xception_pl.recipe import RecipeError, nearest


def batch_script(options: Sequence[str], body: Sequence[str], *, folder: Path, title: str = "") -> str:
    """A script for sbatch.

    Args:
        options: Of sbatch, such as `--partition=gpu`; where two contradict each other the later one wins.
        body: Lines of bash, run in `folder`; the first that fails ends the job.
        folder: Where the command was given.
        title: A comment on what the job is.
    """
    lines = [
        "#!/bin/bash",
        *([f"# {title}"] if title else []),
        *(f"#SBATCH {option}" for option in options),
        "set -euo pipefail",
        f"cd {shlex.quote(str(folder))}",
        *body,
    ]
    return "\n".join(lines) + "\n"


def sbatch(script: Path) -> str:
    """Submits a script; returns the job's id.

    Raises:
        RecipeError: there is no sbatch, or it refuses the script; with its own words.
    """
    need_sbatch()
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RecipeError([f"sbatch refuses {script}: {' '.join(done.stderr.split())}"])
    return done.stdout.strip().partition(";")[0]


def need_sbatch() -> None:
    """Raises RecipeError where this machine cannot submit jobs."""
    if shutil.which("sbatch") is None:
        raise RecipeError(
            ["there is no sbatch on this machine: submit from a login node of the cluster, or only write the script."]
        )


@dataclass(frozen=True)
class Node:
    """A node of a partition."""

    name: str
    cpus: int
    gpus: int
    limit_seconds: int | None
    """Longest job that its partition takes; None for any."""


def partition_nodes(partition: str | None) -> list[Node] | None:
    """The nodes of a partition, or of the default one; None where there is no sinfo to ask.

    Raises:
        RecipeError: there is no such partition.
    """
    if shutil.which("sinfo") is None:
        return None
    command = ["sinfo", "--noheader", "--Node", "--format=%P|%N|%c|%G|%l"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RecipeError([f"sinfo does not answer: {' '.join(done.stderr.split())}"])
    rows = [line.strip().split("|") for line in done.stdout.splitlines() if line.strip()]
    wanted = partition or next((row[0].rstrip("*") for row in rows if row[0].endswith("*")), None)
    names = sorted({row[0].rstrip("*") for row in rows})
    if wanted is None or wanted not in names:
        what = f"there is no partition {partition}" if partition else "the cluster has no default partition"
        raise RecipeError([f"{what}; there are {', '.join(names)}.{nearest(partition or '', names)}"])
    return [
        Node(name, int(cpus.rstrip("+")), _gpus(gres), parse_time(limit))
        for owner, name, cpus, gres, limit in rows
        if owner.rstrip("*") == wanted
    ]


def _gpus(gres: str) -> int:
    """GPUs in a list of generic resources such as `gpu:a100:8(S:0-1),nvme:1`."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres))


def parse_time(text: str) -> int | None:
    """Seconds of a time in SLURM's notation (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S); None for no limit.

    Raises:
        ValueError: it is none.
    """
    if text.lower() in ("infinite", "unlimited"):
        return None
    if not re.fullmatch(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2}", text):
        raise ValueError(f"{text!r} is no time such as 90 (minutes), 24:00:00 or 3-12 (days-hours)")
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: (0, parts[0], 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
