"""`python -m xception_pl.bench WHAT …`: each measurement is a module of this package with a `main(arguments)`."""

import sys
from importlib import import_module

MEASUREMENTS = {
    "train": "training steps: this package, timm and Keras, beside what the machine allows",
    "infer": "inference: this package, timm, Keras, ONNX Runtime and OpenVINO, beside what the machine allows",
    "fit": "a recipe: input alone, compute alone, both through the Trainer, and which of them bounds it",
    "predict": "pictures to classes, decoding included: this package and timm",
    "data": "JPEG files to training crops and batches: this package, timm, torchvision and DALI; the start of a run",
    "kernels": "no measurement: registers, spills and bytes of the fused GPU kernels, without a GPU",
    "tune": "tile sizes of the fused kernels on the GPU at hand, and whether they are right and faster there",
    "scaling": "no measurement: a model of a step on many GPUs, with the numbers that it rests on",
}


def main(arguments: list[str]) -> int:
    """Hand over to the measurement named first; returns the exit status."""
    if arguments and arguments[0] in MEASUREMENTS:
        status: int = import_module(f"xception_pl.bench.{arguments[0]}").main(arguments[1:])
        return status
    asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
    lines = ["usage: python -m xception_pl.bench WHAT [--help]", ""]
    lines += [f"  {name:<9}{what}" for name, what in MEASUREMENTS.items()]
    if arguments and not asked_for_help:
        lines.append(f"\n{arguments[0]!r} is no measurement: choose one of {', '.join(MEASUREMENTS)}.")
    print("\n".join(lines), file=sys.stdout if asked_for_help else sys.stderr)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
