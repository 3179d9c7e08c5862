"""The submit command: its script, and what it refuses before SLURM is asked. `tests/test_cluster.py` runs it for real."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from xception_pl.run.slurm import _gpus, parse_time
from xception_pl.submit import main

TINY = """
model: {num_classes: 10, width: 0.125, middle_blocks: 1}
data: {source: sample, val_split: test, image_size: 71, global_batch: 64, workers: 3}
"""
NODES = """\
gpu*|n1|64|gpu:a100:8(S:0-1)|2-00:00:00
gpu*|n2|64|gpu:a100:8(S:0-1)|2-00:00:00
gpu*|n3|32|gpu:4|2-00:00:00
cpu|n1|64|gpu:a100:8|infinite
cpu|n4|16|(null)|infinite
"""


def write_command(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(autouse=True)
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from; sinfo tells of `NODES`, sbatch notes what it was given."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (tmp_path / "nodes").write_text(NODES)
    write_command(commands, "sinfo", f"cat {tmp_path}/nodes")
    write_command(commands, "sbatch", f"cp $2 {tmp_path}/submitted; echo 4711")
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    work = tmp_path / "work"
    work.mkdir()
    (work / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(work)
    return work


def test_the_script_is_complete_and_bash_reads_it(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--nodes", "2", "--gpus-per-node=8", "--time=24:00:00", "--partition", "gpu", "--optim.lr=0.1"]
    assert main(["tiny.yaml", *argv, "--sbatch=--account=vision --signal=USR1@300"]) == 0
    (folder,) = cluster.glob("runs/tiny/*")
    script = (folder / "job.sbatch").read_text()
    assert (cluster.parent / "submitted").read_text() == script
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")] == [
        "--job-name=tiny",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=4",
        "--time=24:00:00",
        "--partition=gpu",
        f"--output={folder}/slurm-%j.log",
        "--open-mode=append",
        "--signal=USR1@120",
        "--requeue",
        "--account=vision",
        "--signal=USR1@300",
    ]
    for setting in ("MASTER_ADDR=", "MASTER_PORT=", "OMP_NUM_THREADS=1", "NCCL_DEBUG=", "SRUN_CPUS_PER_TASK="):
        assert f"\nexport {setting}" in script
    assert lines[-1].startswith("srun ")
    assert lines[-1].endswith(f"-m xception_pl.fit {folder}/recipe.yaml --into {folder} --resume auto")
    subprocess.run(["bash", "-n", folder / "job.sbatch"], check=True)
    # the recipe is frozen beside it: what is edited later changes nothing
    frozen = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (frozen["optim"]["lr"], frozen["run"]["name"]) == (0.1, "tiny")
    assert [frozen["trainer"][key] for key in ("accelerator", "devices", "num_nodes")] == ["gpu", 8, 2]
    printed = capsys.readouterr().out
    assert "batch     64 = 16 devices × 4 × 1 accumulated" in printed
    assert "submitted job 4711" in printed
    assert f"tail -F {folder}/slurm-4711.log" in printed


def test_a_dry_run_shows_the_script_and_writes_nothing(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny.yaml", "--gpus-per-node=0", "--tasks-per-node=4", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --ntasks-per-node=4\n" in printed
    assert "gpus-per-node" not in printed.partition("#SBATCH")[2]
    assert "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}\n" in printed
    assert [path.name for path in cluster.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            "--nodes=3 --gpus-per-node=8",
            "data.global_batch 64 does not divide by trainer.devices 8 × trainer.num_nodes 3",
        ),
        ("--gpus-per-node=16", "--gpus-per-node 16: the default partition has nodes with 8 GPUs at most."),
        ("--nodes=4 --gpus-per-node=8 --partition=gpu", "--nodes 4: partition gpu has 2 nodes with 8 GPUs or more."),
        ("--gpus-per-node=8 --cpus-per-task=16", "--nodes 1: the default partition has 0 nodes with 8 GPUs or more."),
        ("--gpus-per-node=8 --time=3-00", "--time 3-00: the default partition takes jobs of 48 hours at most."),
        ("--gpus-per-node=8 --time=soon", "--time: 'soon' is no time such as"),
        ("--gpus-per-node=8 --partition=gup", "there is no partition gup; there are cpu, gpu. Did you mean gpu?"),
        ("--nodes=2", "--gpus-per-node is needed"),
        ("--nodes=0 --gpus-per-node=8", "--nodes must be a whole number, at least 1, not 0."),
        ("--gpus-per-node=8 --tasks-per-node=4", "--tasks-per-node 4 is not --gpus-per-node 8"),
        ("--gpus-per-node=8 --trainer.devices=4", "--trainer.devices=4 is not the job's 8: leave it out."),
        ("--gpus-per-node=8 --optim.lrr=4", "unknown option --optim.lrr. Did you mean optim.lr?"),
        ("--gpus-per-node=8 --model.num_classes=3", "10 classes"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(
    cluster: Path, capsys: pytest.CaptureFixture[str], argv: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tiny.yaml", *argv.split()])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
    assert not (cluster / "runs").exists()


def test_a_cluster_without_gpus_is_told(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster.parent / "nodes").write_text("debug*|n1|2|(null)|infinite\n")
    with pytest.raises(SystemExit):
        main(["tiny.yaml", "--gpus-per-node=8"])
    assert "--gpus-per-node 8: the default partition has no GPUs." in capsys.readouterr().err


def test_without_sbatch_only_a_dry_run_goes(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(cluster))
    with pytest.raises(SystemExit):
        main(["tiny.yaml", "--gpus-per-node=8"])
    assert "there is no sbatch on this machine" in capsys.readouterr().err
    assert main(["tiny.yaml", "--gpus-per-node=8", "--dry-run"]) == 0


def test_the_hand_written_script_agrees_with_the_command(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from xception_pl.recipe import find_recipe

    written = find_recipe("recipes/slurm/imagenet.sbatch").read_text()
    subprocess.run(["bash", "-n", find_recipe("recipes/slurm/imagenet.sbatch")], check=True)
    assert main(["tiny.yaml", "--nodes=1", "--gpus-per-node=8", "--time=24:00:00", "--dry-run"]) == 0
    made = capsys.readouterr().out
    options = {line.partition("=")[0] for line in made.splitlines() if line.startswith("#SBATCH")}
    assert options == {line.partition("=")[0] for line in written.splitlines() if line.startswith("#SBATCH")}
    exports = [line.split("=")[0] for line in made.splitlines() if line.startswith("export ")]
    assert exports == [line.split("=")[0] for line in written.splitlines() if line.startswith("export ")]
    for line in made.splitlines():
        if line.startswith(("first=", "export MASTER")):
            assert line in written.splitlines()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("3-12", 302400), ("1-0:1", 86460), ("1-00:00:01", 86401)],
)
def test_times_are_those_of_slurm(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds
    assert parse_time("infinite") is None


def test_gpus_are_counted_in_lists_of_resources() -> None:
    assert [_gpus(x) for x in ("(null)", "gpu:8", "gpu:a100:4(S:0),nvme:1,gpu:v100:2", "mygpu:3")] == [0, 8, 6, 0]


def test_help_needs_no_torch() -> None:
    code = "import sys; from xception_pl.submit import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True, check=True)  # type: ignore[attr-defined]
    assert "--gpus-per-node" in done.stdout
