"""A network that takes pictures of any kind: prepared as its weights expect them."""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from xception_pl.data.config import DataConfig
from xception_pl.data.decode import DecodeError, Pixels, eval_image
from xception_pl.nets.probabilities import probabilities
from xception_pl.nets.xception import Xception

Picture = str | PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
"""What `Prepare` makes pixels of."""


class Prepare:
    """The evaluation crop that belongs to some weights, for one picture at a time; safe in threads.

    Args:
        image_size: side of the network's input, pixels.
        eval_crop: `tf-slim`, `keras`, `timm` or `resize`, as `data.eval_crop`.
        channels: 3, or 1 for grey.
    """

    def __init__(self, image_size: int, eval_crop: str, channels: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"the network takes images of {channels} channels, and pictures have 1 or 3.")
        self.config = DataConfig(image_size=image_size, eval_crop=eval_crop)  # type: ignore[arg-type]
        self.channels = channels

    def __call__(self, picture: Picture) -> Pixels:
        """(S, S, channels) uint8.

        Args:
            picture: a path, encoded bytes, an opened Pillow image, or an array (H, W), (H, W, 1) or (H, W, 3), uint8.

        Raises:
            DecodeError: it cannot be decoded.
            OSError: the file cannot be read.
            ValueError: an array that is no picture.
        """
        if isinstance(picture, np.ndarray):
            picture = _from_array(picture)
        elif not isinstance(picture, bytes | Image.Image):
            picture = Path(picture).read_bytes()
        return eval_image(picture, self.config, self.channels)


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(
            f"an array of shape {array.shape} and type {array.dtype} is no picture: give (H, W) or (H, W, 3) of uint8, "
            "or a tensor that is already prepared."
        )
    return Image.fromarray(array)


def prepare_for(network: Any, *, eval_crop: str | None = None, image_size: int | None = None) -> Prepare:
    """What prepares pictures for a network that `load_network` gave; a crop or size given here wins over its own.

    Raises:
        ValueError: it takes images of other than one or three channels.
    """
    channels = next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
    own = network.preprocessing
    return Prepare(image_size or own.image_size, eval_crop or own.eval_crop, channels)


def stacked(pixels: Sequence[Pixels]) -> Tensor:
    """uint8 (B, C, S, S), channels_last in memory."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def scaled(images: Tensor) -> Tensor:
    """float32 in [-1, 1] from uint8; what is no uint8 is scaled already."""
    if images.dtype != torch.uint8:
        return images
    return torch.addcdiv(torch.tensor(-1.0, device=images.device), images, torch.tensor(127.5, device=images.device))


@torch.inference_mode()
def predict(network: Any, images: Any, prepare: Prepare, *, batch: int = 32) -> Tensor:
    """Probabilities (N, K), float32 on the CPU, of pictures of any kind; the network's mode and device stay as they are.

    Args:
        network: logits of images in [-1, 1], and its `loss`.
        images: one or a list of paths, Pillow images or uint8 arrays (H, W[, 3]), which `prepare` crops and resizes;
            or a tensor (B, C, H, W) or (C, H, W), taken as it is: uint8, or float in [-1, 1]. An array of four axes
            (B, H, W, C) is a list of pictures.
        prepare: the crop that belongs to the weights.
        batch: images the network sees at once.

    Raises:
        ValueError: it is no picture, or cannot be decoded: the sentence says which and why.
    """
    training = network.training
    network.eval()
    try:
        found = [probabilities(network(part), network.loss).cpu() for part in _batches(network, images, prepare, batch)]
    finally:
        network.train(training)
    return torch.cat(found)


def _batches(network: nn.Module, images: Any, prepare: Prepare, batch: int) -> Iterable[Tensor]:
    like = next(network.parameters())
    if isinstance(images, Tensor):
        whole = images[None] if images.ndim == 3 else images
        if whole.ndim != 4 or whole.shape[1] != prepare.channels:
            raise ValueError(
                f"predict takes tensors of shape (B, {prepare.channels}, H, W) or ({prepare.channels}, H, W), "
                f"not {tuple(images.shape)}."
            )
        parts: Iterable[Tensor] = whole.split(batch)
    else:
        single = isinstance(images, str | PathLike | bytes | Image.Image) or (
            isinstance(images, np.ndarray) and images.ndim in (2, 3)
        )
        listed = [images] if single else list(images)
        if any(isinstance(item, Tensor) for item in listed):
            raise ValueError("predict takes one tensor (B, C, H, W), not a list of them: use torch.stack.")
        pieces = [listed[i : i + batch] for i in range(0, len(listed), batch)]
        parts = (
            stacked([_prepared(prepare, item, first + i) for i, item in enumerate(piece)])
            for first, piece in zip(range(0, len(listed), batch), pieces, strict=True)
        )
    for part in parts:
        yield scaled(part.to(like.device)).to(like.dtype)


def _prepared(prepare: Prepare, picture: Picture, index: int) -> Pixels:
    what = str(picture) if isinstance(picture, str | PathLike) else f"image {index}"
    try:
        return prepare(picture)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {what}.") from error
    except (DecodeError, OSError) as error:
        raise ValueError(f"{what}: {error}.") from error


class ReadyXception(Xception):
    """An Xception with the weights of a file: it knows how pictures are prepared for them, and takes them as they are."""

    def predict(self, images: Any, *, batch: int = 32) -> Tensor:
        """Probabilities (N, K) of pictures of any kind, float32 on the CPU; `class_names` tells what the columns are.

        Args:
            images: one or a list of paths, Pillow images or uint8 arrays (H, W[, 3]), cropped and resized as
                `preprocessing` says; or a tensor (B, C, H, W) or (C, H, W), taken as it is: uint8, or float in [-1, 1].
            batch: images at once.

        Raises:
            ValueError: it is no picture, or cannot be decoded: the sentence says which and why.
        """
        return predict(self, images, prepare_for(self), batch=batch)


def ready(network: Xception) -> Xception:
    """The same network, with `predict` if it is an Xception."""
    if type(network) is Xception:
        network.__class__ = ReadyXception
    return network
