"""Putting this SLURM job back into the queue; it goes on from its last checkpoint. Imports no library."""

import os
import subprocess

ENOUGH_FAILURES = 3
"""Starts that may end in a failure without having saved anything; one more is no bad luck."""


def requeue(*, failed: bool = False, saved: bool = True) -> str | None:
    """Asks SLURM to requeue the job that this process belongs to.

    Args:
        failed: the job ends in a failure, not on a signal.
        saved: this start has saved a checkpoint: what failed was not in vain.

    Returns:
        A sentence on what was done; None outside SLURM.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    starts = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
    if failed and not saved and starts >= ENOUGH_FAILURES:
        return f"SLURM job {job} is not requeued: {starts} starts failed, the last without a checkpoint."
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM job {job} could not be requeued: {error}."
    if done.returncode:
        return f"SLURM job {job} could not be requeued: {' '.join(done.stderr.split()) or 'scontrol failed'}."
    return f"SLURM job {job} is requeued."
