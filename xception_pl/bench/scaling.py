"""What a step of data-parallel training should take on many GPUs: a model of it, with every number that it rests on.

A step is the arithmetic of its images, and what of the exchange of gradients the backward pass does not hide. DDP sums
gradients in buckets, in the order in which the backward pass makes them: a bucket starts when it is full and the one
before it is through. The network's bytes are counted; speeds and links are assumed, and stand in `Machine`.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

BUCKET_BYTES = 25 * 2**20  # DDP's; the first has 1 MiB, so that the exchange begins early
FIRST_BUCKET_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU, and how it reaches the others. Bandwidths are what an all-reduce gets out of a link, one way."""

    name: str
    images_per_second: float
    """Of one GPU alone, training."""
    gpus_per_node: int = 8
    in_node_gb_per_second: float = 300.0
    """Each GPU to the others of its node: NVLink of an H100 has 450, of which NCCL's rings reach two thirds."""
    between_nodes_gb_per_second: float = 320.0
    """Each node to the others: eight cards of 400 Gbit/s have 400, of which four fifths are reached."""
    hop_seconds: float = 5e-6
    """Of one message, per step of the tree over the nodes; half of it inside a node."""


H100 = Machine(name="8 × 400 Gbit/s a node", images_per_second=2400.0)
SLOW = replace(H100, name="100 Gbit/s a node", between_nodes_gb_per_second=0.8 * 12.5)
# Shares of a backward pass's time, in its order: by memory traffic, in which the entry flow has 60 % of a step.
BACKWARD_SHARES = {"exit": 0.05, "middle": 0.35, "entry": 0.60}
BACKWARD_OF_STEP = 2 / 3  # two convolutions for each of the forward pass


@dataclass(frozen=True)
class Network:
    """What is exchanged a step."""

    gradient_bytes: dict[str, int]
    """Of each flow, in the order of the backward pass."""
    statistics_bytes: int
    """Batch norm's running statistics, exchanged while the backward pass begins."""


@dataclass(frozen=True)
class Step:
    """A step on some GPUs."""

    gpus: int
    device_batch: int
    compute: float
    """Seconds of arithmetic."""
    all_reduce: float
    """Seconds in which the links are busy."""
    exposed: float
    """Seconds after the backward pass in which the GPU waits for them."""

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def images_per_second(self) -> float:
        """Of all GPUs."""
        return self.gpus * self.device_batch / self.seconds

    @property
    def efficiency(self) -> float:
        """Share of the time in which the GPU computes: 1 where gradients cost nothing."""
        return self.compute / self.seconds


def count_network(*, bytes_each: int = 4) -> Network:
    """The bytes of the paper's network, gradients in so many bytes each; made without memory or arithmetic."""
    import torch

    from xception_pl.nets.xception import Xception

    with torch.device("meta"):
        network = Xception(1000)
    last_of_middle = 4 + network.middle_blocks
    flows = dict.fromkeys(BACKWARD_SHARES, 0)
    for name, parameter in network.named_parameters():
        number = name.partition(".")[0].removeprefix("block")  # of the entry flow 1 to 4; `fc` has none
        flow = "exit" if not number.isdecimal() or int(number) > last_of_middle else "middle"
        flows["entry" if number.isdecimal() and int(number) <= 4 else flow] += parameter.numel() * bytes_each
    statistics = sum(buffer.numel() * 4 for name, buffer in network.named_buffers() if "running" in name)
    return Network(flows, statistics)


