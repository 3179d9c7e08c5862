"""How fast this machine turns image files into training crops, and which part is the slowest.

All ways see the same images in the same run, in turns, so that a busy machine slows all of them alike; a rate is images
by the processor's seconds (one core), a ratio is the median over the turns. Batches through workers are by the clock.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

SIZE = 299
PREFETCH = 2  # batches a worker holds ready
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
if TYPE_CHECKING:
    from xception_pl.data.config import DataConfig
    from xception_pl.recipe import Recipe

Way = Callable[[Path, bytes, int], object]


@dataclass
class Row:
    """One line of the table: `name`, images a second and core, and how that compares with timm's transform."""

    name: str
    images_per_second: float
    times_timm: float


def main(arguments: list[str]) -> int:
    """Command line of `python -m xception_pl.bench data`."""
    parser = argparse.ArgumentParser(prog="python -m xception_pl.bench data", description=__doc__)
    parser.add_argument("source", nargs="?", type=Path, metavar="RECIPE|FOLDER", help="a recipe (.yaml), whose data "
                        "and crops are measured, or a folder of images; without either, 500 × 375 JPEGs are made "
                        "from scikit-image's photographs")  # fmt: skip
    parser.add_argument("--images", type=int, default=128, help="use at most so many images (default %(default)s)")
    parser.add_argument(
        "--turns", type=int, default=7, help="times that each way sees the images (default %(default)s)"
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="loader processes (%(default)s; 0: no batches)")
    parser.add_argument("--gpu-rate", type=float, help="images a second that one GPU trains, to count its cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            recipe = read_recipe(options.source)
            if recipe is None:
                files = image_files(options.source, options.images, Path(scratch))
            else:
                files = recipe_files(recipe, options.images, Path(scratch))
            crops = recipe.data if recipe is not None else None
            result = measure(files, options.turns, options.workers, options.gpu_rate, Path(scratch), crops)
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


def recipe_files(recipe: "Recipe", count: int, scratch: Path) -> list[Path]:
    """The first `count` training images of a recipe's source, as files.

    Raises:
        DataError: the source cannot be read.
    """
    from xception_pl.data.source import open_split
    from xception_pl.data.stream import open_reader

    data = recipe.data
    split = open_split(
        data.source,
        data.train_split,
        revision=data.revision,
        image_column=data.image_column,
        label_column=data.label_column,
    )
    files = []
    for number, row in enumerate(open_reader(split, data.retry_seconds).rows(range(min(count, split.images)))):
        files.append(scratch / f"{number:05d}")
        files[-1].write_bytes(row.data)
    return files


def image_files(folder: Path | None, count: int, scratch: Path) -> list[Path]:
    """At most `count` images of `folder`, or as many made from photographs in `scratch`.

    Raises:
        ValueError: no image there, or no photographs to make them from.
    """
    if folder is not None:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:count]
        if not files:
            raise ValueError(f"{folder} holds no {', '.join(SUFFIXES)} file: name a folder of images.")
        return files
    if find_spec("skimage") is None:
        raise ValueError(
            "Without a folder the images are made from scikit-image's photographs: pip install scikit-image."
        )
    import numpy as np
    from PIL import Image, ImageOps
    from skimage import data as photographs

    sources = [Image.fromarray(getattr(photographs, name)()) for name in ("astronaut", "coffee", "chelsea", "rocket")]
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):  # the same photographs at different places of the frame
        place = (float(rng.random()), float(rng.random()))
        frame = ImageOps.fit(sources[number % len(sources)], (500, 375), Image.Resampling.BICUBIC, 0.05, place)
        files.append(scratch / f"{number:05d}.jpg")
        frame.save(files[-1], quality=90)
    return files


