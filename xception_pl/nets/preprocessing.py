"""What a network's weights expect of images, kept with them. Imports no library."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How evaluation images are prepared: cropped, resized, and scaled from [0, 255] to [-1, 1], x / 127.5 - 1.

    The scaling has no setting: Keras', timm's and Cadene's weights and ours share it.
    """

    image_size: int = 299
    """Side of the network's input in pixels."""
    eval_crop: Literal["tf-slim", "keras", "timm", "resize"] = "tf-slim"
    """As `data.eval_crop` of a recipe: central 87.5 % of each side; Keras' resize; timm's 0.8975 bicubic; the whole image."""
