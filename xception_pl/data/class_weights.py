"""Weights of the classes in MAP@100: read from a file, or how often the training labels name each class.

The paper weights "the contribution of each class" by how common it is in social media, and does not publish the weights
(section 4.1): whoever has such weights gives a file; the frequency in one's own training labels is the nearest stand-in.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from xception_pl.data.errors import DataError
from xception_pl.data.fetch import RETRY_SECONDS, each
from xception_pl.data.source import ParquetSplit, Split, TableSplit
from xception_pl.data.stream import read_labels

_THREADS = 16  # small reads of remote files wait more than they work


def read_class_weights(path: str | Path, classes: int) -> list[float]:
    """One number a line, in the order of the classes; empty lines do not count.

    Raises:
        DataError: it cannot be read, a line is no finite number of 0 or more, all are 0, or there are not as many as classes.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(
            f"data.class_weights {path} cannot be read ({why}): give a text file with a number a line."
        ) from error
    weights = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            weights.append(float(line))
        except ValueError:
            weights.append(math.nan)
        if not 0 <= weights[-1] < math.inf:
            raise DataError(
                f"Line {number} of data.class_weights {path} is {line.strip()!r}: each line must be a number, 0 or more."
            )
    if len(weights) != classes:
        raise DataError(
            f"data.class_weights {path} has {len(weights)} numbers, but the network has {classes} classes: give one each."
        )
    if not any(weights):
        raise DataError(f"All numbers of data.class_weights {path} are 0: give at least one class a weight.")
    return weights


def label_counts(split: Split, classes: int, retry_seconds: float = RETRY_SECONDS) -> list[float]:
    """How often the label lists of a split name each class. Of Parquet only the label column is read.

    Raises:
        DataError: a label lies outside the classes, or there is none at all.
    """
    counts = np.zeros(classes, np.int64)
    for labels in _labels(split, retry_seconds):
        values = labels.flatten().to_numpy(zero_copy_only=False)
        if len(values) and not 0 <= values.min() <= values.max() < classes:
            outside = values.min() if values.min() < 0 else values.max()
            raise DataError(f"In {split.where} an image has label {outside}, but the network has {classes} classes.")
        counts += np.bincount(values, minlength=classes)
    if not counts.any():
        raise DataError(f"No image of {split.where} has a label: data.class_weights cannot be their frequency.")
    return [float(count) for count in counts]


def _labels(split: Split, retry_seconds: float) -> Iterator[pa.Array]:
    """The label lists of all images, a part at a time."""
    if isinstance(split, TableSplit):
        column = split.table.select_columns([split.label_column]).with_format("arrow")[:].column(split.label_column)
        yield from column.chunks
        return
    assert isinstance(split, ParquetSplit)
    yield from each(lambda group: read_labels(split, group, retry_seconds), range(len(split.rows)), _THREADS)