def measure(
    files: list[Path],
    turns: int,
    workers: int,
    gpu_rate: float | None,
    scratch: Path,
    crops: "DataConfig | None" = None,
) -> dict[str, object]:
    """Everything that `report` prints and `--json` keeps; `crops` are measured besides those of the paper and timm."""
    import torch

    from xception_pl.data import native

    torch.set_num_threads(1)
    try:
        native.load()
        way = "native (crop.c)"
    except native.Unavailable as reason:
        way = f"Pillow, because {reason}"
    contents = [path.read_bytes() for path in files]
    seconds = in_turns(ways(crops), files, contents, turns)
    base = seconds["timm, default training transform"]
    rows = [
        Row(
            name,
            len(files) / statistics.median(taken),
            statistics.median(b / t for b, t in zip(base, taken, strict=True)),
        )
        for name, taken in seconds.items()
    ]
    ours = next(row for row in rows if row.name == "xception_pl, inception crop")
    read = statistics.median(seconds["read only"])
    share = read * ours.images_per_second / len(files)
    decoder = next(name for name in ("read and decode, simplejpeg", "read and decode, Pillow") if name in seconds)
    against = statistics.median(d / t for d, t in zip(seconds[decoder], seconds[ours.name], strict=True))
    result: dict[str, object] = {
        "images": len(files),
        "mean_kilobytes": round(sum(map(len, contents)) / len(files) / 1000, 1),
        "decoder": way,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "pillow")),
        "one_core": [asdict(row) for row in rows],
        "bottleneck": f"Of a training crop's time reading the file takes {share:.0%}, decoding and resizing the rest: "
        f"{against:.2f} times the rate of a whole decode ({decoder.split()[-1]}).",
    }
    if workers:
        result["batches"] = batch_rates(contents, workers, scratch, turns)
        result["batches_workers"] = workers
    if gpu_rate:
        result["gpu_rate"] = gpu_rate
        result["cores_per_gpu"] = round(gpu_rate / ours.images_per_second, 2)
    return result


def in_turns(ways: dict[str, Way], files: list[Path], contents: list[bytes], turns: int) -> dict[str, list[float]]:
    """Processor seconds of each way over all files, a number a turn; the first turn warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            start = time.process_time()
            for number, (path, data) in enumerate(zip(files, contents, strict=True)):
                way(path, data, turn * len(files) + number)
            if turn:
                seconds[name].append(max(time.process_time() - start, 1e-9))
    return seconds


def ways(crops: "DataConfig | None" = None) -> dict[str, Way]:
    """What is compared: functions of a file's path, its bytes and the number of the draw."""
    import io

    import numpy as np
    import torch
    from PIL import Image
    from timm.data import create_transform
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    from xception_pl.data.config import DataConfig
    from xception_pl.data.decode import train_image

    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torchvision")
    timm_transform = create_transform(SIZE, is_training=True)
    torchvision_transform = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
    inception, timm_crop = (
        DataConfig(image_size=SIZE),
        DataConfig(image_size=SIZE, train_crop="timm", crop_area_min=0.08),
    )

    def pillow(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def torchvision(path: Path, data: bytes, draw: int) -> object:
        encoded = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        return torchvision_transform(decode_image(encoded, ImageReadMode.RGB))

    def ours(config: DataConfig) -> Way:
        return lambda path, data, draw: train_image(path.read_bytes(), config, np.random.default_rng(draw))

    def ours_without_native(path: Path, data: bytes, draw: int) -> object:
        with patch("xception_pl.data.decode.crop_jpeg", return_value=None):
            return train_image(path.read_bytes(), inception, np.random.default_rng(draw))

    found: dict[str, Way] = {
        "read only": lambda path, data, draw: path.read_bytes(),
        "read and decode, Pillow": lambda path, data, draw: pillow(path.read_bytes()),
    }
    if find_spec("simplejpeg") is not None:
        simplejpeg = import_module("simplejpeg")
        found["read and decode, simplejpeg"] = lambda path, data, draw: (
            simplejpeg.decode_jpeg(data) if simplejpeg.is_jpeg(path.read_bytes()) else pillow(data)
        )
    if crops is not None:
        found[f"xception_pl, the recipe's crop ({crops.train_crop}, {crops.image_size} px)"] = ours(crops)
    return found | {
        "timm, default training transform": lambda path, data, draw: timm_transform(pillow(path.read_bytes())),
        "torchvision v2, uint8": torchvision,
        "xception_pl, inception crop": ours(inception),
        "xception_pl, timm's crop": ours(timm_crop),
        "xception_pl without a C compiler": ours_without_native,
    }


def batch_rates(contents: list[bytes], workers: int, scratch: Path, turns: int) -> dict[str, float]:
    """Images a second by the clock, in batches of 32: this package from local Parquet, timm's loader from a folder.

    One process of ours is the yardstick: workers should give that many times more.
    """
    repeated = (contents * (1024 // len(contents) + 1))[:1024]
    parquet = write_parquet(repeated, scratch / "parquet")
    makers = {
        f"xception_pl, {workers} workers": our_batches(parquet, workers),
        "xception_pl, this process": our_batches(parquet, 0),
        f"timm, {workers} workers": timm_batches(repeated, workers, scratch / "folder"),
    }
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(turns + 1):
        for name, batches in makers.items():
            for _ in range(0 if "this process" in name else 2 * PREFETCH * workers):
                next(batches)  # made while others were measured
            start = time.perf_counter()
            images = sum(next(batches) for _ in range(16))
            if turn:
                rates[name].append(images / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def write_parquet(contents: list[bytes], folder: Path) -> Path:
    """The images as a data set of one split, in row groups of 100 as on the hub."""
    import datasets

    datasets.disable_progress_bars()
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["none"])})
    rows = {"image": [{"bytes": data, "path": None} for data in contents], "label": [0] * len(contents)}
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "train-00000-of-00001.parquet", batch_size=100)
    return folder


