"""The run folder: `runs/<recipe>/<time>/` and what is written there before training."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xception_pl.durable import write_text
from xception_pl.recipe import Recipe, RecipeError
from xception_pl.run.launcher import find_launcher

if TYPE_CHECKING:
    from xception_pl.run.resume import Resumed

STARTS = "starts.jsonl"
_CHOSEN = "XCEPTION_PL_OUTPUT"
"""Environment variable that tells the processes that Lightning starts beside this one what it chose."""
_PACKAGES = ("xception_pl", "torch", "torchvision", "lightning", "torchmetrics", "timm", "datasets", "pyarrow", "numpy")


def choose_output(recipe: Recipe, resume: str | None, into: str | None) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint that it goes on from; processes that Lightning starts beside this one get the same.

    Raises:
        RecipeError: what `--resume` or `--into` names cannot be used.
    """
    if find_launcher() is None and "LOCAL_RANK" in os.environ and _CHOSEN in os.environ:
        folder, checkpoint = json.loads(os.environ[_CHOSEN])
        return Path(folder), Path(checkpoint) if checkpoint else None
    given = None if into is None else given_folder(into, resume)
    found = None if resume is None else find_checkpoint(resume, recipe, into=given)
    output = given or (folder_of(found) if found is not None else None) or planned_folder(recipe)
    os.environ[_CHOSEN] = json.dumps([str(output), str(found) if found else None])
    return output, found


def planned_folder(recipe: Recipe) -> Path:
    """A folder for a new run."""
    assert recipe.run.name is not None
    parent = Path(recipe.run.folder) / recipe.run.name
    stem = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    taken = sum(1 for _ in parent.glob(f"{stem}*"))
    return parent / (f"{stem}_{taken}" if taken else stem)


def find_checkpoint(resume: str, recipe: Recipe, *, into: Path | None = None) -> Path | None:
    """The file that `--resume` names: `last`, `auto`, a checkpoint, or a run folder.

    `last` is the newest run of the recipe. `auto` is for jobs that are started again, the first time and each next time
    with the same command: the checkpoint in `into`, or, where no folder is given, of the newest run of the recipe
    unless that has finished; None where there is none and the run is to start.

    Raises:
        RecipeError: where there is none.
    """
    assert recipe.run.name is not None
    parent = Path(recipe.run.folder) / recipe.run.name
    if resume == "auto" and into is not None:
        path = into / "checkpoints" / "last.ckpt"
        return path if path.is_file() else None
    if resume in ("last", "auto"):
        found = sorted(parent.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
        if resume == "auto":
            return found[-1] if found and not (found[-1].parents[1] / "results.json").is_file() else None
        if not found:
            raise RecipeError(
                [f"--resume last: no run under {parent} has a checkpoint yet; start one without --resume."]
            )
        return found[-1]
    path = Path(resume)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise RecipeError([f"--resume: there is no checkpoint {path}; give a .ckpt file, a run folder, last or auto."])
    return path


def given_folder(into: str, resume: str | None) -> Path:
    """The folder that `--into` names.

    Raises:
        RecipeError: it holds a run, and nothing says that this one goes on with it.
    """
    folder = Path(into)
    if resume is None and (folder / "checkpoints").is_dir():
        raise RecipeError([f"--into {into} holds a run already; add --resume auto to go on with it, or give another."])
    return folder


def folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, or None for a file on its own."""
    folder = checkpoint.parent.parent
    return folder if checkpoint.parent.name == "checkpoints" and (folder / "recipe.yaml").is_file() else None


def write_description(folder: Path, recipe: Recipe, resumed: "Resumed | None" = None) -> None:
    """Writes the resolved recipe and the environment, and adds this start to `starts.jsonl`.

    `recipe.yaml` is that of the newest start; a recipe that changed midway is to be seen in `starts.jsonl`: a line a start,
    with the step, the checkpoint and the keys that changed.
    """
    (folder / "results.json").unlink(missing_ok=True)  # a finished run that goes on is unfinished again
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_text(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    start = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": 0 if resumed is None else resumed.step,
        "checkpoint": None if resumed is None else str(resumed.checkpoint),
        "changed": {} if resumed is None else resumed.changed,
    }
    starts = folder / STARTS
    before = starts.read_text(encoding="utf-8") if starts.is_file() else ""
    write_text(starts, before + json.dumps(start) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, in order; empty for one of a version that did not note them."""
    starts = folder / STARTS
    return [json.loads(line) for line in starts.read_text(encoding="utf-8").splitlines()] if starts.is_file() else []


def write_results(folder: Path, results: dict[str, float]) -> None:
    """Writes `results.json`, the mark of a run that has finished: last step, parameters and the newest of each metric."""
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, git commit, hardware and command: what a reader needs to trust or repeat a number."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(["python", "-m", "xception_pl.fit", *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the package's own checkout, and whether it has changes; None when installed from a wheel."""
    here = Path(__file__).resolve().parents[2]

    def ask(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")) != here:
            return None
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
