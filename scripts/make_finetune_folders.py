"""Two folders of images out of the shipped ones: classes to train on first, and few images of other classes.

    python scripts/make_finetune_folders.py FOLDER [--images 10] [--seed 0]

FOLDER/first has all images of six classes; FOLDER/few has `images` training images of each of the other four, chosen by
the seed, and all held-out ones. Both are `train/CLASS/NUMBER.png` and `test/CLASS/NUMBER.png`: a `data.source`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Features

SAMPLE = Path(__file__).parents[1] / "xception_pl" / "data" / "sample"
FEW = ("Shirt", "Sneaker", "Bag", "Ankle boot")


def write(table: list[dict[str, Any]], names: list[str], folder: Path, images: int | None, seed: int) -> None:
    """The rows of these classes as PNG files; `images` of each, or all."""
    for name in names:
        rows = [(i, row) for i, row in enumerate(table) if row["name"] == name]
        if images is not None:
            chosen = np.random.default_rng([seed, names.index(name)]).choice(len(rows), images, replace=False)
            rows = [rows[i] for i in sorted(chosen)]
        here = folder / name.partition("/")[0]  # T-shirt/top
        here.mkdir(parents=True)
        for i, row in rows:
            (here / f"{i:04}.png").write_bytes(row["image"]["bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=10, help="training images of each of the few classes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for split in ("train", "test"):
        stored = pq.read_table(SAMPLE / f"{split}.parquet")
        names = Features.from_arrow_schema(stored.schema)["label"].names
        table = [row | {"name": names[row["label"]]} for row in stored.to_pylist()]
        first = [name for name in names if name not in FEW]
        write(table, first, options.folder / "first" / split, None, options.seed)
        few = options.images if split == "train" else None
        write(table, list(FEW), options.folder / "few" / split, few, options.seed)


if __name__ == "__main__":
    main()
