"""An ablation as a SLURM array: a task a run. Imports no torch."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from xception_pl.ablation.file import Ablation
from xception_pl.run.slurm import batch_script


def array_script(
    ablation: Ablation, unfinished: Sequence[int], *, options: Sequence[str], overrides: dict[str, str], folder: Path
) -> str:
    """The sbatch script that runs the cells `unfinished` from `folder`.

    SLURM sends SIGTERM two minutes before a task's time ends: the run saves, and the same script goes on with it.

    Args:
        ablation: What to run.
        unfinished: Indices of its cells.
        options: Options of sbatch, such as `--partition=gpu`; they come last and win.
        overrides: Recipe keys of the command line.
        folder: Where the command was given.
    """
    own = [
        f"--job-name=ablate-{ablation.path.stem}",
        f"--array={','.join(map(str, unfinished))}",
        f"--output={ablation.folder}/slurm-%A_%a.log",
        "--signal=B:TERM@120",
    ]
    command = [sys.executable, "-m", "xception_pl.ablate", str(ablation.path)]
    command += [f"--{name}={value}" for name, value in overrides.items()]
    body = [f'exec {shlex.join(command)} --only="$SLURM_ARRAY_TASK_ID"']
    return batch_script([*own, *options], body, folder=folder)
