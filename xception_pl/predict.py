"""`python -m xception_pl.predict`: what weights see in pictures.

Pictures are files, folders, patterns, `-` for a list of paths on standard input, `sample`, or a dataset of the hub.
Results come in the order of the input. A picture that cannot be read or decoded is named on standard error and left
out; the exit code is then 1.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from xception_pl.commands import FAILED, Parser, one_sentence_errors, progress_bar
from xception_pl.data.config import SMALLEST_IMAGE

FORMATS = ("table", "csv", "jsonl", "parquet")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Exits with code 2 and a sentence for what is wrong."""
    parser = Parser(
        prog="python -m xception_pl.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", help="what load_network reads: a checkpoint, safetensors, a file of Keras or timm …")
    parser.add_argument("images", nargs="+", help="files, folders, patterns, -, sample, OWNER/NAME")
    parser.add_argument("--split", default="test", help="of a dataset (default: %(default)s)")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes a picture (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: standard output)")
    parser.add_argument("--format", choices=FORMATS, help="(default: what the output's name ends in, else table)")
    parser.add_argument("--features", action="store_true", help="the pooled features too, 2048 of the paper's network")
    parser.add_argument("--gradcam", type=Path, metavar="FOLDER", help="write pictures under their heat maps there")
    parser.add_argument(
        "--preprocessing", choices=("tf-slim", "keras", "timm", "resize"), help="the crop (default: the weights')"
    )
    parser.add_argument("--image-size", type=int, metavar="PX", help="side of the input (default: the weights')")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="decoding threads (default: the cores, 8 at most)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    parser.add_argument(
        "--kernels",
        choices=("auto", "torch", "fused"),
        default="auto",
        help="auto: this package's own where a CPU is known to be faster with them (default: %(default)s)",
    )
    parser.add_argument("--fold-bn", action="store_true", help="batch norm folded into the convolutions, by torch")
    parser.add_argument(
        "--compile", action="store_true", help="through torch.compile: pays from some thousand pictures on"
    )
    options = parser.parse_args(arguments)
    for name, least in (("top", 1), ("batch", 1), ("workers", 1), ("image_size", SMALLEST_IMAGE)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value} is below {least}")
    if options.gradcam is not None and (options.fold_bn or options.compile or options.kernels == "fused"):
        parser.error("--gradcam needs the gradients of the plain network: leave out --fold-bn, --compile and --kernels")
    if options.kernels == "fused" and (options.fold_bn or options.compile):
        parser.error("--fold-bn and --compile change what torch computes: leave out --kernels fused")
    return options


@contextmanager
def _read_no_further() -> Iterator[None]:
    """Ends without a word when what reads standard output has seen enough, as `head` has."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        raise SystemExit(128 + signal.SIGPIPE) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)

    from xception_pl.prediction.command import Predictor, output_format

    failed = done = 0
    with one_sentence_errors(ValueError, OSError):
        form = output_format(options.output, options.format, features=options.features)
        predictor = Predictor(
            options.weights,
            device=options.device,
            eval_crop=options.preprocessing,
            image_size=options.image_size,
            features=options.features,
            gradcam=options.gradcam,
            kernels=options.kernels,
            fold=options.fold_bn,
            compiled=options.compile,
        )
        pictures = predictor.find(options.images, split=options.split)
        bar = progress_bar(sum(map(len, pictures)))
        with _read_no_further(), bar as advance, predictor.writer(options.output, form) as writer:
            for outcome in predictor.outcomes(pictures, top=options.top, batch=options.batch, workers=options.workers):
                advance(1)
                if outcome.problem is None:
                    writer.write(outcome)
                    done += 1
                else:
                    print(f"{outcome.name}: {outcome.problem}", file=sys.stderr)
                    failed += 1
    if failed:
        print(f"error: {failed} of {failed + done} pictures were left out.", file=sys.stderr)
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
