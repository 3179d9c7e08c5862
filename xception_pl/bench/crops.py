"""From image files to training crops on one core: this package beside timm, torchvision and DALI."""

import io
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from xception_pl.data.config import DataConfig
    from xception_pl.recipe import Recipe

SIZE = 299
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
READ, TIMM, DALI, OURS = (
    "read only",
    "timm, default training transform",
    "DALI, CPU, uint8",
    "xception_pl, inception crop",
)
DECODERS = ("read and decode, simplejpeg", "read and decode, Pillow")
_DALI_BATCH = 32

Way = Callable[[int], object]
"""All images once; given the turn, so that random crops differ from turn to turn."""


@dataclass
class Row:
    """One line of the table: `name`, images a second and core, and how that compares with timm's transform."""

    name: str
    images_per_second: float
    times_timm: float


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


def in_turns(ways: dict[str, Way], turns: int) -> dict[str, list[float]]:
    """Processor seconds of each way, a number a turn; the first turn warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            start = time.process_time()
            way(turn)
            if turn:
                seconds[name].append(max(time.process_time() - start, 1e-9))
    return seconds


def rows(seconds: dict[str, list[float]], images: int) -> list[Row]:
    """The table."""
    return [
        Row(name, images / statistics.median(taken), faster(seconds, name, TIMM)) for name, taken in seconds.items()
    ]


def faster(seconds: dict[str, list[float]], name: str, than: str) -> float:
    """How many times the rate of `than` a way has: the median over the turns."""
    return statistics.median(b / t for b, t in zip(seconds[than], seconds[name], strict=True))


def ways(files: list[Path], crops: "DataConfig | None" = None) -> tuple[dict[str, Way], list[str]]:
    """What is compared, and a sentence for each peer that cannot be; `crops` are measured beside the usual ones."""
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
    inception = DataConfig(image_size=SIZE)
    timm_crop = DataConfig(image_size=SIZE, train_crop="timm", crop_area_min=0.08)

    def each(one: Callable[[bytes], object]) -> Way:
        return lambda turn: [one(path.read_bytes()) for path in files] and None

    def pillow(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def torchvision(data: bytes) -> object:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return torchvision_transform(decode_image(encoded, ImageReadMode.RGB))

    def ours(config: DataConfig) -> Way:
        def way(turn: int) -> None:
            for number, path in enumerate(files):
                train_image(path.read_bytes(), config, np.random.default_rng(turn * len(files) + number))

        return way

    def ours_without_native(turn: int) -> None:
        with patch("xception_pl.data.decode.crop_jpeg", return_value=None):
            ours(inception)(turn)

    found: dict[str, Way] = {READ: each(lambda data: data), DECODERS[1]: each(pillow)}
    missing = []
    if find_spec("simplejpeg") is not None:
        simplejpeg = import_module("simplejpeg")
        found[DECODERS[0]] = each(
            lambda data: simplejpeg.decode_jpeg(data) if simplejpeg.is_jpeg(data) else pillow(data)
        )
    else:
        missing.append("simplejpeg's bare decode was not measured: pip install simplejpeg.")
    if crops is not None:
        found[f"xception_pl, the recipe's crop ({crops.train_crop}, {crops.image_size} px)"] = ours(crops)
    found |= {
        TIMM: each(lambda data: timm_transform(pillow(data))),
        "torchvision v2, uint8": each(torchvision),
    }
    try:
        found |= dali_ways(files)
    except (ImportError, RuntimeError) as error:
        missing.append(f"DALI was not measured: {str(error).strip().splitlines()[0].rstrip('.')}.")
    found |= {
        OURS: ours(inception),
        "xception_pl, timm's crop": ours(timm_crop),
        "xception_pl without a C compiler": ours_without_native,
    }
    return found, missing


def dali_ways(files: list[Path]) -> dict[str, Way]:
    """DALI's own example for ImageNet on the CPU, with one thread: to normalised floats, and to uint8 as ours.

    Raises:
        ImportError: it is not installed.
        RuntimeError: it does not decode these images.
    """
    import numpy as np

    dali, fn, types = (import_module(f"nvidia.dali{part}") for part in ("", ".fn", ".types"))
    options = {"num_threads": 1, "device_id": None, "exec_async": False, "exec_pipelined": False}

    @dali.pipeline_def(batch_size=_DALI_BATCH, prefetch_queue_depth=1, **options)  # type: ignore[untyped-decorator]
    def pipeline(floats: bool) -> Any:
        encoded = fn.external_source(name="files", device="cpu", batch=True)
        box = {"random_aspect_ratio": [3 / 4, 4 / 3], "random_area": [0.08, 1.0], "num_attempts": 100}
        crops = fn.decoders.image_random_crop(encoded, device="cpu", output_type=types.RGB, **box)
        crops = fn.resize(crops, device="cpu", resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_TRIANGULAR)
        flip = fn.random.coin_flip(probability=0.5)
        if not floats:
            return fn.flip(crops, device="cpu", horizontal=flip)
        scale = {"mean": [127.5] * 3, "std": [127.5] * 3, "dtype": types.FLOAT, "output_layout": "CHW"}
        return fn.crop_mirror_normalize(crops, device="cpu", mirror=flip, **scale)

    def way(built: Any) -> Way:
        def run(turn: int) -> None:
            for start in range(0, len(files), _DALI_BATCH):
                some = files[start : start + _DALI_BATCH]
                built.feed_input("files", [np.frombuffer(path.read_bytes(), np.uint8) for path in some])
                built.run()

        return run

    found = {"DALI, CPU, normalised floats": pipeline(True), DALI: pipeline(False)}
    for built in found.values():
        built.build()
    return {name: way(built) for name, built in found.items()}
