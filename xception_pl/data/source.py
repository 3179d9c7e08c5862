"""Where images come from: `datasets` resolves a source to files, revision and features; here that becomes a `Split`.

A split is small, picklable and the same on every rank: one process resolves it and hands it to the others. There are
two kinds: `ParquetSplit`, whose unit of reading is the row group, and `TableSplit`, a `datasets.Dataset` in memory or
mapped from Arrow files (an image folder is one too: its rows hold paths), where any row is cheap.
"""

import difflib
import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from xception_pl.data.config import OUTFITS, local_path
from xception_pl.data.errors import DataError, SourceUnreachable
from xception_pl.data.fetch import answered, each, hub_parts, refusal

if TYPE_CHECKING:
    import datasets

_FOOTER_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the label column holds."""

    names: tuple[str, ...] | None
    """Class names; None when the source has only numbers."""
    multi: bool
    """Whether each image has a list of labels."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a source: which rows exist and how they are labelled."""

    where: str
    """For messages: "split 'train' of ILSVRC/imagenet-1k"."""
    image_column: str
    label_column: str
    labels: Labels
    rows: npt.NDArray[np.int64] = field(repr=False)
    """Images of each unit of reading, in the order of the source."""

    @cached_property
    def images(self) -> int:
        return int(self.rows.sum())