def all_reduce_seconds(machine: Machine, gpus: int, size: float) -> float:
    """Of `size` bytes over all GPUs: rings carry each byte twice, less a GPU's own part, once over each node's network; the
    slowest link decides, and latency grows with a tree over the nodes.
    """
    if gpus == 1:
        return 0.0
    nodes = -(-gpus // machine.gpus_per_node)
    links = [machine.in_node_gb_per_second] + ([machine.between_nodes_gb_per_second] if nodes > 1 else [])
    hops = (min(gpus, machine.gpus_per_node) - 1).bit_length() / 2 + (nodes - 1).bit_length()
    return 2 * (gpus - 1) / gpus * size / (min(links) * 1e9) + 2 * hops * machine.hop_seconds


def predict(machine: Machine, network: Network, gpus: int, device_batch: int) -> Step:
    """One step of `gpus` × `device_batch` images."""
    compute = device_batch / machine.images_per_second
    backward = BACKWARD_OF_STEP * compute
    begins = compute - backward
    free = begins + all_reduce_seconds(machine, gpus, network.statistics_bytes)
    busy = free - begins
    for full_at, size in _buckets(network, begins, backward):
        seconds = all_reduce_seconds(machine, gpus, size)
        free, busy = max(free, full_at) + seconds, busy + seconds
    return Step(gpus, device_batch, compute, busy, max(0.0, free - compute) if gpus > 1 else 0.0)


def _buckets(network: Network, begins: float, backward: float) -> list[tuple[float, float]]:
    """When each bucket is full, and its bytes; gradients come evenly within a flow."""
    points = [(begins, 0.0)]  # time, bytes made by then
    for flow, size in network.gradient_bytes.items():
        time, made = points[-1]
        points.append((time + BACKWARD_SHARES[flow] * backward, made + size))
    total = points[-1][1]
    ends = [min(FIRST_BUCKET_BYTES, total)]
    while ends[-1] < total:
        ends.append(min(ends[-1] + BUCKET_BYTES, total))
    return [(_time_of(points, end), end - start) for start, end in zip([0.0, *ends], ends, strict=False)]


def _time_of(points: Sequence[tuple[float, float]], wanted: float) -> float:
    for (start, before), (end, after) in itertools.pairwise(points):
        if wanted <= after:
            return start + (end - start) * (wanted - before) / (after - before)
    return points[-1][0]


def table(rate: float, counts: Sequence[int] = (1, 8, 64, 512)) -> str:
    """The Markdown table of docs/scaling.md."""
    fast, slow = (replace(machine, images_per_second=rate) for machine in (H100, SLOW))
    whole, half = count_network(), count_network(bytes_each=2)
    cases = [
        (fast, whole, "fp32", 32, counts),
        (fast, whole, "fp32", 4, [gpus for gpus in counts if gpus in (1, 8, 64)]),
        (slow, whole, "fp32", 32, [gpus for gpus in counts if gpus > 8]),
        (slow, half, "bf16", 32, [gpus for gpus in counts if gpus > 8]),
    ]
    columns = ["network", "gradients", "GPUs", "images a GPU", "global batch", "compute ms", "all-reduce ms"]
    columns += ["exposed ms", "step ms", "images/s", "efficiency"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for machine, network, dtype, device_batch, numbers in cases:
        for gpus in numbers:
            step = predict(machine, network, gpus, device_batch)
            cells = [machine.name, dtype, gpus, device_batch, f"{gpus * device_batch:,}"]
            cells += [f"{1000 * x:.2f}" for x in (step.compute, step.all_reduce, step.exposed, step.seconds)]
            cells += [f"{step.images_per_second:,.0f}", f"{step.efficiency:.1%}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Command line of `python -m xception_pl.bench scaling`."""
    parser = argparse.ArgumentParser(prog="python -m xception_pl.bench scaling", description=__doc__)
    parser.add_argument(
        "--rate", type=float, default=H100.images_per_second, help="images a second of one GPU (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.rate <= 0:
        parser.error(f"--rate must be above 0, not {options.rate}")
    network = count_network()
    sizes = ", ".join(f"{flow} flow {size / 1e6:.1f} MB" for flow, size in network.gradient_bytes.items())
    print(f"gradients in fp32: {sizes}; statistics {network.statistics_bytes / 1e6:.2f} MB\n")
    print(table(options.rate))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
