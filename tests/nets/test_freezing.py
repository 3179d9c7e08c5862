"""Frozen means: no gradient, no decay, no new statistics, the same features in training as in evaluation."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from xception_pl import Xception, XceptionModule
from xception_pl.nets.freezing import freeze

BLOCKS = 3


def module(**model: Any) -> XceptionModule:
    torch.manual_seed(0)
    tiny = {"num_classes": 4, "width": 0.125, "middle_blocks": 1, "dropout": 0.0, "weights": "some.safetensors"}
    return XceptionModule(tiny | model, {"lr": 0.1, "l2": 0.1, "l2_on": "all", "ema_decay": 0}, global_batch=4)


def batch(images: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randn(images, 3, 71, 71, generator=generator), "label": torch.arange(images) % 4}


def trained(made: XceptionModule, steps: int = 2) -> None:
    made.train()
    optimizer = made.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        made.training_step(batch(), 0).backward()
        optimizer.step()


def test_frozen_blocks_stay_to_the_bit_while_the_others_move() -> None:
    made = module(freeze=BLOCKS)
    before = copy.deepcopy(made.network.state_dict())
    trained(made)
    for name, value in made.network.state_dict().items():
        frozen = name.startswith(tuple(f"block{number}." for number in range(1, 1 + BLOCKS)))
        assert torch.equal(value, before[name]) == frozen, name


def test_features_of_frozen_blocks_are_those_of_evaluation() -> None:
    made, images = module(freeze=BLOCKS), batch()["image"]

    def features() -> torch.Tensor:
        return made.network.forward_intermediates(images, [2], intermediates_only=True, stop_early=True)[0]  # type: ignore[operator]

    made.eval()
    reference = features()
    made.train()
    assert torch.equal(features(), reference)


def test_without_freezing_the_mode_the_statistics_would_move() -> None:
    """The trap: weights that do not train, in blocks that are in training mode."""
    made = module()
    made.network.block1.requires_grad_(False)  # type: ignore[union-attr]
    before = made.network.block1.bn1.running_mean.clone()  # type: ignore[union-attr]
    trained(made)
    assert not torch.equal(made.network.block1.bn1.running_mean, before)  # type: ignore[union-attr]


def test_kept_statistics_leave_scale_and_offset_to_training() -> None:
    made = module(freeze_statistics=True)
    before = copy.deepcopy(made.network.state_dict())
    trained(made)
    for name, value in made.network.state_dict().items():
        kept = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(value, before[name]) == kept, name


def test_with_kept_statistics_images_do_not_depend_on_their_batch() -> None:
    made, images = module(freeze_statistics=True), batch()["image"]
    made.train()
    assert torch.allclose(made.network(images)[:2], made.network(images[:2]), atol=1e-6)


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_survives_every_train(mode: bool) -> None:
    made = module(freeze=BLOCKS)
    made.train(mode).train().eval().train(mode)
    assert made.network.block3.bn1.training is False  # type: ignore[union-attr]
    assert made.network.block4.bn1.training is mode  # type: ignore[union-attr]


def test_gradients_are_those_of_the_same_network_by_hand() -> None:
    made = module(freeze=BLOCKS)
    by_hand = copy.deepcopy(made.network).requires_grad_(True).train()
    for number in range(1, 1 + BLOCKS):
        by_hand.get_submodule(f"block{number}").eval()
    nn.functional.cross_entropy(by_hand(batch()["image"]), batch()["label"]).backward()
    made.train()
    made.training_step(batch(), 0).backward()
    for (name, mine), other in zip(made.network.named_parameters(), by_hand.parameters(), strict=True):
        if name.startswith(tuple(f"block{number}." for number in range(1, 1 + BLOCKS))):
            assert mine.grad is None
        else:
            assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]


def test_all_blocks_frozen_train_the_head_alone() -> None:
    made = module(freeze=7)
    trainable = [name for name, parameter in made.network.named_parameters() if parameter.requires_grad]
    assert trainable == ["fc.weight", "fc.bias"]


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"model\.freeze 8: the network has 7 blocks"):
        freeze(Xception(4, width=0.125, middle_blocks=1), 8)