@dataclass(frozen=True, kw_only=True)
class ParquetSplit(Split):
    """Row groups of Parquet files, local or remote."""

    files: tuple[str, ...] = field(repr=False)
    """Paths or URLs as fsspec reads them; a hub file's URL names its commit."""
    footers: tuple[pq.FileMetaData, ...] = field(repr=False)

    @cached_property
    def bytes(self) -> int:
        """Stored bytes of all row groups."""
        return sum(f.row_group(g).total_byte_size for f in self.footers for g in range(f.num_row_groups))

    @cached_property
    def remote(self) -> bool:
        return any("://" in file for file in self.files)

    @cached_property
    def commit(self) -> str | None:
        """Of the hub dataset that these files were resolved to: what is read even when the branch moves on."""
        return hub_parts(self.files[0])[1] if self.files[0].startswith("hf://") else None

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(file, row group within it) of each unit."""
        return tuple((f, g) for f, footer in enumerate(self.footers) for g in range(footer.num_row_groups))


@dataclass(frozen=True, kw_only=True)
class TableSplit(Split):
    """Rows of a `datasets.Dataset`, images undecoded."""

    table: "datasets.Dataset" = field(repr=False)


def open_split(
    source: str,
    split: str,
    *,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    keep: Path | None = None,
) -> Split:
    """Resolve one split of a source; reads metadata only (for Parquet: the footers, in parallel).

    Args:
        source: `sample`, `sample-outfits`, a hub dataset id, or a local path: a Parquet file, a folder of Parquet, of
            images or of Arrow files that `datasets` wrote, or a folder written by `Dataset.save_to_disk`.
        split: its name in the source.
        revision: git revision, for hub datasets.
        image_column: column of encoded images.
        label_column: column of labels or label lists.
        keep: folder in which footers of files on the hub are kept for the next time.

    Raises:
        DataError: source, revision, split or column do not exist or cannot be read; says which and what to do.
        SourceUnreachable: the hub cannot be reached, does not answer, or not with this token.
    """
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from datasets.packaged_modules.parquet.parquet import Parquet

    path = local_path(source)
    if source == OUTFITS:
        return _outfits_split(split, image_column, label_column)
    if path is not None and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _saved_split(path, split, image_column, label_column)
    builder = _builder(source, path, revision)
    data_files: Mapping[str, list[str]] = builder.config.data_files or {}
    if split not in {str(name) for name in data_files}:
        raise _no_split(split, source, [str(name) for name in data_files])
    where = f"split {split!r} of {source}"
    files = next([str(file) for file in listed] for name, listed in data_files.items() if str(name) == split)
    if isinstance(builder, Parquet):
        return _parquet_split(where, files, image_column, label_column, keep)
    if isinstance(builder, ImageFolder):
        rows = builder.as_streaming_dataset(split=split)
        return table_split(_listed(rows, where, image_column), where, image_column, label_column)
    if isinstance(builder, Arrow) and path is not None:
        return table_split(_mapped(files), where, image_column, label_column)
    raise DataError(
        f"{source} holds {builder.dataset_name or 'unknown'} files, which cannot be read row by row: "
        "convert it to Parquet (Dataset.to_parquet) and give that folder as data.source."
    )


def table_split(
    table: "datasets.Dataset", where: str, image_column: str = "image", label_column: str = "label"
) -> Split:
    """A split of a `datasets.Dataset`; raises DataError as `open_split` does."""
    import datasets

    labels = _labels(table.features, where, image_column, label_column)
    if isinstance(table.features[image_column], datasets.Image):
        table = table.cast_column(image_column, datasets.Image(decode=False))
    table = table.select_columns([image_column, label_column])
    return TableSplit(
        where=where,
        image_column=image_column,
        label_column=label_column,
        labels=labels,
        rows=np.ones(len(table), np.int64),
        table=table,
    )


def hub_parquet(source: str, revision: str | None) -> dict[str, list[str]]:
    """URLs of a hub dataset's Parquet files by split; each names its commit.

    Raises:
        DataError: it is not on the hub, or not Parquet.
    """
    from datasets.packaged_modules.parquet.parquet import Parquet

    if local_path(source) is not None:
        raise DataError(f"{source} is a local path: name a dataset of the hub, for example ILSVRC/imagenet-1k.")
    builder = _hub_builder(source, revision)
    if not isinstance(builder, Parquet):
        raise DataError(
            f"{source} holds {builder.dataset_name or 'unknown'} files, not Parquet: the hub's own conversion may be "
            "at --revision refs/convert/parquet."
        )
    data_files: Mapping[str, list[str]] = builder.config.data_files or {}
    return {str(name): [str(file) for file in files] for name, files in data_files.items()}


def _builder(source: str, path: Path | None, revision: str | None) -> "datasets.DatasetBuilder":
    from datasets import load_dataset_builder
    from datasets.exceptions import DataFilesNotFoundError

    if path is None:
        return _hub_builder(source, revision)
    try:
        if path.is_file():
            return load_dataset_builder("parquet", data_files=str(path))
        return load_dataset_builder(str(path))
    except (DataFilesNotFoundError, FileNotFoundError) as error:
        raise DataError(f"There are no images, Parquet or Arrow files in data.source {source}.") from error


def _hub_builder(source: str, revision: str | None) -> "datasets.DatasetBuilder":
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        with answered(source):
            _knock()
            return load_dataset_builder(source, revision=revision)
    except DataError:  # a ValueError too
        raise
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise refusal(source, 403 if "ask for access" in str(error) else 401) from error
        if "evision" in str(error):
            raise DataError(
                f"There is no revision {revision} of {source} on the hub: correct data.revision."
            ) from error
        raise DataError(
            f"The dataset {source} does not exist on the hub, or is private and the token given cannot see it; "
            "nor is it a folder here: correct data.source, or run `hf auth login`."
        ) from error
    except (ConnectionError, OfflineModeIsEnabled) as error:
        raise SourceUnreachable(
            f"The hub cannot be reached to open {source}: check the network and HF_HUB_OFFLINE, "
            "or give a local mirror as data.source."
        ) from error
    except (DatasetsError, HFValidationError, FileNotFoundError, ValueError) as error:
        hidden = "LocalEntryNotFoundError" in str(error)  # so the client tells of a hub that fails itself
        if hidden:
            raise SourceUnreachable(f"The hub does not answer for {source}: try again.") from error
        raise DataError(f"data.source {source} cannot be opened: {str(error).splitlines()[0].rstrip('.')}.") from error


def _knock() -> None:
    """Raises ConnectionError within seconds where there is no network: `datasets` would try for half a minute."""
    from huggingface_hub import constants, get_session

    for attempt in (1, 2, 3):
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
            return
        except Exception as error:
            # the hub's client went from requests to httpx to httpx2: known by the names of their errors
            if not {"ConnectError", "ConnectTimeout", "ConnectionError"} & {
                kind.__name__ for kind in type(error).__mro__
            }:
                raise
            if attempt == 3:
                raise ConnectionError(str(error)) from error
            time.sleep(1)


def _outfits_split(split: str, image_column: str, label_column: str) -> Split:
    from xception_pl.data.outfits import PICTURES, outfits

    if split not in PICTURES:
        raise _no_split(split, OUTFITS, PICTURES)
    return table_split(outfits(split), f"split {split!r} of {OUTFITS}", image_column, label_column)


def _saved_split(path: Path, split: str, image_column: str, label_column: str) -> Split:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{path} holds a state.json or dataset_dict.json as `Dataset.save_to_disk` writes them, but no whole "
            "dataset saved by it: save it again, or take that file away."
        ) from error
    where = f"split {split!r} of {path}"
    if not isinstance(saved, DatasetDict):
        saved = DatasetDict({str(saved.split or "train"): saved})
    if split not in saved:
        raise _no_split(split, str(path), [str(name) for name in saved])
    return table_split(saved[split], where, image_column, label_column)


def _mapped(files: list[str]) -> "datasets.Dataset":
    """Arrow files as `datasets` writes them, mapped into memory."""
    import datasets

    try:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    except (pa.ArrowInvalid, ValueError) as error:
        raise DataError(
            f"{files[0]} and its {len(files) - 1} neighbours are not one set in Arrow's stream format, which `datasets` "
            "writes: convert them to Parquet and give that folder as data.source."
        ) from error


def _listed(rows: "datasets.IterableDataset", where: str, image_column: str) -> "datasets.Dataset":
    """The rows of an image folder: paths and labels, no image is opened."""
    import datasets

    if image_column not in rows.features:
        raise _no_column(image_column, where, rows.features, "data.image_column")
    features = datasets.Features({**rows.features, image_column: datasets.Image(decode=False)})
    rows = rows.cast_column(image_column, features[image_column])
    return datasets.Dataset.from_list(list(rows), features=features)


def _parquet_split(
    where: str, files: list[str], image_column: str, label_column: str, keep: Path | None
) -> ParquetSplit:
    from datasets import Features

    from xception_pl.data.stream import kept_footer

    footers = tuple(each(functools.partial(kept_footer, keep=keep), files, _FOOTER_THREADS))
    features = Features.from_arrow_schema(footers[0].schema.to_arrow_schema())
    groups = [footer.row_group(g).num_rows for footer in footers for g in range(footer.num_row_groups)]
    return ParquetSplit(
        where=where,
        image_column=image_column,
        label_column=label_column,
        labels=_labels(features, where, image_column, label_column),
        rows=np.asarray(groups, np.int64),
        files=tuple(files),
        footers=footers,
    )


def _labels(features: Mapping[str, Any], where: str, image_column: str, label_column: str) -> Labels:
    from datasets import ClassLabel, Value

    if image_column not in features:
        raise _no_column(image_column, where, features, "data.image_column")
    if label_column not in features:
        raise _no_column(label_column, where, features, "data.label_column")
    feature = features[label_column]
    multi = hasattr(feature, "feature") or isinstance(feature, list)
    if multi:
        feature = feature[0] if isinstance(feature, list) else feature.feature
    if isinstance(feature, ClassLabel):
        return Labels(names=tuple(feature.names), multi=multi)
    if isinstance(feature, Value) and "int" in feature.dtype:
        return Labels(names=None, multi=multi)
    raise DataError(
        f"Column {label_column!r} of {where} holds {feature}, not class numbers: "
        "name another column in data.label_column."
    )


def _no_column(name: str, where: str, columns: Iterable[str], key: str) -> DataError:
    return DataError(f"There is no column {name!r} in {where}{_nearest(name, columns)}: set {key}.")


def _no_split(name: str, source: str, splits: Iterable[str]) -> DataError:
    return DataError(f"There is no split {name!r} in {source}{_nearest(name, splits)}.")


def _nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    return f" (nearest: {near[0]!r}; all: {', '.join(names)})" if near else f" (it has {', '.join(names) or 'none'})"
