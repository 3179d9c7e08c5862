"""Xception computes what Keras' own Xception computes, with random weights and random batch-norm statistics."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xception_pl.nets.xception import Xception

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras with NumPy 2

SIZES = (299, 256, 150, 71)  # odd and even sizes: TensorFlow pads them differently


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    assert keras.backend.backend() == "torch"
    return keras


def random_weights(model: Any) -> Any:
    """Every number of a Keras model random, so that no two layers could be exchanged unseen."""
    random = np.random.default_rng(0)
    weights = []
    for variable in model.weights:
        shape = tuple(variable.shape)
        if variable.name in ("gamma", "moving_variance"):
            weights.append(random.uniform(0.5, 1.5, shape))
        elif len(shape) == 1:
            weights.append(random.normal(0, 0.3, shape))
        else:  # so large that the signal neither dies nor grows on its way
            inputs = 9 if variable.name == "depthwise_kernel" else np.prod(shape[:-1])
            weights.append(random.normal(0, (1 / inputs) ** 0.5, shape))
    model.set_weights(weights)
    return model


@pytest.fixture(scope="module")
def reference(keras: Any) -> Any:
    """Keras' network, every number of it random."""
    return random_weights(keras.applications.Xception(weights=None, classifier_activation=None))


def from_keras(model: Any) -> Xception:
    """Our network with the weights of Keras' model, by names; the four shortcuts, which have none, by order."""
    network = Xception(num_classes=1000)
    shortcuts = {"Conv2D": iter((2, 3, 4, 13)), "BatchNormalization": iter((2, 3, 4, 13))}
    filled = set()
    for layer in model.layers:
        if not layer.weights:
            continue
        kind = type(layer).__name__
        if layer.name == "predictions":
            name = "fc"
        elif layer.name.startswith("block"):
            block, *rest = layer.name.split("_")
            name = f"{block}.{rest[0]}" if len(rest) == 1 else f"{block}.bn{rest[0][-1]}"
        else:
            name = f"block{next(shortcuts[kind])}.shortcut{'_bn' * (kind == 'BatchNormalization')}"
        module = network.get_submodule(name)
        values = [torch.tensor(value) for value in layer.get_weights()]
        for tensor, value in zip(_tensors(module), values, strict=True):
            if value.ndim == 4:
                value = (
                    value.permute(3, 2, 0, 1)
                    if value.shape[:2] != (3, 3) or kind == "Conv2D"
                    else value.permute(2, 3, 0, 1)
                )
            elif value.ndim == 2:
                value = value.T
            assert tensor.shape == value.shape, name
            tensor.data.copy_(value)
            filled.add(tensor.data_ptr())
    missing = [
        name for name, tensor in network.state_dict().items() if tensor.dim() and tensor.data_ptr() not in filled
    ]
    assert missing == []
    return network.eval()


def _tensors(module: nn.Module) -> list[Tensor]:
    """In the order of Keras' weights."""
    if isinstance(module, nn.BatchNorm2d):
        return [module.weight, module.bias, module.running_mean, module.running_var]  # type: ignore[list-item]
    return list(module.parameters())


@pytest.fixture(scope="module")
def ours(reference: Any) -> Xception:
    return from_keras(reference)


@pytest.mark.parametrize("size", SIZES)
def test_forward_equals_keras(keras: Any, reference: Any, ours: Xception, size: int) -> None:
    images = smooth_images(size)
    model = reference
    if size != 299:
        model = keras.applications.Xception(weights=None, classifier_activation=None, input_shape=(size, size, 3))
        model.set_weights(reference.get_weights())
    layers = ["block14_sepconv2_act", "predictions"]
    views = keras.Model(model.input, [model.get_layer(name).output for name in layers])
    with torch.no_grad():
        features, logits = views(images.permute(0, 2, 3, 1))
        ours_features = ours.forward_features(images)
        ours_logits = ours.forward_head(ours_features)
    assert relative_error(ours_features, features.permute(0, 3, 1, 2)) < 1e-4
    assert relative_error(ours_logits, logits) < 1e-4
    # and the comparison says something: half the features live, and the two images differ
    assert 0.3 < (features > 0).float().mean() < 0.7
    assert (logits[0] - logits[1]).abs().mean() > 0.02 * logits.abs().mean()


def test_pytorchs_own_padding_would_not_pass(reference: Any, ours: Xception, monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth_images(299)
    with torch.no_grad():
        expected = reference(images.permute(0, 2, 3, 1))
        monkeypatch.setattr(
            "xception_pl.nets.xception.same_max_pool", lambda x, stride, dilation: nn.functional.max_pool2d(x, 3, 2, 1)
        )
        assert relative_error(ours(images), expected) > 1e-3


def test_initial_weights_have_keras_limits(keras: Any) -> None:
    """Keras' own fans, kernel by kernel, against those of our network."""
    from keras.src.initializers.random_initializers import compute_fans

    network = Xception()
    for name, weight in network.named_parameters():
        if weight.dim() == 1:
            continue
        shape = tuple(weight.shape)
        if "depthwise" in name:
            shape = (3, 3, shape[0], 1)
        elif weight.dim() == 4:
            shape = (*shape[2:], shape[1], shape[0])
        limit = (6 / sum(compute_fans(shape))) ** 0.5
        assert 0.95 * limit < weight.abs().max() <= limit, name


def smooth_images(size: int, channels: int = 3) -> Tensor:
    """Two images in [-1, 1] with structure that survives the poolings: ``(2, channels, size, size)``."""
    coarse = torch.randn(2, channels, 10, 10, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=size, mode="bilinear").clamp(-1, 1)


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()
