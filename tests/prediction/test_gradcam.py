"""Grad-CAM against its closed form, and the picture that is made of it."""

import numpy as np
import torch

from xception_pl import Xception
from xception_pl.prediction.gradcam import grad_cam, overlay


def test_with_the_papers_head_it_is_cam() -> None:
    """Behind a mean and a linear layer the gradient of a logit is that layer's row: CAM, without any gradient."""
    torch.manual_seed(0)
    network = Xception(7, width=0.125, middle_blocks=1).eval().requires_grad_(False)
    torch.nn.init.normal_(network.fc.weight)  # type: ignore[arg-type]
    images, classes = torch.randn(3, 3, 160, 128), torch.tensor([6, 0, 2])
    logits, heat, features = grad_cam(network, images, classes)
    with torch.no_grad():
        assert torch.allclose(logits, network(images), atol=1e-6)
        assert torch.equal(features, network.forward_features(images))
        cam = torch.einsum("bc,bchw->bhw", network.fc.weight[classes], features).relu()  # type: ignore[index]
    assert torch.allclose(heat, cam / cam.amax((1, 2), keepdim=True), atol=1e-5)
    assert heat.shape == (3, 5, 4)


def test_without_classes_it_is_of_the_likeliest() -> None:
    torch.manual_seed(1)
    network = Xception(7, width=0.125, middle_blocks=0, fc_units=(16,)).eval()
    images = torch.randn(2, 3, 96, 96)
    logits, heat, _ = grad_cam(network, images)
    assert torch.equal(heat, grad_cam(network, images, logits.argmax(1))[1])
    assert not heat.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_map_without_anything_positive_is_zero_not_nan() -> None:
    network = Xception(2, width=0.125, middle_blocks=0).eval()
    torch.nn.init.constant_(network.fc.weight, -1.0)  # type: ignore[arg-type]
    assert grad_cam(network, torch.randn(1, 3, 71, 71))[1].tolist() == [[[0.0] * 3] * 3]


def test_the_overlay_is_hot_where_the_map_is() -> None:
    pixels = np.full((71, 71, 3), 128, np.uint8)
    heat = torch.zeros(3, 3)
    heat[0, 2] = 1.0
    picture = np.asarray(overlay(pixels, heat)).astype(int)
    assert picture.shape == (71, 71, 3)
    assert picture[0, 70, 0] > picture[0, 70, 2]  # red over blue
    assert picture[70, 0, 0] < picture[70, 0, 2]
    assert np.asarray(overlay(pixels[:, :, :1], heat)).shape == (71, 71, 3)
