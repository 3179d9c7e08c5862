"""Who started this process beside others: torchrun, srun, or nobody. Imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from xception_pl.recipe import RecipeError


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A program that started the processes of a job, one a device, on its nodes."""

    name: Literal["torchrun", "srun"]
    rank: int
    """Of this process among all."""
    local_rank: int
    """Of this process on its node."""
    ranks: int
    """Processes of the job."""
    nodes: int

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node, as many on one as on the other."""
        return self.ranks // self.nodes


def find_launcher(environ: Mapping[str, str] = os.environ) -> Launcher | None:
    """What the environment says; None where this process was started alone, in a SLURM job or out of one.

    Raises:
        RecipeError: the nodes run different numbers of processes, or a SLURM job of several tasks was not begun with srun.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        ranks, on_node = int(environ["WORLD_SIZE"]), int(environ["LOCAL_WORLD_SIZE"])
        if ranks % on_node:
            raise RecipeError(
                [
                    f"torchrun started {ranks} processes, {on_node} of them here: give each node the same --nproc-per-node."
                ]
            )
        rank, local_rank = int(environ["RANK"]), int(environ["LOCAL_RANK"])
        return Launcher(name="torchrun", rank=rank, local_rank=local_rank, ranks=ranks, nodes=ranks // on_node)
    if "SLURM_STEP_NUM_TASKS" not in environ:  # set by srun alone, not in a batch script
        tasks = int(environ.get("SLURM_NTASKS", 1))
        if tasks > 1 and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
            raise RecipeError(
                [f"the SLURM job has {tasks} tasks and this process is the only one: begin the command with srun."]
            )
        return None
    ranks, nodes = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_STEP_NUM_NODES"])
    if ranks % nodes:
        raise RecipeError([f"srun started {ranks} tasks on {nodes} nodes: give each node the same --ntasks-per-node."])
    rank, local_rank = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
    if ranks == 1:
        return None
    return Launcher(name="srun", rank=rank, local_rank=local_rank, ranks=ranks, nodes=nodes)
