"""Which part of an image becomes the network's input: pure geometry, no pixels.

Each sampler draws from a NumPy generator alone, so a crop is a function of the image's size and its seed.
"""

import math
from typing import NamedTuple

import numpy as np

OBJECT_COVERED_MIN = 0.1
"""TF-Slim's `min_object_covered`. The object is the whole image here, so no box is below a tenth of its area."""
TIMM_CROP_SHARE = 0.8975
"""Share of the resized image that timm evaluates its Xception on (299 of 333 pixels)."""


class Box(NamedTuple):
    """A rectangle in pixels of the stored image. Fractions of a pixel are allowed in evaluation crops."""

    top: float
    left: float
    height: float
    width: float


def whole_box(height: int, width: int) -> Box:
    """The whole image."""
    return Box(0, 0, height, width)


def inception_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    area_min: float = 0.05,
    area_max: float = 1.0,
    aspect_min: float = 0.75,
    aspect_max: float = 1.33,
    attempts: int = 100,
) -> Box:
    """TF-Slim's random box: TensorFlow's `sample_distorted_bounding_box` with the whole image as the object.

    An attempt draws an aspect ratio (width / height) uniformly, a height uniformly among those whose box has an allowed
    area and fits, and a place uniformly. It counts when the box covers `OBJECT_COVERED_MIN` of the image; after
    `attempts` failures the whole image is taken. As in TensorFlow's kernel, a box that is smaller than the image never
    touches its last row or column (the offset is drawn below `height - box height`).
    """
    low, high = area_min * height * width, area_max * height * width
    for _ in range(attempts):
        aspect = aspect_min + float(rng.random()) * (aspect_max - aspect_min)
        size = _inception_size(rng, height, width, low, high, aspect)
        if size is None or size[0] * size[1] < OBJECT_COVERED_MIN * height * width:
            continue
        top = int(rng.integers(height - size[0])) if size[0] < height else 0
        left = int(rng.integers(width - size[1])) if size[1] < width else 0
        return Box(top, left, *size)
    return whole_box(height, width)


def _inception_size(
    rng: np.random.Generator, height: int, width: int, low: float, high: float, aspect: float
) -> tuple[int, int] | None:
    """Height and width of one attempt of TensorFlow's `GenerateRandomCrop`, or None where no box fits."""
    smallest = round(math.sqrt(low / aspect))
    largest = round(math.sqrt(high / aspect))
    if round(largest * aspect) > width:  # the tallest box that is not too wide
        largest = int((width + 0.5 - 1e-7) / aspect)
        largest -= round(largest * aspect) > width
    largest = min(largest, height)
    smallest = min(smallest, largest)
    tall = smallest + int(rng.integers(largest - smallest + 1)) if smallest < largest else smallest
    wide = round(tall * aspect)
    if tall * wide < low:  # rounding put it just outside: one row more, one row less
        tall += 1
        wide = round(tall * aspect)
    if tall * wide > high:
        tall -= 1
        wide = round(tall * aspect)
    fits = 0 < tall <= height and 0 < wide <= width and low <= tall * wide <= high
    return (tall, wide) if fits else None


def timm_box(rng: np.random.Generator, height: int, width: int, area_min: float = 0.08) -> Box:
    """RandomResizedCrop's random box: area uniform, log of the aspect ratio (3/4 to 4/3) uniform, ten attempts.

    When none fits, the largest central box of an allowed aspect ratio (torchvision, timm).
    """
    log_aspect = math.log(4 / 3)
    for _ in range(10):
        area = float(rng.uniform(area_min, 1.0)) * height * width
        aspect = math.exp(float(rng.uniform(-log_aspect, log_aspect)))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return Box(int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1)), tall, wide)
    tall, wide = height, width
    if width / height < 3 / 4:
        tall = round(width / (3 / 4))
    elif width / height > 4 / 3:
        wide = round(height * (4 / 3))
    return Box((height - tall) // 2, (width - wide) // 2, tall, wide)


def central_box(height: int, width: int, share: float = 0.875) -> Box:
    """TensorFlow's `central_crop`: `share` of each dimension, the margin rounded down to whole pixels."""
    top, left = int((height - height * share) / 2), int((width - width * share) / 2)
    return Box(top, left, height - 2 * top, width - 2 * left)


def timm_eval_box(height: int, width: int, size: int) -> Box:
    """The box that timm's evaluation shows: shorter side to `size` / 0.8975, then the central `size` × `size`.

    Resizing the image and cropping it is the same as resizing this box with the image around it.
    """
    short = math.floor(size / TIMM_CROP_SHARE)
    new_height, new_width = (
        (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    )
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    scale_y, scale_x = height / new_height, width / new_width
    return Box(top * scale_y, left * scale_x, size * scale_y, size * scale_x)
