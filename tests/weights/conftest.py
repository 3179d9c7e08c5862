"""Networks with random weights and statistics, so that no two tensors could be exchanged unseen."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nets.conftest import one_thread
from tests.nets.test_keras_parity import relative_error, smooth_images
from xception_pl.nets.xception import Xception

__all__ = ["SMALL", "one_thread", "outputs", "randomise", "relative_error", "smooth_images"]

SMALL: dict[str, Any] = {"width": 0.125, "middle_blocks": 1}


def randomise(network: nn.Module) -> nn.Module:
    """Random numbers everywhere, so large that the signal neither dies nor grows on its way; evaluation mode."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, fan_in**-0.5, generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.3, generator=generator)
    return network.eval()


@torch.no_grad()
def outputs(network: nn.Module, images: Tensor) -> Tensor:
    result: Tensor = network(images)
    return result


@pytest.fixture
def small() -> Xception:
    network = randomise(Xception(5, **SMALL))
    assert isinstance(network, Xception)
    return network
