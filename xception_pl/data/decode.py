"""Image bytes to a uint8 crop of the network's input size.

What an image file means, the same as where the published numbers were measured (Keras' `load_img`, torchvision's
`ImageFolder`, timm): colours become RGB by Pillow's `convert`, an alpha channel is dropped, colour profiles and **the
EXIF orientation are ignored**. One deliberate difference: 16-bit grayscale is scaled to 8 bits, where `convert` would
saturate it to white.

Resizing has half-pixel centres and is antialiased (Pillow's filters). TensorFlow 1's `resize_bilinear`, under which the
paper's networks were probably trained, had neither; what we do is what timm evaluates the released weights with.
Training boxes are cut out first and then resized, as TensorFlow does it: no pixel from outside of the box is seen.

Ordinary JPEGs (8 bits, grey or three components, whole) take the fast way, `native`, where it can be compiled. All
other files, and JPEGs at which libjpeg stumbles, go to Pillow, whose judgement counts. The crop does not depend on the
way: native is Pillow's result to within one grey level for bilinear and six for bicubic resizing (Pillow's order of
passes differs for boxes that shrink in one direction only), except in training crops at least twice the network's input
in both directions, where it decodes with a smaller DCT.
"""

import io
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from xception_pl.data.config import DataConfig
from xception_pl.data.crops import Box, central_box, inception_box, timm_box, timm_eval_box, whole_box
from xception_pl.data.native import crop_jpeg

Pixels = NDArray[np.uint8]
MAX_PIXELS = 89_478_485
"""More is taken for a decompression bomb: Pillow's own bound."""


class DecodeError(ValueError):
    """These bytes are no image that can be read: empty, truncated, unknown, or too many pixels."""


class Crop(NamedTuple):
    """Which part of an image is shown, and how it is resized; the arguments of `native.crop_jpeg`."""

    box: Box
    bicubic: bool
    flip: bool = False
    context: bool = False
    scaled: bool = False


def train_crop(config: DataConfig, rng: np.random.Generator, height: int, width: int) -> Crop:
    """A random crop of an image, flipped half the time, by `config.train_crop`.

    It names the box and the filter: `inception` and `resize` are bilinear, `timm` is bicubic.
    """
    if config.train_crop == "inception":
        box = inception_box(rng, height, width, config.crop_area_min)
    elif config.train_crop == "timm":
        box = timm_box(rng, height, width, config.crop_area_min)
    else:
        box = whole_box(height, width)
    flip = config.flip and bool(rng.random() < 0.5)
    return Crop(box, config.train_crop == "timm", flip=flip, scaled=True)


def train_image(
    data: bytes, config: DataConfig, rng: np.random.Generator, channels: int = 3, out: Pixels | None = None
) -> Pixels:
    """`train_crop` of `data`, resized to (S, S, channels) with S = `config.image_size`; into `out`, if given.

    `out` has room as `native.crop_jpeg` wants it.

    Raises:
        DecodeError: the bytes cannot be read.
    """
    image = _Source(data, channels)
    return image.crop(config.image_size, train_crop(config, rng, image.height, image.width), out)


def eval_image(data: bytes | Image.Image, config: DataConfig, channels: int = 3, out: Pixels | None = None) -> Pixels:
    """Evaluation crop of `data`, bytes or an opened image, (S, S, channels) with S = `config.image_size`, by
    `config.eval_crop`; into `out`, if given.

    - `tf-slim`: central 87.5 % of each dimension, bilinear, aspect ignored.
    - `keras`: the whole image, nearest neighbour, aspect ignored: `keras.utils.load_img(path, target_size=(S, S))` with
      its default, as in Keras' documentation of its applications. Keras does not publish the crop of its own table.
    - `timm`: shorter side to S / 0.8975, bicubic, central square.
    - `resize`: the whole image, bilinear, aspect ignored.

    Raises:
        DecodeError: the bytes cannot be read.
    """
    image, size = _Source(data, channels), config.image_size
    if config.eval_crop == "tf-slim":
        return image.crop(size, Crop(central_box(image.height, image.width), bicubic=False), out)
    if config.eval_crop == "timm":
        return image.crop(size, Crop(timm_eval_box(image.height, image.width, size), bicubic=True, context=True), out)
    if config.eval_crop == "keras":
        return _pixels(image.pillow().resize((size, size), Image.Resampling.NEAREST), False, out)
    return image.crop(size, Crop(whole_box(image.height, image.width), bicubic=False), out)


