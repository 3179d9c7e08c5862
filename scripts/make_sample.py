"""Make the images that ship with the package: a balanced part of Fashion-MNIST as Parquet.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIR
    python scripts/make_sample.py DIR/usr/share/datasets/fashion-mnist

Takes the first 400 training and the first 100 test images of each class, in their original order, and writes
`train.parquet` and `test.parquet` with the `datasets` features `image: Image` (PNG bytes) and `label: ClassLabel`.
The files are a function of the input and of the tools' versions: those in the package were made with Debian's
0.0~git20200523.55506a9-1, pillow 13.0.0 (zlib-ng 2.3.3), pyarrow 26.0.1 and datasets 5.2.0.
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image
from PIL import Image as PILImage

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
ROWS_PER_GROUP = 250  # several row groups, so that the shipped images exercise what ImageNet's shards do


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of bytes (LeCun's format: 2 zero bytes, type, rank, sizes, values)."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def first_of_each_class(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Indices of the first `per_class` images of every class, in their original order."""
    chosen = [np.flatnonzero(labels == c)[:per_class] for c in range(len(CLASSES))]
    return np.sort(np.concatenate(chosen))


def png(image: np.ndarray) -> bytes:
    """Encode one (H, W) uint8 image."""
    out = io.BytesIO()
    PILImage.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()


def write(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Write (N, H, W) images and (N,) labels as one Parquet file in row groups."""
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    rows = {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": labels.astype(np.int64),
    }
    table = pa.table(rows, schema=features.arrow_schema)
    # PNG does not compress again: plain pages read fastest and need no codec
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP, compression="none", use_dictionary=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of Fashion-MNIST's four .gz files")
    here = Path(__file__).resolve().parent.parent / "xception_pl/data/sample"
    parser.add_argument("--out", type=Path, default=here, help="folder to write to")
    args = parser.parse_args()
    for prefix, split, per_class in (("train", "train", 400), ("t10k", "test", 100)):
        images = read_idx(args.source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(args.source / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = first_of_each_class(labels, per_class)
        path = args.out / f"{split}.parquet"
        write(images[chosen], labels[chosen], path)
        print(f"{path}: {len(chosen)} images, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
