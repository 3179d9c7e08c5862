"""Synchronised batch norm: ranks with their own images compute what one process computes with all of them."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.conftest import DEVICE
from tests.kernels.reference import draw, norm_layer
from tests.processes import free_port
from xception_pl.kernels.ops import normalise


def test_statistics_and_sums_of_all_ranks(set_tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic between two ranks of 2 and 3 images, the communication replaced by what the other would send."""
    y, dz = (draw(5, 4, 4, 16, dtype=torch.float32, device=DEVICE) for _ in range(2))
    layer = norm_layer(16, DEVICE)
    alone = copy.deepcopy(layer)
    whole = normalise.finish(normalise.statistics(y), alone)
    whole_backward, _, _ = normalise.gradient_table(normalise.sums(dz, y, whole)[1], whole, alone)

    parts = [slice(0, 2), slice(2, 5)]
    merged = [normalise._finish(normalise.statistics(y[part]), layer, None)[1] for part in parts]
    monkeypatch.setattr(normalise, "synchronised", lambda norm: "ranks")
    monkeypatch.setattr(normalise.dist, "get_world_size", lambda group: 2)

    def gather(into: list[Tensor], own: Tensor, group: Any) -> None:
        assert any(torch.equal(own, one) for one in merged)
        for place, one in zip(into, merged, strict=True):
            place.copy_(one)

    monkeypatch.setattr(normalise.dist, "all_gather", gather)
    tables = [normalise.finish(normalise.statistics(y[part]), copy.deepcopy(layer)) for part in parts]
    assert torch.equal(*tables)
    torch.testing.assert_close(tables[0], whole, rtol=1e-5, atol=1e-6)

    sums = [normalise.sums(dz[part], y[part], tables[0])[1] for part in parts]
    local = [one.sum(0) for one in sums]
    monkeypatch.setattr(normalise.dist, "all_reduce", lambda own, group: own.copy_(sum(local)))
    for one, part in zip(sums, parts, strict=True):
        backward, d_weight, d_bias = normalise.gradient_table(one, tables[0], layer)
        torch.testing.assert_close(backward, whole_backward, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(d_bias, dz[part].sum((0, 1, 2)), rtol=1e-5, atol=1e-5)  # DDP averages: each its own
        xhat = (y[part] - whole[normalise.MEAN]) * whole[normalise.RSTD]
        torch.testing.assert_close(d_weight, (dz[part] * xhat).sum((0, 1, 2)), rtol=1e-4, atol=1e-4)


def test_one_process_does_not_synchronise() -> None:
    assert normalise.synchronised(nn.SyncBatchNorm(4)) is None


@pytest.mark.slow
def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    """DDP over gloo with 2 and 3 images a rank, against plain batch norm in float64 on all five."""
    from tests.kernels.sync_run import images, network

    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.sync_run", str(tmp_path)],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.wait(timeout=580) for rank in ranks] == [0, 0]
    exact = network().double()
    for _ in range(2):
        logits = exact(images().double())
        exact.zero_grad()
        (logits.square().sum() / 5).backward()
        with torch.no_grad():
            for parameter in exact.parameters():
                parameter -= 0.05 * parameter.grad
    states = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, value in exact.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        torch.testing.assert_close(states[0][name].double(), value.double(), rtol=2e-3, atol=2e-3, msg=name)
