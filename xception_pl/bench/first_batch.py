"""What a run waits for before its first step: on ImageNet's layout, at the loopback hub, at the start and inside an epoch."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from xception_pl.bench.batches import as_any_process, at_hub
from xception_pl.bench.loopback import LoopbackHub

IMAGES, SHARDS, ROWS_A_GROUP = 1_281_167, 294, 100
BATCH = 256
IMAGE_BYTES = 110_000
"""Mean size of an ImageNet JPEG; those here are tiny."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run."""

    at: float
    """Share of the epoch that is done."""
    cache: str
    """`empty`, or `kept` from the start before."""
    resolve_seconds: float
    """Until files, rows and classes are known."""
    batch_seconds: float
    """From there until the first batch."""
    row_groups: int
    """Fetched until then, what later batches need included."""


def starts(scratch: Path, workers: int, places: tuple[float, ...] = (0.0, 0.01, 0.9)) -> list[Start]:
    """Starts at each place of an epoch, with an empty cache and once more with what was kept."""
    folder = scratch / "imagenet"
    write_layout(folder)
    found = []
    with (
        LoopbackHub(folder) as hub,
        at_hub(hub, scratch / "hub home"),
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=as_any_process) as pool,
    ):
        pool.submit(first_batch, hub.repo, workers, str(scratch / "warm-up"), 0.0).result()  # imports
        for place in places:
            for cache in ("empty", "kept"):
                before = hub.requests["read"]
                resolve, batch = pool.submit(first_batch, hub.repo, workers, str(scratch / f"{place}"), place).result()
                read = hub.requests["read"] - before - (SHARDS if cache == "empty" else 0)
                found.append(
                    Start(at=place, cache=cache, resolve_seconds=resolve, batch_seconds=batch, row_groups=read)
                )
    return found


def write_layout(folder: Path) -> None:
    """ImageNet-1k's training split in shards and row groups as on the hub, each image the same few bytes."""
    import io

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    kinds = datasets.ClassLabel(names=[str(i) for i in range(1000)])
    features = datasets.Features({"image": datasets.Image(), "label": kinds})
    (folder / "data").mkdir(parents=True)
    written: dict[int, Path] = {}
    for shard in range(SHARDS):
        rows = (shard + 1) * IMAGES // SHARDS - shard * IMAGES // SHARDS
        path = folder / "data" / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"
        if rows in written:
            os.link(written[rows], path)
            continue
        columns = {"image": [{"bytes": out.getvalue(), "path": "image.jpg"}] * rows, "label": [0] * rows}
        table = pa.table(columns, schema=features.arrow_schema)
        pq.write_table(table, path, row_group_size=ROWS_A_GROUP)
        written[rows] = path


def first_batch(source: str, workers: int, cache_dir: str, place: float) -> tuple[float, float]:
    """Seconds to resolve the source, and from there to the batch at a place of the epoch."""
    from xception_pl.data.config import DataConfig
    from xception_pl.data.datamodule import ImageNetDataModule

    config = DataConfig(source=source, global_batch=BATCH, workers=workers, image_size=71, cache_dir=cache_dir)
    module = ImageNetDataModule(config)
    begun = time.perf_counter()
    module.prepare(val=False)
    resolved = time.perf_counter()
    loader = module.train_dataloader()
    step = int(place * len(loader))
    loader.position = lambda: (0, step)
    next(iter(loader))
    done = time.perf_counter()
    module.teardown()
    return resolved - begun, done - resolved
