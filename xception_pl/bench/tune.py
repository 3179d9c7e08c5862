"""`bench tune`: measures tile sizes of the fused kernels on the GPU at hand, and stores what was fastest."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

CHOICES: dict[str, list[dict[str, int]]] = {
    "depthwise": [
        {"COLUMNS": columns, "CHANNELS": channels, "STAGES": stages, "num_warps": warps}
        for columns, channels, stages, warps in product((4, 8), (64, 128), (1, 2, 3), (4, 8))
    ],
    "depthwise_backward": [
        {"COLUMNS": columns, "CHANNELS": channels, "STAGES": stages, "num_warps": warps, "per_sm": per_sm}
        for columns, channels, stages, warps, per_sm in product((4, 8), (64, 128), (1, 2), (4, 8), (2, 4, 8))
    ],
    "pool": [
        {"COLUMNS": columns, "CHANNELS": 128, "STAGES": stages, "num_warps": 4}
        for columns, stages in product((2, 4, 8), (1, 2))
    ],
    "pool_backward": [
        {"COLUMNS": columns, "CHANNELS": 128, "STAGES": stages, "num_warps": warps, "per_sm": 4}
        for columns, stages, warps in product((2, 4), (1, 2), (4, 8))
    ],
    "pointwise": [
        {"M": m, "N": n, "K": k, "num_warps": 8, "num_stages": stages, "per_sm": per_sm}
        for (m, n), k, stages, per_sm in product(((128, 128), (128, 256), (256, 128)), (32, 64), (3, 4), (1, 2))
    ],
    "pointwise_input": [
        {"M": m, "N": n, "K": k, "num_warps": 8, "num_stages": stages, "per_sm": per_sm}
        for (m, k), n, stages, per_sm in product(
            ((128, 64), (128, 128), (64, 256), (128, 256)), (32, 64), (2, 3), (1, 2)
        )
    ],
    "pointwise_weight": [
        {"M": m, "N": n, "K": k, "num_warps": 8, "num_stages": stages, "per_sm": per_sm}
        for (n, k), m, stages, per_sm in product(((128, 64), (128, 128), (128, 256)), (64, 128), (3, 4), (1, 2))
    ],
}
"""What is tried for each kernel; a choice that the card cannot hold is left out."""


def main(arguments: list[str]) -> int:
    """Tunes, checks the network against the plain one, times both, and writes the card's entry."""
    parser = argparse.ArgumentParser(
        prog="python -m xception_pl.bench tune",
        description="Times tile sizes of the fused kernels on this GPU; then the training step against the plain layers', "
        "which decides what model.kernels auto takes on this card.",
    )
    parser.add_argument("--batch", type=int, default=128, help="images a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=299, help="pixels of an image's side (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file to write (default: the package's own kernels/tiles.json)")
    options = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        print("tune needs a GPU, and this machine has none.", file=sys.stderr)
        return 2
    from xception_pl.kernels import tiles

    output = options.output or tiles.FILE
    chosen = {name: dict(shapes) for name, shapes in tiles.table()["default"]["tiles"].items()}
    for kernel, shape, run in _cases(options.batch, options.size):
        times = {}
        for i, choice in enumerate(CHOICES[kernel]):
            _install({**chosen, kernel: {"any": choice}})
            try:
                times[i] = _milliseconds(run)
            except Exception as error:  # what Triton raises for too much shared memory differs between its versions
                print(f"  {kernel} {shape} {choice}: left out, {str(error).splitlines()[0]}")
        if not times:
            print(f"{kernel} {shape}: no choice runs here", file=sys.stderr)
            return 1
        best = min(times, key=times.__getitem__)
        chosen[kernel] = {shape: CHOICES[kernel][best], **chosen[kernel]}
        chosen[kernel][shape] = CHOICES[kernel][best]
        print(f"{kernel:<20}{shape:<12}{times[best]:8.3f} ms  {CHOICES[kernel][best]}", flush=True)
    _install(chosen)
    off, bound = _differences(options.size)
    if off > bound:
        print(f"the fused gradients are off by {off:.3g}, more than {bound:.3g}: nothing is written.", file=sys.stderr)
        return 1
    speedup = _speedup(options.batch, options.size)
    print(f"training step, bf16, batch {options.batch}: {speedup:.2f} × the plain channels_last layers")
    stored = json.loads(tiles.FILE.read_text())
    stored[torch.cuda.get_device_name()] = {"tiles": chosen, "speedup": round(speedup, 3), "torch": torch.__version__}
    output.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"written to {output}")
    return 0


