"""Crops against their definitions, files as they are found, errors in one sentence."""

import io

import numpy as np
import pytest
from PIL import Image

from xception_pl.data.config import DataConfig
from xception_pl.data.decode import DecodeError, eval_image, train_image


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("train_crop", ["inception", "timm", "resize"])
@pytest.mark.parametrize("channels", [1, 3])
def test_training_crop_is_a_function_of_its_seed(train_crop: str, channels: int) -> None:
    data = encode(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    config = DataConfig(image_size=71, train_crop=train_crop)  # type: ignore[arg-type]
    crops = [train_image(data, config, np.random.default_rng(seed), channels) for seed in (1, 1, 2)]
    assert crops[0].shape == (71, 71, channels)
    assert crops[0].dtype == np.uint8
    np.testing.assert_array_equal(crops[0], crops[1])
    assert (crops[0] != crops[2]).any() or train_crop == "resize"


def test_unreadable_bytes() -> None:
    with pytest.raises(DecodeError, match="an image of 0 bytes cannot be read"):
        eval_image(b"", DataConfig())
