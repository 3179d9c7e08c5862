"""`python -m xception_pl.export WEIGHTS --to FORMAT`: weights of any origin into a file for others, proven before it is done."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from xception_pl.commands import one_sentence_errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 2 a mistake in the input."""
    parser = argparse.ArgumentParser(
        prog="python -m xception_pl.export",
        description="Writes weights in another format. Each file is loaded back by the program that will read it and compared, on random "
        "and on real images of odd and even sizes, before it takes its place.",
    )
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="whatever load_network reads: a file, a run's folder, a hub id"
    )
    formats = ("onnx", "safetensors", "torch-export", "keras", "timm", "hub-folder")
    parser.add_argument("--to", required=True, choices=formats, help="the format")
    parser.add_argument("--output", type=Path, metavar="PATH", help="file or folder (default: beside the weights)")
    parser.add_argument(
        "--fold-bn", action="store_true", help="fold batch norm into the convolutions (onnx, torch-export)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="evaluation.json of these weights, for the model card (default: the numbers that the weights carry)",
    )
    parser.add_argument("--raw", action="store_true", help="the last step's weights, not the averaged ones")
    arguments = parser.parse_args(argv)

    from xception_pl.weights.exports import SUFFIXES, export
    from xception_pl.weights.load import load_network
    from xception_pl.weights.results import results_of_evaluation

    assert set(formats) == set(SUFFIXES)
    with one_sentence_errors(ValueError):
        network = load_network(arguments.weights, raw=arguments.raw)
        output = arguments.output or _beside(arguments.weights, arguments.to, SUFFIXES[arguments.to])
        if output.exists() and Path(arguments.weights).expanduser().exists() and output.samefile(arguments.weights):
            raise ValueError(f"{output} is the file of weights itself: name another --output.")
        results = network.results
        if arguments.results is not None:
            results = results_of_evaluation(arguments.results, network)
        done = export(network, arguments.to, output, fold=arguments.fold_bn, results=results)
    if done.folded is not None:
        print(f"batch norm folded: {done.folded}")
    print(f"{done.path} written and loaded back by {done.reader}: {done.against}")
    return 0


def _beside(weights: str, to: str, suffix: str) -> Path:
    """Where a file goes that was given no place: beside the weights, or here where they came from the hub."""
    path = Path(weights).expanduser()
    base = path.name.partition("@")[0] if not path.exists() else path.stem if path.is_file() else path.resolve().name
    folder = path.parent if path.exists() else Path()
    return folder / ((f"{base}-{to}" if to in ("hub-folder", "timm") else base) + suffix)


if __name__ == "__main__":
    sys.exit(main())
