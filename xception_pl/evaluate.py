"""`python -m xception_pl.evaluate`: exactly how good weights are.

Every image of the split is shown once, whatever the number of devices, and the scores are summed in the order of the
images: one device or eight give the same digits. Images are prepared as the weights expect it, unless --preprocessing
says otherwise: the choice moves top-1 by a point.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xception_pl.commands import Parser, one_sentence_errors, progress_bar
from xception_pl.data.config import SAMPLE, SMALLEST_IMAGE, DataConfig, check
from xception_pl.recipe import RecipeError, find_recipe, load_recipe, recipe_from_plain

CROPS = ("tf-slim", "keras", "timm", "resize")


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """The options, and the keys of `data` that were set. Exits with code 2 and a sentence for what is wrong."""
    parser = Parser(
        prog="python -m xception_pl.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of a recipe's data may be set too, as in fit: --data.image_column=picture",
    )
    parser.add_argument("weights", help="what load_network reads: a checkpoint, safetensors, a file of Keras or timm …")
    parser.add_argument(
        "--data",
        required=True,
        metavar="RECIPE|SOURCE",
        help="a recipe, for its data, or a source as data.source takes it: a hub id, a folder, Parquet, sample",
    )
    parser.add_argument("--split", help="(default: the recipe's held-out one; validation, or for sample test)")
    parser.add_argument("--preprocessing", choices=CROPS, help="the crop, as data.eval_crop (default: the weights')")
    parser.add_argument("--image-size", type=int, metavar="PX", help="side of the input (default: the weights')")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="WEIGHTS", help="others, on the same images, with a paired test"
    )
    parser.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="images to leave out, one a line: rows counted from 0, or file names (ImageNet's blacklist, Table 1)",
    )
    parser.add_argument(
        "--exclude-numbers",
        choices=("row", "ilsvrc"),
        default="row",
        help="what numbers in that file are: rows, or ILSVRC2012_val's numbers, from 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write report.html, evaluation.json and the tables there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--batch", type=int, metavar="N", help="images a device and step (default: data.eval_batch)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="(default: %(default)s)")
    options, rest = parser.parse_known_args(arguments)
    overrides = {}
    for word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith("--data.") or not equals:
            parser.error(f"unknown option {word}; keys of data are set as --data.KEY=VALUE")
        overrides[name[2:]] = value
    for name, least in (("devices", 1), ("batch", 1), ("image_size", SMALLEST_IMAGE)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value} is below {least}")
    return options, overrides


def read_data(options: argparse.Namespace, overrides: dict[str, str]) -> DataConfig:
    """What is evaluated on.

    Raises:
        RecipeError: with one sentence for each mistake.
    """
    values: dict[str, Any] = dict(overrides)
    if options.split is not None:
        values["data.val_split"] = options.split
    if options.batch is not None:
        values["data.eval_batch"] = options.batch
    if Path(options.data).suffix in (".yaml", ".yml"):
        return load_recipe(find_recipe(options.data), values).data
    values = {
        "data.source": options.data,
        "data.val_split": "test" if options.data == SAMPLE else "validation",
    } | values
    config = recipe_from_plain(values, "--data").data
    problems = check(config)
    if problems:
        raise RecipeError(problems)
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options, overrides = parse(arguments)
    with one_sentence_errors():
        config = read_data(options, overrides)

    from xception_pl.evaluation.run import evaluate, write_evaluation

    with one_sentence_errors(ValueError, OSError):
        done = evaluate(
            [options.weights, *options.compare],
            config,
            eval_crop=options.preprocessing,
            image_size=options.image_size,
            exclude=options.exclude,
            exclude_numbers=options.exclude_numbers,
            accelerator=options.accelerator,
            devices=options.devices,
            progress=progress_bar,
        )
        if done is None:  # this process has handed its share over
            return 0
        evaluation, images = done
        print(json.dumps(evaluation.plain(), indent=2) if options.json else evaluation.table())
        if options.output is not None:
            write_evaluation(options.output, evaluation, images)
            if not options.json:
                print(f"written to {options.output}/: report.html, evaluation.json, classes and confusion as tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
