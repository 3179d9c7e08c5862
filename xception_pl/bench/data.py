"""How fast this machine turns image files into training crops and batches, and which part is the slowest.

One core: all ways see the same images in the same run, in turns, so that a busy machine slows all of them alike; a rate is images
by the processor's seconds, a ratio is the median over the turns. Batches, and starts of a run, are by the clock: they want a
machine that does nothing else.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xception_pl.bench.crops import DALI, DECODERS, OURS, READ, TIMM

if TYPE_CHECKING:
    from xception_pl.data.config import DataConfig
    from xception_pl.recipe import Recipe

PARTS = ("crops", "batches", "starts")


def main(arguments: list[str]) -> int:
    """Command line of `python -m xception_pl.bench data`."""
    parser = argparse.ArgumentParser(prog="python -m xception_pl.bench data", description=__doc__)
    parser.add_argument("source", nargs="?", type=Path, metavar="RECIPE|FOLDER", help="a recipe (.yaml), whose data "
                        "and crops are measured, or a folder of images; without either, 500 × 375 JPEGs are made "
                        "from scikit-image's photographs")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="crops on one core, batches through the "
                        "loaders (local Parquet, loopback hub), starts of a run on ImageNet's layout (default: all)")  # fmt: skip
    parser.add_argument("--images", type=int, default=128, help="use at most so many images (default %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="times that each way is measured (default %(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="loader processes (default %(default)s)")
    parser.add_argument("--gpu-rate", type=float, help="images a second that one GPU trains, to count its cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args(arguments)
    for name in ("images", "turns", "workers"):
        if getattr(options, name) < 1:
            print(f"--{name} {getattr(options, name)} is below 1.", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            result = measure(options, Path(scratch))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def read_recipe(source: Path | None) -> "Recipe | None":
    """The recipe that is to be measured; None where a folder or nothing was named.

    Raises:
        ValueError: the recipe has mistakes.
    """
    from xception_pl.recipe import RecipeError, load_recipe

    if source is None or source.suffix not in (".yaml", ".yml"):
        return None
    try:
        return load_recipe(source)
    except RecipeError as error:
        raise ValueError(error.problems[0]) from error


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything that `report` prints and `--json` keeps.

    Raises:
        ValueError: there are no such images.
    """
    import torch

    from xception_pl.bench.batches import rates
    from xception_pl.bench.crops import image_files, recipe_files
    from xception_pl.bench.first_batch import starts
    from xception_pl.data import native

    torch.set_num_threads(1)
    try:
        native.load()
        decoder = "native (crop.c)"
    except native.Unavailable as reason:
        decoder = f"Pillow, because {reason}"
    (scratch / "images").mkdir()
    recipe = read_recipe(options.source)
    if recipe is None:
        files = image_files(options.source, options.images, scratch / "images")
    else:
        files = recipe_files(recipe, options.images, scratch / "images")
    contents = [path.read_bytes() for path in files]
    result: dict[str, Any] = {
        "images": len(files),
        "mean_kilobytes": round(sum(map(len, contents)) / len(files) / 1000, 1),
        "decoder": decoder,
        "machine": machine(),
        "turns": options.turns,
        "workers": options.workers,
        "goals": [],
    }
    if "crops" in options.parts:
        result |= measure_crops(files, options.turns, recipe.data if recipe is not None else None, result["goals"])
    if "batches" in options.parts:
        result["batches"] = found = rates(contents, options.workers, scratch, options.turns)
        lost(found, options.workers, result["goals"])
    if "starts" in options.parts:
        result["starts"] = [asdict(start) for start in starts(scratch, options.workers)]
    if options.gpu_rate:
        result["gpu_rate"] = options.gpu_rate
        result["cores_per_gpu"] = cores_per_gpu(result, options.gpu_rate)
    return result


