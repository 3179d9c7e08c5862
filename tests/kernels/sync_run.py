"""One rank of test_sync: two steps of a fused network with synchronised batch norm; writes what came out.

The gradients are averaged as DDP does, by hand: DDP itself refuses a SyncBatchNorm that is not on a GPU.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from tests.kernels.conftest import LARGE, SMALL
from tests.kernels.interpreted import PATCHES
from xception_pl.kernels import gpu, tiles
from xception_pl.nets.xception import Xception


def network() -> Xception:
    torch.manual_seed(0)
    made = Xception(5, width=0.03125, middle_blocks=0, dropout=0.0, residual=True)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return made.train()


def images() -> torch.Tensor:
    return torch.randn(5, 3, 23, 23, generator=torch.Generator().manual_seed(1))


def main() -> None:
    for owner, name, quicker in PATCHES:
        setattr(owner, name, quicker)
    large = {k: {"any": {n: LARGE.get(n, v) for n, v in small.items()}} for k, small in SMALL.items()}
    tiles.table = lambda: {"default": {"tiles": large}}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = network()
    gpu.fuse(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    own = images()[:2] if rank == 0 else images()[2:]  # different numbers of images
    for _ in range(2):
        logits = model(own)
        model.zero_grad()
        (logits.square().sum() * 2 / 5).backward()  # averaged over two ranks: the mean over five images
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    torch.save(model.state_dict(), os.path.join(sys.argv[1], f"rank{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