class _Source:
    """An image whose size is known and whose pixels are decoded when it is known which are needed."""

    def __init__(self, data: bytes | Image.Image, channels: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, not {channels}: set model.in_chans to 1 or 3")
        self.data, self.channels = data, channels
        size = plain_jpeg_size(data) if channels == 3 and isinstance(data, bytes) else None
        self._decoded = None if size else open_image(data, channels)
        self.height, self.width = size or (self.pillow().height, self.pillow().width)
        if self.height * self.width > MAX_PIXELS:
            raise DecodeError(f"an image of {self.width} × {self.height} pixels is too large to be decoded")

    def pillow(self) -> Image.Image:
        if self._decoded is None:
            self._decoded = open_image(self.data, self.channels)
        return self._decoded

    def crop(self, size: int, crop: Crop, out: Pixels | None = None) -> Pixels:
        """The crop resized to (size, size, channels)."""
        box, bicubic, flip, context, scaled = crop
        if self._decoded is None and isinstance(self.data, bytes):
            pixels = crop_jpeg(self.data, box, size, bicubic, flip, context, scaled, out)
            if pixels is not None:
                return pixels
        image = self.pillow()
        left, top, right, bottom = box.left, box.top, box.left + box.width, box.top + box.height
        if not context:
            image = image.crop((int(left), int(top), int(right), int(bottom)))
            left, top, right, bottom = 0, 0, image.width, image.height
        edges = (left, top, min(right, image.width), min(bottom, image.height))
        filter_ = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        return _pixels(image.resize((size, size), filter_, box=edges), flip, out)


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of an ordinary JPEG from its header; None for all else.

    Ordinary: 8 bits, Huffman-coded, grey or three components, and with its end marker, so not truncated.
    """
    if data[:3] != b"\xff\xd8\xff" or data.rfind(b"\xff\xd9", -64) < 0:
        return None
    place = 2
    while place + 10 < len(data) and data[place] == 0xFF:
        kind = data[place + 1]
        if 0xC0 <= kind <= 0xC2:
            precision, components = data[place + 4], data[place + 9]
            height, width = (int.from_bytes(data[place + i : place + i + 2], "big") for i in (5, 7))
            return (height, width) if precision == 8 and components in (1, 3) and height and width else None
        if kind == 0xDA:
            return None
        place += 1 if kind == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def open_image(data: bytes | Image.Image, channels: int) -> Image.Image:
    """The whole image as Pillow's RGB, or L for one channel.

    Raises:
        DecodeError: the bytes cannot be read.
    """
    size = f"{len(data)} bytes" if isinstance(data, bytes) else f"{data.width} × {data.height} pixels"
    try:
        with warnings.catch_warnings():  # all ignored, none made an error: filters are not a thread's own
            warnings.simplefilter("ignore")
            image: Any = Image.open(io.BytesIO(_without_profile(data))) if isinstance(data, bytes) else data
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError(f"an image of {image.width} × {image.height} pixels is too large to be decoded")
            if image.mode.startswith("I"):  # 16-bit grayscale: `convert` would clip at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            converted: Image.Image = image.convert("RGB" if channels == 3 else "L")
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError(f"{size} cannot be read: they are no image of a known format") from error
    except Exception as error:  # Pillow raises many kinds on damaged files: OSError, SyntaxError, struct.error, …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DecodeError(f"an image of {size} cannot be read: {reason}") from error
    return converted


def _without_profile(data: bytes) -> bytes:
    """A PNG without its colour profile: Pillow refuses large ones (ImageNet has one), and we do not use them."""
    place = data.find(b"iCCP", 0, 1024) - 4
    if data[:4] != b"\x89PNG" or place < 0:
        return data
    return data[:place] + data[place + 12 + int.from_bytes(data[place : place + 4], "big") :]


def _pixels(image: Image.Image, flip: bool, out: Pixels | None) -> Pixels:
    pixels = np.asarray(image)
    pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
    if flip:
        pixels = pixels[:, ::-1]
    if out is None:
        return pixels.copy()
    out[...] = pixels
    return out
