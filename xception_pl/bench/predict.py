"""`python -m xception_pl.bench predict`: pictures to classes, decoding included, beside timm's eager network.

The same JPEG files, in turns in one run: timm's loader (Pillow, its evaluation crop) and its `legacy_xception`, eager and
channels_last; and this package's `predict`: as it comes, by torch, with --fold-bn, and with --compile where that is asked for.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from xception_pl.commands import Parser, one_sentence_errors

Run = Callable[[], int]
"""Goes through all pictures; returns how many."""


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(prog="python -m xception_pl.bench predict", description=__doc__)
    parser.add_argument("source", nargs="?", type=Path, help="folder of JPEG files (default: made ones, 500 × 375)")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="pictures a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of either (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes")
    options = parser.parse_args(arguments)
    for name in ("images", "turns", "batch", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is below 1")

    from xception_pl.bench.crops import image_files
    from xception_pl.bench.data import machine

    with one_sentence_errors(ValueError), tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "images").mkdir()
        files = image_files(options.source, options.images, Path(scratch) / "images")
        runs = _ours(files, Path(scratch), options) | {"timm, eager": _timm(files, options)}
        for run in runs.values():
            run()  # compiles, allocates, reads the files for the first time
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.turns):
            for name, run in runs.items():
                began = time.perf_counter()
                assert run() == len(files)
                seconds[name].append(time.perf_counter() - began)
    print(f"{len(files)} JPEG files to the five likeliest of 1000 classes, 299 × 299, batches of {options.batch}")
    print(machine())
    reference = seconds["timm, eager"]
    for name, taken in seconds.items():
        ratio = median(other / own for own, other in zip(taken, reference, strict=True))
        print(f"  {name:<28}{len(files) / median(taken):8.2f} images/s   {ratio:5.2f} × timm")
    return 0


def _ours(files: list[Path], scratch: Path, options: Any) -> dict[str, Run]:
    from xception_pl.module import XceptionModule
    from xception_pl.prediction.command import Predictor
    from xception_pl.prediction.pictures import Files
    from xception_pl.weights.safetensors import save_weights

    weights = scratch / "weights.safetensors"
    save_weights(
        XceptionModule(optim={"ema_decay": 0}, preprocessing={"image_size": 299, "eval_crop": "timm"}), weights
    )

    def contender(**how: Any) -> Run:
        predictor = Predictor(str(weights), device="cpu", **how)

        def run() -> int:
            found = predictor.outcomes([Files(files)], batch=options.batch, workers=options.workers)
            return sum(outcome.problem is None for outcome in found)

        return run

    kinds = {
        "predict": contender(),
        "predict --kernels torch": contender(kernels="torch"),
        "predict --fold-bn": contender(fold=True),
    }
    if options.compile:
        kinds["predict --compile"] = contender(compiled=True)
        kinds["predict --fold-bn --compile"] = contender(fold=True, compiled=True)
    return kinds


def _timm(files: list[Path], options: Any) -> Run:
    """As timm's own inference.py runs it on a CPU."""
    import timm
    import torch
    from timm.data import ImageDataset, create_loader

    network = timm.create_model("legacy_xception").eval().to(memory_format=torch.channels_last)
    loader = create_loader(
        ImageDataset(str(files[0].parent), class_map=""),
        input_size=(3, 299, 299),
        batch_size=options.batch,
        use_prefetcher=False,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop_pct=0.8975,
        num_workers=options.workers,
    )

    def run() -> int:
        done = 0
        with torch.inference_mode():
            for images, _ in loader:
                logits = network(images.contiguous(memory_format=torch.channels_last))
                done += len(logits.softmax(1).topk(5).indices)
        return done

    return run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
