"""Batch norm over ranks: what one process computes with the whole batch, forward and backward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.processes import on_ranks
from xception_pl.nets.sync_norm import SyncBatchNorm2d, restore, synchronize


def whole_batch() -> tuple[nn.BatchNorm2d, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=0.1).double()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(3, generator=generator))
        norm.bias.copy_(torch.rand(3, generator=generator))
    images = torch.randn(8, 3, 4, 4, dtype=torch.double, generator=generator) * 3 + 1
    return norm, images, torch.randn(8, 3, 4, 4, dtype=torch.double, generator=generator)


def one_rank(rank: int) -> dict[str, Any]:
    from torch import distributed as dist

    dist.init_process_group("gloo")
    norm, images, gradient = whole_batch()
    synchronize(norm)
    mine = images.chunk(2)[rank].clone().requires_grad_()
    out = norm(mine)
    out.backward(gradient.chunk(2)[rank])
    dist.destroy_process_group()
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert mine.grad is not None
    running = dict(norm.named_buffers())
    return {"out": out.detach(), "input": mine.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, **running}


def test_two_ranks_equal_the_whole_batch(tmp_path: Path) -> None:
    ranks = on_ranks(2, one_rank, tmp_path)
    norm, images, gradient = whole_batch()
    images.requires_grad_()
    out = norm(images)
    out.backward(gradient)

    def close(mine: torch.Tensor, expected: torch.Tensor | None) -> None:
        assert expected is not None
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)

    close(torch.cat([rank["out"] for rank in ranks]), out.detach())
    close(torch.cat([rank["input"] for rank in ranks]), images.grad)
    close(ranks[0]["weight"] + ranks[1]["weight"], norm.weight.grad)  # DDP's to average
    close(ranks[0]["bias"] + ranks[1]["bias"], norm.bias.grad)
    for rank in ranks:
        close(rank["running_mean"], norm.running_mean)
        close(rank["running_var"], norm.running_var)


def test_it_keeps_modules_keys_and_activations() -> None:
    from timm.layers import BatchNormAct2d

    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4))
    modules, keys = list(network), list(network.state_dict())
    images = torch.randn(2, 3, 5, 5)
    before = network.eval()(images)
    synchronize(network)
    assert isinstance(network[1], SyncBatchNorm2d)
    assert isinstance(network[2], nn.BatchNorm2d)
    assert list(network) == modules
    assert list(network.state_dict()) == keys
    assert torch.equal(network(images), before)
    assert (network(images) >= 0).all()  # timm's ReLU is still there
    restore(network)
    assert [type(module) for module in network] == [nn.Conv2d, nn.BatchNorm2d, BatchNormAct2d]


def test_an_unknown_batch_norm_is_refused() -> None:
    class Strange(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="does not know the batch norm Strange"):
        synchronize(nn.Sequential(Strange(3)))
