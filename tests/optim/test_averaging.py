"""Polyak averaging: exact values step by step, and its life as part of a larger module."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from xception_pl.optim.averaging import PolyakAverage, polyak_decay
from xception_pl.optim.config import OptimConfig
from xception_pl.optim.create import parameter_groups


def small_network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 9, 2))
    return network.to(dtype)


def moved(network: nn.Module) -> None:
    """Change every parameter, running statistic and counter."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter)
        network.train()(torch.randn(2, 3, 5, 5, dtype=next(network.parameters()).dtype))


def test_decay_is_tensorflows() -> None:
    assert [polyak_decay(0.9999, n) for n in range(4)] == [1 / 10, 2 / 11, 3 / 12, 4 / 13]
    assert polyak_decay(0.9999, 89_989) < 0.9999
    assert polyak_decay(0.9999, 89_990) == pytest.approx(0.9999, rel=1e-15)
    assert polyak_decay(0.9999, 10**9) == 0.9999
    assert polyak_decay(0.05, 0) == 0.05


@pytest.mark.parametrize("decay", [0.9999, 0.5, 0.0])
def test_every_step_of_every_tensor_is_tensorflows_formula(decay: float) -> None:
    network = small_network()
    average = PolyakAverage(network, decay)
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for update in range(12):
        moved(network)
        average.update(network)
        d = min(decay, (1 + update) / (10 + update))
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                expected[name] -= (1 - d) * (expected[name] - value)
            else:
                expected[name] = value.clone()
            torch.testing.assert_close(average.network.state_dict()[name], expected[name], rtol=1e-13, atol=1e-15)
    assert average.updates.item() == 12
    assert expected["1.num_batches_tracked"].item() == 12


def test_a_late_update_pulls_by_one_minus_decay() -> None:
    network = small_network()
    average = PolyakAverage(network, 0.9999)
    average.updates.fill_(7_000_000)
    before = average.network[0].weight.clone()
    moved(network)
    average.update(network)
    expected = before - (1 - 0.9999) * (before - network[0].weight)
    torch.testing.assert_close(average.network[0].weight, expected.detach(), rtol=1e-13, atol=0.0)


def test_the_network_is_not_touched_and_shares_no_memory() -> None:
    network = small_network()
    average = PolyakAverage(network, 0.9)
    moved(network)
    before = copy.deepcopy(network.state_dict())
    average.update(network)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.data_ptr() != average.network.state_dict()[name].data_ptr()


def test_it_updates_in_place() -> None:
    network = small_network()
    average = PolyakAverage(network, 0.9)
    places = [value.data_ptr() for value in average.state_dict().values()]
    moved(network)
    average.update(network)
    assert [value.data_ptr() for value in average.state_dict().values()] == places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_memory_format_stay(dtype: torch.dtype) -> None:
    network = small_network(dtype).to(memory_format=torch.channels_last)
    average = PolyakAverage(network, 0.9)
    with torch.no_grad():
        network[0].weight += 1.0
    average.update(network)
    assert average.network[0].weight.dtype == dtype
    assert average.network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not average.network[0].weight.is_contiguous()


def test_it_is_always_in_evaluation_mode() -> None:
    whole = nn.ModuleDict({"network": small_network(), "average": PolyakAverage(small_network(), 0.9)})
    whole.train()
    assert whole["network"].training
    assert not any(module.training for module in whole["average"].modules())
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(whole["average"](images), whole["network"].eval()(images))


def test_it_adds_nothing_to_train() -> None:
    network = small_network()
    network(torch.randn(2, 3, 5, 5, dtype=torch.float64)).sum().backward()
    whole = nn.ModuleDict({"network": network, "average": PolyakAverage(network, 0.9)})
    assert all(parameter.grad is None for parameter in whole["average"].parameters())
    assert all(parameter.grad is not None for parameter in network.parameters())
    grouped = [p for group in parameter_groups(whole, OptimConfig()) for p in group["params"]]
    assert len(grouped) == len(list(network.parameters()))


def test_the_state_dict_is_all_that_a_resumed_run_needs() -> None:
    network = small_network()
    average = PolyakAverage(network, 0.9)
    for _ in range(3):
        moved(network)
        average.update(network)
    resumed = PolyakAverage(small_network(), 0.9)
    resumed.load_state_dict(average.state_dict())
    moved(network)
    average.update(network)
    resumed.update(network)
    for name, value in average.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_copies_and_pickles_go_on_alike() -> None:
    network = small_network()
    average = PolyakAverage(network, 0.9)
    moved(network)
    average.update(network)
    others = [copy.deepcopy(average), pickle.loads(pickle.dumps(average))]
    moved(network)
    for each in (average, *others):
        each.update(network)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(average.buffers(), other.buffers(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(average.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_averaged_by_its_plain_names(in_place: bool) -> None:
    network = small_network()
    if in_place:
        network.compile(backend="eager")
        compiled: nn.Module = network
    else:
        compiled = torch.compile(network, backend="eager")
    average = PolyakAverage(compiled, 0.0)
    assert average.network.state_dict().keys() == small_network().state_dict().keys()
    moved(network)
    average.update(compiled)
    assert torch.equal(average.network[4].weight, network[4].weight)


def test_tied_weights_are_averaged_once() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    average = PolyakAverage(network, 0.9)
    assert average.network[1].weight is average.network[0].weight
    start = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 1.0
    average.update(network)
    torch.testing.assert_close(average.network[0].weight, start + 0.9)


def test_it_lives_inside_ddp(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_network()
            self.average = PolyakAverage(self.network, 0.9)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images)  # type: ignore[no-any-return]

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        whole = nn.parallel.DistributedDataParallel(Whole()).train()
        for update in range(1, 4):
            whole(torch.randn(2, 3, 5, 5, dtype=torch.float64)).sum().backward()  # DDP misses no gradient
            whole.module.average.update(whole.module.network)
            assert whole.module.average.updates.item() == update
        assert all(parameter.grad is None for parameter in whole.module.average.parameters())
    finally:
        dist.destroy_process_group()


def test_another_network_is_refused() -> None:
    average = PolyakAverage(small_network(), 0.9)
    with pytest.raises(ValueError, match="other parameters"):
        average.update(small_network()[:3])
    with pytest.raises(ValueError, match="other parameters"):
        average.update(nn.Sequential(*small_network()[:4], nn.Linear(4 * 9, 3)))


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_impossible_decay(decay: float) -> None:
    with pytest.raises(ValueError, match="decay of the average"):
        PolyakAverage(small_network(), decay)
