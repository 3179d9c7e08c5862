"""Folding changes the number of operations and nothing else."""

import pytest
import torch
from torch import nn

from tests.weights.conftest import SMALL, outputs, randomise, relative_error, smooth_images
from xception_pl.nets.fold import fold_batch_norm
from xception_pl.nets.xception import Xception


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"numerics": "torch"},
        {"residual": False},
        {"segments": 4},
        {"intermediate_activation": "elu"},
        {"output_stride": 8},
    ],
    ids=str,
)
def test_outputs_stay_and_batch_norms_go(options: dict[str, object]) -> None:
    network = randomise(Xception(5, **SMALL | options))  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert relative_error(outputs(folded, smooth_images(75)), outputs(network, smooth_images(75))) < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_folding_twice_and_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="folded already"):
        fold_batch_norm(fold_batch_norm(Xception(5, **SMALL)))
    with pytest.raises(ValueError, match="only an Xception can be folded, not Linear"):
        fold_batch_norm(nn.Linear(2, 2))
