"""`python -m xception_pl.spectrum`: what Xception costs at each number of channel segments, the paper's open question.

One segment is a regular convolution with a 1 × 1, one segment a channel is Xception; section 5 leaves what lies between
to future work. For each count: parameters, multiply-accumulates, memory of activations, and the measured time of a
training step. At equal widths the two ends differ eightfold in parameters; `--match params` changes the width until
they are equal, so that an experiment compares like with like.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite, lcm
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from xception_pl.nets.xception import Xception

MATCHED_WITHIN = 0.01
PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command was asked for."""

    segments: tuple[int | None, ...] = (1, 2, 4, 8, None)
    width: float = 1.0
    middle_blocks: int = 8
    num_classes: int = 1000
    image_size: int = 299
    match: str = "width"
    batch: int = 8
    steps: int = 5
    device: str = "cpu"
    precision: str = "32"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One point of the spectrum. The first three fields are keys of a recipe's `model`."""

    segments: int | None
    """Channel segments; None is one a channel."""
    width: float
    channel_multiple: int
    middle_channels: int
    """Channels of the middle flow, 728 in the paper."""
    parameters: int
    macs: int
    """Multiply-accumulates of one image's forward pass."""
    activation_bytes: int
    """Kept for the backward pass, for each image, at 4 bytes a number."""
    mismatch: float | None = None
    """Parameters relative to the network that was to be matched, less 1; None where widths are equal."""
    step_ms: float | None = None
    """Median time of a training step of the whole batch; None where it was not measured."""
    step_ms_quartiles: tuple[float, float] | None = None
    """The measured steps at a quarter and at three quarters of their order."""


def build(
    settings: Settings, segments: int | None, width: float, channel_multiple: int, device: str = "meta"
) -> "Xception":
    """The network of one row."""
    import torch

    from xception_pl.nets.xception import Xception

    with torch.device(device):
        return Xception(
            settings.num_classes,
            width=width,
            channel_multiple=channel_multiple,
            middle_blocks=settings.middle_blocks,
            segments=segments,
        )


def count(settings: Settings, segments: int | None, width: float, channel_multiple: int) -> Row:
    """The row of one network: what can be counted."""
    from xception_pl.nets.cost import activation_bytes, macs, parameters

    network = build(settings, segments, width, channel_multiple)
    image = (3, settings.image_size, settings.image_size)
    return Row(
        segments=segments,
        width=width,
        channel_multiple=channel_multiple,
        middle_channels=network.feature_info[3]["num_chs"],
        parameters=parameters(network),
        macs=macs(network, image),
        activation_bytes=activation_bytes(network, image),
    )


def equal_widths(settings: Settings) -> list[Row]:
    """All networks with the same channels, rounded to a multiple that serves every count of the table."""
    multiple = lcm(8, *(segments for segments in settings.segments if segments))
    return [count(settings, segments, settings.width, multiple) for segments in settings.segments]


def equal_parameters(settings: Settings) -> list[Row]:
    """Each network at the width that gives it the parameters of the one with a segment a channel at the given width.

    Channels are multiples of the segments and no coarser, which decides how near the parameters can come.
    """
    from xception_pl.nets.cost import parameters

    target = parameters(build(settings, None, settings.width, 8))

    def size(segments: int, steps: int) -> int:
        return parameters(build(settings, segments, steps / 10_000, segments))

    rows = []
    for segments in settings.segments:
        if segments is None:
            row = count(settings, None, settings.width, 8)
        else:
            # More width is never fewer parameters: halve the interval, in steps of 0.0001, until it is one step.
            low, high = 1, max(2, int(settings.width * 20_000))
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if size(segments, middle) < target else (low, middle)
            nearest = min((low, high), key=lambda steps: abs(size(segments, steps) - target))
            row = count(settings, segments, nearest / 10_000, segments)
        rows.append(replace(row, mismatch=row.parameters / target - 1))
    return rows


def training_steps(settings: Settings, row: Row) -> Iterator[float]:
    """Endless training steps on one batch of random images, forward, loss, backward and SGD: the seconds of each."""
    import torch

    device = torch.device(settings.device)
    network = build(settings, row.segments, row.width, row.channel_multiple, settings.device)
    network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.rand(settings.batch, 3, settings.image_size, settings.image_size, device=device) * 2 - 1
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(settings.num_classes, (settings.batch,), device=device)
    while True:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield perf_counter() - start


def timed(settings: Settings, rows: list[Row]) -> list[Row]:
    """The rows with measured steps. All networks take a step in each round, so that a disturbance meets all alike."""
    runs = [training_steps(settings, row) for row in rows]
    for run in runs:
        next(run)  # the first step allocates and chooses algorithms
    rounds = [[1000 * next(run) for run in runs] for _ in range(settings.steps)]
    measured = [sorted(times) for times in zip(*rounds, strict=True)]
    quarter = settings.steps // 4
    return [
        replace(row, step_ms=median(times), step_ms_quartiles=(times[quarter], times[-1 - quarter]))
        for row, times in zip(rows, measured, strict=True)
    ]


def spectrum(settings: Settings) -> list[Row]:
    """The whole table.

    Raises:
        ValueError: an option is out of its range.
    """
    rows = equal_parameters(settings) if settings.match == "params" else equal_widths(settings)
    return timed(settings, rows) if settings.steps else rows


