"""Who started a process, told from its environment alone."""

import pytest

from xception_pl.build import find_devices, find_nodes
from xception_pl.recipe import Recipe, RecipeError, accumulated_batches, check_batch
from xception_pl.run.config import TrainerConfig
from xception_pl.run.launcher import Launcher, find_launcher

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "16",
    "LOCAL_WORLD_SIZE": "8",
    "RANK": "11",
    "LOCAL_RANK": "3",
}
# What slurm-wlm 22.05 gives the second of two tasks, and their batch script
BATCH = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "fit"}
SRUN = {**BATCH, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}


def test_torchrun_and_srun_are_told_apart() -> None:
    assert find_launcher({}) is None
    assert find_launcher(TORCHRUN) == Launcher(name="torchrun", rank=11, local_rank=3, ranks=16, nodes=2)
    assert find_launcher(SRUN) == Launcher(name="srun", rank=1, local_rank=0, ranks=2, nodes=2)
    assert find_launcher({**SRUN, **TORCHRUN}) == find_launcher(TORCHRUN)  # torchrun inside a SLURM job
    assert find_launcher({**BATCH, "SLURM_NTASKS": "1"}) is None  # a job of one task starts its own processes
    assert find_launcher({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}) is None
    assert find_launcher({**BATCH, "SLURM_JOB_NAME": "interactive"}) is None  # salloc's shell


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (BATCH, "the SLURM job has 2 tasks and this process is the only one: begin the command with srun."),
        ({**TORCHRUN, "WORLD_SIZE": "12"}, "torchrun started 12 processes, 8 of them here"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "3"}, "srun started 3 tasks on 2 nodes"),
    ],
)
def test_uneven_and_forgotten_launches_are_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(RecipeError, match=said.replace("(", "\\(")):
        find_launcher(environment)


def test_devices_and_nodes_follow_the_launcher() -> None:
    launcher = find_launcher(TORCHRUN)
    assert find_devices(TrainerConfig(accelerator="cpu"), launcher) == ("cpu", 8, [])
    assert find_devices(TrainerConfig(accelerator="cpu", devices=8), launcher) == ("cpu", 8, [])
    assert find_nodes(TrainerConfig(), launcher) == (2, [])
    assert find_nodes(TrainerConfig(), None) == (1, [])
    (devices,) = find_devices(TrainerConfig(accelerator="cpu", devices=4), launcher)[2]
    assert devices.startswith("trainer.devices is 4, but torchrun started 8 processes a node:")
    (nodes,) = find_nodes(TrainerConfig(num_nodes=3), launcher)[1]
    assert nodes.startswith("trainer.num_nodes is 3, but torchrun started processes on 2 nodes:")
    (alone,) = find_nodes(TrainerConfig(num_nodes=2), None)[1]
    assert alone.startswith("trainer.num_nodes is 2, but nothing started this process on other nodes too:")


@pytest.mark.parametrize(
    ("ranks", "most", "expected"),
    [(1, None, 1), (1, 32, 8), (2, 32, 4), (8, 32, 1), (16, 32, 1), (1, 100, 4), (2, 24, 8), (1, 256, 1), (1, 255, 2)],
)
def test_accumulation_follows_from_the_world_and_the_memory(ranks: int, most: int | None, expected: int) -> None:
    recipe = Recipe()
    recipe.data.global_batch, recipe.trainer.max_device_batch = 256, most
    assert accumulated_batches(recipe, ranks) == expected
    assert check_batch(recipe, ranks, 1) == []


def test_batches_that_do_not_divide_name_the_numbers() -> None:
    recipe = Recipe()
    recipe.data.global_batch = 256
    (sentence,) = check_batch(recipe, 8, 3)
    assert sentence == (
        "data.global_batch 256 does not divide by trainer.devices 8 × trainer.num_nodes 3 = 24; "
        "choose a multiple of that."
    )
    recipe.trainer.accumulate_grad_batches, recipe.trainer.max_device_batch = 2, 32
    (sentence,) = check_batch(recipe, 2, 1)
    assert "trainer.max_device_batch is 32" in sentence
    assert "is 64 a device" in sentence
