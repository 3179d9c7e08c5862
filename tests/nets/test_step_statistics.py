"""Running statistics: one update a step, the mean of its batches' statistics."""

import torch
from torch import nn

from xception_pl.nets.step_statistics import StepStatistics


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=0.1), nn.ReLU(), nn.BatchNorm2d(3)).double()


def run_step(trained: nn.Module, statistics: StepStatistics, batches: list[torch.Tensor]) -> None:
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        statistics.batch_begins(last=last)
        out = trained(batch)
        statistics.batch_ends(last=last)
        out.sum().backward()  # insists on the buffers as the forward pass left them
    statistics.step_ends()


def test_a_step_of_one_batch_is_left_as_it_is() -> None:
    ours, plain = network(), network()
    statistics = StepStatistics(ours)
    for seed in range(3):
        batch = torch.randn(4, 2, 5, 5, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
        run_step(ours, statistics, [batch])
        plain(batch)
    for mine, theirs in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_accumulated_batches_are_averaged_from_one_start() -> None:
    ours = network()
    statistics = StepStatistics(ours)
    expected = network()
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        batches = [torch.randn(4, 2, 5, 5, dtype=torch.double, generator=generator) * (1 + i) for i in range(3)]
        run_step(ours, statistics, batches)
        before = {name: value.clone() for name, value in expected.state_dict().items()}
        after = []
        for batch in batches:  # three ranks, each with a batch
            expected.load_state_dict(before)
            expected(batch)
            after.append({name: value.clone() for name, value in expected.named_buffers()})
        for name, value in expected.named_buffers():
            if value.is_floating_point():
                value.copy_(torch.stack([rank[name] for rank in after]).mean(0))
        for name, value in ours.named_buffers():
            if value.is_floating_point():
                torch.testing.assert_close(value, expected.get_buffer(name), rtol=0, atol=1e-14)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    ours = network()
    norm = ours[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.eval()
    run_step(ours, StepStatistics(ours), [torch.randn(4, 2, 5, 5, dtype=torch.double) for _ in range(2)])
    assert norm.running_mean is not None
    assert torch.equal(norm.running_mean, torch.zeros(3, dtype=torch.double))