def machine() -> str:
    """What the numbers were measured on and with."""
    libraries = ("torch", "torchvision", "timm", "pillow", "simplejpeg", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    found = []
    for name in libraries:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, {', '.join(found)}"


def measure_crops(
    files: list[Path], turns: int, crops: "DataConfig | None", goals: list[dict[str, Any]]
) -> dict[str, Any]:
    """The table of one core; adds to `goals`."""
    from xception_pl.bench.crops import faster, in_turns, rows, ways

    found, missing = ways(files, crops)
    seconds = in_turns(found, turns)
    decoder = next(name for name in DECODERS if name in seconds)
    whole = faster(seconds, OURS, decoder)
    goals.append(_goal("at least 2.0 × timm's default transform a core", faster(seconds, OURS, TIMM), 2.0))
    goals.append(_goal(f"at least the bare full decode ({decoder.split()[-1]})", whole, 1.0))
    goals.append(
        _goal("at least 1.4 × DALI's CPU pipeline", faster(seconds, OURS, DALI) if DALI in seconds else None, 1.4)
    )
    share = statistics.median(seconds[READ]) / statistics.median(seconds[OURS])
    return {
        "one_core": [asdict(row) for row in rows(seconds, len(files))],
        "not_measured": missing,
        "bottleneck": f"Of a training crop's time reading the file takes {share:.0%}, decoding and resizing the rest: "
        f"{whole:.2f} times the rate of a whole decode ({decoder.split()[-1]}).",
    }


def lost(found: dict[str, float], workers: int, goals: list[dict[str, Any]]) -> None:
    """What workers cost, against one process times their number and against as many processes side by side."""
    for yardstick, rate in (
        (f"{workers} × one process", workers * found["one process"]),
        (f"{workers} processes side by side", found[f"{workers} processes"]),
    ):
        for source in ("local Parquet", "loopback hub, first epoch", "loopback hub, later epochs"):
            reached = found[f"{workers} workers, {source}"] / rate
            goals.append(_goal(f"{source}: at least 0.9 of {yardstick}", reached, 0.9))


def _goal(goal: str, measured: float | None, wanted: float) -> dict[str, Any]:
    return {"goal": goal, "measured": measured, "met": None if measured is None else measured >= wanted}


def cores_per_gpu(result: dict[str, Any], gpu_rate: float) -> float:
    """Cores that make `gpu_rate` images a second: as loader workers, or where these were not measured as bare crops."""
    if "batches" in result:
        workers: int = result["workers"]
        rate: float = result["batches"][f"{workers} workers, local Parquet"] / workers
    elif "one_core" in result:
        rate = next(row["images_per_second"] for row in result["one_core"] if row["name"] == OURS)
    else:
        raise ValueError("--gpu-rate needs the part batches or crops.")
    return round(gpu_rate / rate, 2)


def report(result: dict[str, Any]) -> None:
    """Print the tables, the bottleneck, the goals and the cores a GPU needs."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "one_core" in result:
        table = Table(
            "one core", "images/s", "× timm", title=f"{result['images']} images of {result['mean_kilobytes']} kB"
        )
        for row in result["one_core"]:
            table.add_row(row["name"], f"{row['images_per_second']:,.0f}", f"{row['times_timm']:.2f}")
        console.print(table)
        for sentence in result["not_measured"]:
            console.print(sentence)
    if "batches" in result:
        table = Table("batches of 32", "images/s by the clock")
        for name, rate in result["batches"].items():
            table.add_row(name, f"{rate:,.0f}")
        console.print(table)
    if "starts" in result:
        table = Table(
            "ImageNet's layout, first batch of 256",
            "cache",
            "source, s",
            "batch, s",
            "row groups",
            title="loopback hub",
        )
        for start in result["starts"]:
            seconds = (f"{start[name]:.1f}" for name in ("resolve_seconds", "batch_seconds"))
            table.add_row(f"at {start['at']:.0%} of an epoch", start["cache"], *seconds, f"{start['row_groups']:,}")
        console.print(table)
    console.print(f"Decoder: {result['decoder']}. {result['machine']}.")
    if "bottleneck" in result:
        console.print(result["bottleneck"])
    for goal in result["goals"]:
        verdict = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
        measured = "" if goal["measured"] is None else f" {goal['measured']:.2f},"
        console.print(f"Goal, {goal['goal']}:{measured} {verdict}.")
    if "gpu_rate" in result:
        console.print(
            f"A GPU that trains {result['gpu_rate']:,g} images/s needs {result['cores_per_gpu']} cores like this."
        )