def _install(chosen: dict[str, Any]) -> None:
    """Makes the kernels take these tiles."""
    from xception_pl.kernels import tiles

    tiles.table.cache_clear()
    tiles.tile_for.cache_clear()
    tiles.table()[tiles.card()] = {"tiles": chosen}


def _cases(batch: int, size: int) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Each kernel with each shape of the network: its largest call, on random tensors."""
    import torch

    from xception_pl.kernels import offline
    from xception_pl.kernels.ops import depthwise, join, pointwise

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    done = set()
    for launch in sorted(offline.record(batch, size).launches, key=lambda one: -one.bytes):
        given, key = launch.arguments, (launch.name, launch.shape)
        if launch.name not in CHOICES or key in done or given.get("STRIDE", 1) != 1:
            continue
        done.add(key)
        if launch.name.startswith("pointwise"):
            k, n = given["k_channels"], given["n_channels"]
            shape = given["dz" if launch.name == "pointwise_input" else "y" if "y" in given else "dy"].shape[:3]
            x, y, weight = draw(*shape, k), draw(*shape, n), draw(n, k, 1, 1)
            table = torch.rand(4, n, device="cuda")
            calls: dict[str, Callable[[], Any]] = {
                "pointwise": partial(pointwise.pointwise, x, weight),
                "pointwise_input": partial(pointwise.pointwise_input, torch.randn_like(y), y, table, weight),
                "pointwise_weight": partial(pointwise.pointwise_weight, y, x),
            }
        else:
            whole = given["y" if launch.name.startswith("pool") else "x"].shape
            channels = whole[-1]
            x, weight, table = draw(*whole), draw(channels, 1, 3, 3), torch.rand(5, channels, device="cuda")
            out = draw(whole[0], -(-whole[1] // 2), -(-whole[2] // 2), channels)
            calls = {
                "depthwise": partial(depthwise.depthwise, x, table, weight, relu=True),
                "depthwise_backward": partial(depthwise.depthwise_backward, x, x, table, weight, relu=True),
                "pool": partial(join.pool, x, table, out, table),
                "pool_backward": partial(join.pool_backward, out, x, table, out, table),
            }
        yield launch.name, launch.shape, calls[launch.name]


def _milliseconds(run: Callable[[], Any]) -> float:
    """The median of a call on the GPU."""
    import triton

    found: float = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
    return found


def _differences(size: int) -> tuple[float, float]:
    """How far the fused gradients are from float32's in bf16, and twice what the plain layers' are."""
    import torch

    from xception_pl.kernels import gpu
    from xception_pl.nets.xception import Xception

    torch.manual_seed(0)
    network = Xception(10, dropout=0.0).cuda().to(memory_format=torch.channels_last).train()
    images = torch.randn(8, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)

    def gradients(model: torch.nn.Module, mixed: bool) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            logits = model(images)
        logits.float().logsumexp(1).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    fused = deepcopy(network)
    gpu.fuse(fused)
    exact = gradients(deepcopy(network), False)
    plain, ours = gradients(network, True), gradients(fused, True)
    return float((ours - exact).norm() / exact.norm()), 2 * float((plain - exact).norm() / exact.norm())


def _speedup(batch: int, size: int) -> float:
    """Training steps a second, fused over plain, in turns."""
    import torch

    from xception_pl.kernels import gpu
    from xception_pl.nets.xception import Xception

    plain = Xception().cuda().to(memory_format=torch.channels_last).train()
    fused = deepcopy(plain)
    gpu.fuse(fused)
    images = torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)

    def step(model: torch.nn.Module) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(images)
        model.zero_grad()
        logits.float().logsumexp(1).mean().backward()

    ratios = []
    for _ in range(7):
        ratios.append(_milliseconds(lambda: step(plain)) / _milliseconds(lambda: step(fused)))
    return median(ratios)