def heading(settings: Settings) -> str:
    """What the table and the figure are of, in a line."""
    line = f"Xception, width {settings.width:g}, {settings.middle_blocks} middle blocks, {settings.image_size} px"
    line += ", equal parameters" if settings.match == "params" else ", equal widths"
    precision = "fp32" if settings.precision == "32" else "bf16"
    if settings.steps:
        line += f"; {settings.steps} training steps of {settings.batch} images, {settings.device}, {precision}"
    return line


def label(row: Row) -> str:
    return "one a channel" if row.segments is None else str(row.segments)


def table(settings: Settings, rows: list[Row]) -> str:
    """The rows as text; below them, each row that did not match."""
    cells = [["segments", "width", "multiple", "middle", "parameters", "GMACs", "activations MB"]]
    if settings.steps:
        cells[0] += ["step ms (quartiles)", "images/s"]
    for row in rows:
        cells.append(
            [label(row), f"{row.width:g}", str(row.channel_multiple), str(row.middle_channels), f"{row.parameters:,}"]
        )
        cells[-1] += [f"{row.macs / 1e9:.3f}", f"{row.activation_bytes / 1e6:.1f}"]
        if row.step_ms is not None and row.step_ms_quartiles is not None:
            low, high = row.step_ms_quartiles
            cells[-1] += [
                f"{row.step_ms:.0f} ({low:.0f}–{high:.0f})",
                f"{1000 * settings.batch / row.step_ms:.1f}",
            ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    misses = [
        f"{label(row)}: {row.mismatch:+.1%} parameters is the nearest that multiples of {row.channel_multiple} allow."
        for row in rows
        if row.mismatch is not None and abs(row.mismatch) > MATCHED_WITHIN
    ]
    return "\n".join([heading(settings), "", *lines, *misses])


def plot(settings: Settings, rows: list[Row], path: Path) -> None:
    """A panel for each cost, over the segments."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[tuple[str, list[float]]] = [
        ("parameters, millions", [row.parameters / 1e6 for row in rows]),
        ("GMACs an image", [row.macs / 1e9 for row in rows]),
        ("activations kept, MB an image", [row.activation_bytes / 1e6 for row in rows]),
    ]
    if settings.match == "params":
        panels[0] = ("channels of the middle flow", [float(row.middle_channels) for row in rows])
    if settings.steps:
        panels.append((f"training step of {settings.batch}, ms", [row.step_ms or 0.0 for row in rows]))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.2), layout="constrained")
    names = ["one a\nchannel" if row.segments is None else str(row.segments) for row in rows]
    for axis, (name, values) in zip(axes, panels, strict=True):
        axis.plot(names, values, "o-", color="tab:blue")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("channel segments")
        axis.set_ylim(0, 1.2 * max(values))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    if settings.steps:
        quartiles = [row.step_ms_quartiles or (0.0, 0.0) for row in rows]
        axes[-1].fill_between(names, *zip(*quartiles, strict=True), alpha=0.2, color="tab:blue", label="quartiles")
        axes[-1].set_ylim(0, 1.2 * max(high for _, high in quartiles))
        axes[-1].legend(frameon=False, loc="lower left")
    figure.suptitle(heading(settings), fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}\n")


def segment_counts(text: str) -> tuple[int | None, ...]:
    """`1,2,null` as (1, 2, None)."""
    counts = tuple(None if part.strip() == "null" else int(part) for part in text.split(","))
    if any(segments is not None and segments < 1 for segments in counts):
        raise ValueError
    return counts


def parse(arguments: Sequence[str] | None) -> tuple[Settings, argparse.Namespace]:
    """The settings, and apart from them where the results go. Exits with code 2 and a sentence for what is wrong."""
    parser = Parser(prog="python -m xception_pl.spectrum", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--segments", default="1,2,4,8,null", help="counts, null is one a channel (default: %(default)s)"
    )
    parser.add_argument(
        "--match", choices=["width", "params"], default="width", help="what is equal (default: %(default)s)"
    )
    parser.add_argument("--width", type=float, default=1.0, help="channel multiplier (default: %(default)s)")
    parser.add_argument("--middle-blocks", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--num-classes", type=int, default=1000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=299, metavar="PX", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images a measured step (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=5, help="measured training steps, 0 for none (default: %(default)s)"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    parser.add_argument(
        "--precision", choices=["32", "bf16"], default="32", help="of measured steps (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    try:
        options.segments = segment_counts(options.segments)
    except ValueError:
        parser.error(f"--segments {options.segments} is not a list of counts: write it as 1,2,4,8,null")
    for name, least in (("image_size", 71), ("batch", 2), ("steps", 0), ("num_classes", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} is too small: use {least} or more")
    if not isfinite(options.width):
        parser.error(f"--width {options.width} is no size: use a number above 0")
    if options.plot is not None and options.plot.suffix.lower() not in PICTURES:
        parser.error(f"--plot {options.plot} is no kind of picture: end its name in {', '.join(PICTURES)}")
    if options.plot is not None and not (options.plot.parent.is_dir() and os.access(options.plot.parent, os.W_OK)):
        parser.error(f"--plot {options.plot} cannot be written: {options.plot.parent} is not a folder to write in")

    import torch

    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device} is not there: {str(error).splitlines()[0]}")
    names = Settings.__dataclass_fields__
    return Settings(**{name: value for name, value in vars(options).items() if name in names}), options


def main(arguments: Sequence[str] | None = None) -> None:
    settings, options = parse(arguments)
    try:
        rows = spectrum(settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if options.json:
        print(json.dumps({"settings": asdict(settings), "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(table(settings, rows))
    if options.plot is not None:
        plot(settings, rows, options.plot)


if __name__ == "__main__":
    main()
