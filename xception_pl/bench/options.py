"""The command line of `bench train` and `bench infer`. Imports no torch before the options are read."""

import argparse
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from xception_pl.bench.contender import Contender

PICTURES = (".png", ".pdf", ".svg")
REFERENCE = "timm:channels_last"
_Found = TypeVar("_Found")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}\n")


@dataclass(kw_only=True)
class Options:
    """What the command was asked for."""

    device: str
    batch: int
    size: int
    precision: str
    peers: list[str] | None
    modes: list[str] | None
    reference: str | None
    rounds: int
    seconds: float | None
    json: Path | None
    chart: Path | None


def parse(what: str, summary: str, arguments: list[str]) -> Options:
    """The options; exits with code 2 and a sentence for what is wrong."""
    parser = Parser(prog=f"python -m xception_pl.bench {what}", description=summary)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default %(default)s)")
    parser.add_argument("--size", type=int, default=299, help="pixels of an image's side (default %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "tf32", "bf16", "fp16"),
        default="fp32",
        help="of the arithmetic; training keeps its weights in float32 (default %(default)s)",
    )
    parser.add_argument(
        "--peers",
        type=_names,
        metavar="NAMES",
        help="who else, such as timm,onnxruntime or timm:compile; `none` for nobody (default: all that are installed)",
    )
    parser.add_argument(
        "--modes", type=_names, metavar="NAMES", help="this package's, such as channels_last,kernels (default: all)"
    )
    parser.add_argument(
        "--reference", metavar="NAME", help=f"whom ratios are against (default: {REFERENCE}, or else the first)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each that count (default %(default)s)")
    parser.add_argument("--seconds", type=float, help="begin no further round after so many, once there are three")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the bars, with the ceilings")
    given = parser.parse_args(arguments)
    for name, least in (("batch", 1), ("size", 71), ("rounds", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name} {getattr(given, name)} is too small: use {least} or more")
    if given.seconds is not None and not given.seconds > 0:
        parser.error(f"--seconds {given.seconds:g} is no time: use a number above 0")
    for name in ("json", "chart"):
        path = getattr(given, name)
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            parser.error(f"--{name} {path} cannot be written: {path.parent} is not a folder to write in")
    if given.chart is not None and given.chart.suffix.lower() not in PICTURES:
        parser.error(f"--chart {given.chart} is no kind of picture: end its name in {', '.join(PICTURES)}")
    if given.chart is not None and find_spec("matplotlib") is None:
        parser.error("--chart needs matplotlib: pip install matplotlib, or leave it out")
    given.device = _device(parser, given.device, given.precision)
    return Options(**vars(given))


def _names(text: str) -> list[str]:
    return [] if text == "none" else [name.strip() for name in text.split(",")]


def _device(parser: Parser, device: str | None, precision: str) -> str:
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device {device} is not supported: use cpu, cuda or cuda:N")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device} is not there: {str(error).splitlines()[0]}")
    if kind == "cpu" and precision in ("tf32", "fp16"):
        parser.error(f"--precision {precision} needs a GPU; on a CPU choose fp32 or bf16")
    if kind == "cuda" and precision in ("tf32", "bf16") and torch.cuda.get_device_capability(device) < (8, 0):
        parser.error(f"--precision {precision} needs a GPU of compute capability 8.0 or more; choose fp32 or fp16")
    return device


def choose(options: Options, ours: "list[Contender]", peers: "list[Contender]") -> "tuple[list[Contender], set[str]]":
    """The contenders that were asked for, in order, and the names of those asked for one by one.

    Raises:
        ValueError: a name is nobody's.
    """
    mine = {contender.name.partition(":")[2]: contender for contender in ours}
    chosen = list(ours) if options.modes is None else [_known(mode, mine, "--modes") for mode in options.modes]
    if options.peers is None:
        return chosen + peers, {contender.name for contender in chosen if options.modes is not None}
    by_name = {peer.name: [peer] for peer in peers}
    for peer in peers:
        by_name.setdefault(peer.owner, [])
        if peer.name != peer.owner:
            by_name[peer.owner].append(peer)
    wanted = [peer for name in options.peers for peer in _known(name, by_name, "--peers")]
    named = {contender.name for contender in chosen if options.modes is not None} | {peer.name for peer in wanted}
    return chosen + [peer for peer in peers if peer in wanted], named


def _known(name: str, found: dict[str, _Found], option: str) -> _Found:
    if name not in found:
        raise ValueError(f"{option} {name}: there is no such contender; choose from {', '.join(sorted(found))}")
    return found[name]
