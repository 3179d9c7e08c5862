"""Pictures of any kind, from Python."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.prediction.conftest import photograph, shipped
from xception_pl import Xception
from xception_pl.data.config import DataConfig
from xception_pl.data.decode import eval_image
from xception_pl.weights.ready import Prepare, predict, scaled

PREPARE = Prepare(71, "tf-slim", 3)


@pytest.fixture(scope="module")
def network() -> Xception:
    torch.manual_seed(0)
    return Xception(5, width=0.125, middle_blocks=0).train()


def by_hand(network: Xception, data: bytes) -> torch.Tensor:
    pixels = eval_image(data, DataConfig(image_size=71, eval_crop="tf-slim"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    network.eval()
    with torch.no_grad():
        found = network(image).softmax(1)
    network.train()
    return found


def test_paths_pillow_images_and_arrays_give_the_same(network: Xception, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    photograph(0).save(path)
    expected = by_hand(network, path.read_bytes())
    images = [path, str(path), path.read_bytes(), Image.open(path), np.asarray(Image.open(path))]
    found = predict(network, images, PREPARE)
    assert found.shape == (5, 5)
    assert torch.allclose(found, expected.expand(5, 5), atol=1e-6)
    for image in images:
        assert torch.allclose(predict(network, image, PREPARE), expected, atol=1e-6)
    assert network.training


def test_grey_pictures_become_colour_and_colour_grey(tmp_path: Path) -> None:
    grey = np.asarray(Image.open(__import__("io").BytesIO(shipped(0))))
    assert grey.ndim == 2
    assert np.array_equal(PREPARE(grey), PREPARE(grey[:, :, None]))
    assert PREPARE(grey).shape == (71, 71, 3)
    assert Prepare(71, "resize", 1)(np.asarray(photograph(0))).shape == (71, 71, 1)


def test_tensors_are_taken_as_they_are(network: Xception) -> None:
    bytes_ = torch.randint(0, 256, (3, 3, 80, 75), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = scaled(bytes_)
    assert torch.equal(floats, bytes_.float() / 127.5 - 1) or torch.allclose(
        floats, bytes_.float() / 127.5 - 1, atol=1e-6
    )
    found = predict(network, bytes_, PREPARE, batch=2)
    assert torch.allclose(found, predict(network, floats, PREPARE), atol=1e-6)
    assert torch.allclose(predict(network, bytes_[0], PREPARE), found[:1], atol=1e-6)
    assert found.sum(1) == pytest.approx(torch.ones(3), abs=1e-5)


def test_an_array_of_four_axes_is_a_list(network: Xception) -> None:
    stack = np.stack([np.asarray(photograph(seed)) for seed in range(3)])
    assert torch.equal(predict(network, stack, PREPARE), predict(network, list(stack), PREPARE))


def test_mistakes_are_sentences(network: Xception, tmp_path: Path) -> None:
    (tmp_path / "junk.jpg").write_bytes(b"junk")
    for images, sentence in (
        (tmp_path / "gone.jpg", "there is no file .*gone.jpg"),
        ([tmp_path / "junk.jpg"], "junk.jpg: 4 bytes cannot be read"),
        ([photograph(0), b""], "image 1: 0 bytes cannot be read"),
        (np.zeros((4, 4, 3)), "float64 is no picture"),
        (torch.zeros(2, 1, 71, 71), r"tensors of shape \(B, 3, H, W\)"),
        ([torch.zeros(3, 71, 71)], "not a list of them"),
    ):
        with pytest.raises(ValueError, match=sentence):
            predict(network, images, PREPARE)
