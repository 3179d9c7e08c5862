"""Image bytes to a uint8 crop of the network's input size.

What an image file means, the same as where the published numbers were measured (Keras' `load_img`, torchvision's
`ImageFolder`, timm): colours become RGB by Pillow's `convert`, an alpha channel is dropped, colour profiles and **the
EXIF orientation are ignored**. One deliberate difference: 16-bit grayscale is scaled to 8 bits, where `convert` would
saturate it to white.

Resizing has half-pixel centres and is antialiased (Pillow's filters). TensorFlow 1's `resize_bilinear`, under which the
paper's networks were probably trained, had neither; what we do is what timm evaluates the released weights with.
Training boxes are cut out first and then resized, as TensorFlow does it: no pixel from outside of the box is seen.
"""

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xception_pl.data.config import DataConfig
from xception_pl.data.crops import Box, central_box, inception_box, timm_box, timm_eval_box, whole_box

Pixels = NDArray[np.uint8]
_BILINEAR, _BICUBIC, _NEAREST = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST


class DecodeError(ValueError):
    """These bytes are no image that can be read: empty, truncated, unknown, or too many pixels."""


def train_image(data: bytes, config: DataConfig, rng: np.random.Generator, channels: int = 3) -> Pixels:
    """Random crop of `data`, resized to (S, S, channels) with S = `config.image_size`, flipped half the time.

    `config.train_crop` names the box and the filter: `inception` and `resize` are bilinear, `timm` is bicubic.

    Raises:
        DecodeError: the bytes cannot be read.
    """
    image = _open(data, channels)
    height, width = image.height, image.width
    if config.train_crop == "inception":
        box = inception_box(rng, height, width, config.crop_area_min)
    elif config.train_crop == "timm":
        box = timm_box(rng, height, width, config.crop_area_min)
    else:
        box = whole_box(height, width)
    flip = config.flip and rng.random() < 0.5
    top, left = int(box.top), int(box.left)
    cut = image.crop((left, top, left + int(box.width), top + int(box.height)))
    pixels = _resize(
        cut, whole_box(cut.height, cut.width), config.image_size, _BICUBIC if config.train_crop == "timm" else _BILINEAR
    )
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def eval_image(data: bytes, config: DataConfig, channels: int = 3) -> Pixels:
    """Evaluation crop of `data`, (S, S, channels) with S = `config.image_size`, by `config.eval_crop`.

    - `tf-slim`: central 87.5 % of each dimension, bilinear, aspect ignored.
    - `keras`: the whole image, nearest neighbour, aspect ignored: `keras.utils.load_img(path, target_size=(S, S))` with
      its default, as in Keras' documentation of its applications.
    - `timm`: shorter side to S / 0.8975, bicubic, central square.
    - `resize`: the whole image, bilinear, aspect ignored.

    Raises:
        DecodeError: the bytes cannot be read.
    """
    image = _open(data, channels)
    size, whole = config.image_size, whole_box(image.height, image.width)
    if config.eval_crop == "tf-slim":
        box = central_box(image.height, image.width)
        cut = image.crop((int(box.left), int(box.top), int(box.left + box.width), int(box.top + box.height)))
        return _resize(cut, whole_box(cut.height, cut.width), size, _BILINEAR)
    if config.eval_crop == "timm":
        return _resize(image, timm_eval_box(image.height, image.width, size), size, _BICUBIC)
    return _resize(image, whole, size, _NEAREST if config.eval_crop == "keras" else _BILINEAR)


def _resize(image: Image.Image, box: Box, size: int, resample: Image.Resampling) -> Pixels:
    corners = (box.left, box.top, min(box.left + box.width, image.width), min(box.top + box.height, image.height))
    pixels = np.array(image.resize((size, size), resample, box=corners))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _open(data: bytes, channels: int) -> Image.Image:
    """The image as Pillow's RGB, or L for one channel."""
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}: set model.in_chans to 1 or 3")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Any = Image.open(io.BytesIO(data))
            if image.mode.startswith("I"):  # 16-bit grayscale: `convert` would clip at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            converted: Image.Image = image.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow raises many kinds on damaged files: OSError, SyntaxError, struct.error, …
        raise DecodeError(f"an image of {len(data)} bytes cannot be read: {error or type(error).__name__}") from error
    return converted
