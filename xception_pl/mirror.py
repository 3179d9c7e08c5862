"""`python -m xception_pl.mirror`: a hub dataset as local Parquet files, a `data.source` as they stand.

Every file is verified against the hub's checksum. Interrupted, the same command goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xception_pl.commands import FAILED, Parser, one_sentence_errors
from xception_pl.data.errors import DataError

if TYPE_CHECKING:
    from xception_pl.data.copying import Encoding


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Exits with code 2 and a sentence for what is wrong."""
    parser = Parser(prog="python -m xception_pl.mirror", description=__doc__)
    parser.add_argument("dataset", help="id on the hub, for example ILSVRC/imagenet-1k")
    parser.add_argument("folder", type=Path, help="where the mirror goes; empty, or a mirror to go on with")
    parser.add_argument("--revision", help="git revision (default: the newest, fixed by the first start)")
    parser.add_argument(
        "--split", action="append", default=[], metavar="NAME", help="only this split; may be repeated (default: all)"
    )
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--longest", type=int, metavar="PX", help="re-encode images whose longest side is more")
    side.add_argument("--shortest", type=int, metavar="PX", help="re-encode images whose shortest side is more")
    parser.add_argument("--quality", type=int, metavar="1-100", help="of re-encoded JPEGs (default: 90)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="files at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("longest", "shortest", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} is below 1.")
    if options.quality is not None and not 1 <= options.quality <= 100:
        parser.error(f"--quality {options.quality} is not within 1 to 100.")
    if options.quality is not None and not (options.longest or options.shortest):
        parser.error("--quality has no effect without --longest or --shortest: images are copied as they are.")
    return options


def encoding_of(options: argparse.Namespace) -> "Encoding | None":
    """What is to be done to the images."""
    from xception_pl.data.copying import Encoding

    if not (options.longest or options.shortest):
        return None
    side, pixels = ("longest", options.longest) if options.longest else ("shortest", options.shortest)
    return Encoding(side=side, pixels=pixels, quality=options.quality or 90)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parse(arguments)

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from xception_pl.data.copying import mirror, plan_mirror

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        with one_sentence_errors(DataError):
            plan = plan_mirror(options.dataset, options.folder, options.revision, options.split, encoding_of(options))
            print(
                f"{plan.dataset} at commit {plan.revision}: {len(plan.files)} files, {plan.bytes:,} bytes.", flush=True
            )
            with Progress(*columns, console=console) as progress:
                bar = progress.add_task("", total=plan.bytes)
                result = mirror(plan, options.workers, lambda count: progress.advance(bar, count))
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from here.", file=sys.stderr)
        return FAILED
    print(
        f"{result.rows:,} images in {result.files} files, {result.bytes:,} bytes, verified: use "
        f"--data.source={options.folder}"
    )
    if result.unreadable:
        print(f"{result.unreadable} images cannot be read and were left as they are.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