def our_batches(parquet: Path, workers: int) -> Iterator[int]:
    """Sizes of the training batches of `ImageNetDataModule`, without end."""
    from xception_pl.data.config import DataConfig
    from xception_pl.data.datamodule import ImageNetDataModule

    config = DataConfig(source=str(parquet), global_batch=32, workers=workers, prefetch=PREFETCH, image_size=SIZE)
    module = ImageNetDataModule(config)
    module.prepare(val=False)
    loader = module.train_dataloader()
    while True:
        for batch in loader:
            yield len(batch["image"])


def timm_batches(contents: list[bytes], workers: int, folder: Path) -> Iterator[int]:
    """Sizes of the training batches of timm's default loader, without end."""
    from timm.data import create_dataset, create_loader

    (folder / "none").mkdir(parents=True)
    for number, data in enumerate(contents):
        (folder / "none" / f"{number:05d}.jpg").write_bytes(data)
    loader = create_loader(
        create_dataset("", str(folder), is_training=True),
        (3, SIZE, SIZE),
        32,
        is_training=True,
        num_workers=workers,
        use_prefetcher=False,
        pin_memory=False,
    )
    while True:
        for images, _ in loader:
            yield len(images)


def report(result: dict[str, object]) -> None:
    """Print the table, the bottleneck and the cores a GPU needs."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("one core", "images/s", "× timm", title=f"{result['images']} images of {result['mean_kilobytes']} kB")
    for row in result["one_core"]:  # type: ignore[attr-defined]
        table.add_row(row["name"], f"{row['images_per_second']:,.0f}", f"{row['times_timm']:.2f}")
    console.print(table)
    if "batches" in result:
        batches = Table("batches of 32", "images/s by the clock")
        for name, rate in result["batches"].items():  # type: ignore[attr-defined]
            batches.add_row(name, f"{rate:,.0f}")
        console.print(batches)
    console.print(f"Decoder: {result['decoder']}. {result['machine']}.")
    console.print(result["bottleneck"])
    if "gpu_rate" in result:
        console.print(
            f"A GPU that trains {result['gpu_rate']:,g} images/s needs {result['cores_per_gpu']} cores like this."
        )
