"""Whether a source fits what is to be trained: told before anything is read."""

import itertools

import torch

from xception_pl.data.config import DataConfig
from xception_pl.data.device_decode import cannot_decode
from xception_pl.data.errors import DataError
from xception_pl.data.source import Split


def check_channels(channels: int, config: DataConfig) -> None:
    """Raise ValueError for images of so many channels, or colour changes of grey ones."""
    if channels not in (1, 3):
        raise ValueError(f"model.in_chans is {channels}, but images have 1 or 3 channels: set it to 1 or 3.")
    if channels == 1 and (config.color != "none" or config.randaugment):
        raise ValueError(
            f"model.in_chans is 1, but data.color {config.color} with data.randaugment {config.randaugment} needs "
            "3 channels: set data.color to none and data.randaugment to 0, or model.in_chans to 3."
        )


def check_device(device: torch.device | None, channels: int) -> None:
    """Raise DataError where `device` cannot decode training images of so many channels."""
    if channels != 3:
        raise DataError(
            f"data.decode gpu makes images of 3 channels, and model.in_chans is {channels}: set data.decode to cpu."
        )
    if device is None or device.type != "cuda":
        raise DataError("data.decode gpu needs a CUDA GPU to train on, and there is none: set data.decode to cpu.")
    if reason := cannot_decode(device):
        raise DataError(f"data.decode gpu cannot decode a JPEG here ({reason}): set data.decode to cpu.")


def check_split(split: Split, key: str, expected: int | None, classes: int | None, multi_label: bool) -> None:
    """Raise DataError where a split has not the images or labels that are wanted.

    Args:
        split: as it was opened.
        key: of the recipe that says how many images are expected.
        expected: its value.
        classes: of the network, where known.
        multi_label: labels are lists.
    """
    if expected is not None and expected != split.images:
        raise DataError(
            f"{key} is {expected}, but {split.where} has {split.images} images: correct the key or the source."
        )
    if not split.images:
        raise DataError(f"There are no images in {split.where}.")
    if split.labels.multi and not multi_label:
        raise DataError(
            f"Column {split.label_column!r} of {split.where} holds label lists, but the loss takes one label "
            "an image: use a multi-label loss (optim.loss: sigmoid), or another column."
        )
    if multi_label and not split.labels.multi:
        raise DataError(
            f"Column {split.label_column!r} of {split.where} holds one label an image, but the loss takes "
            "label lists: use a single-label loss, or another column."
        )
    names = split.labels.names
    if names is not None and classes is not None and len(names) > classes:
        raise DataError(
            f"There are {len(names)} classes in {split.where}, but the network has {classes}: "
            "set the number of classes to the source's."
        )


def check_names(train: Split, val: Split) -> None:
    """Raise DataError unless the number of a label means the same class in both splits."""
    if train.labels.names is None or val.labels.names is None:
        return
    for i, (one, other) in enumerate(itertools.zip_longest(train.labels.names, val.labels.names)):
        if one != other:
            raise DataError(
                f"Class {i} is {_quoted(one)} in {train.where} and {_quoted(other)} in {val.where}: "
                "give both splits the same classes in the same order."
            )


def _quoted(name: str | None) -> str:
    return "missing" if name is None else repr(name)
