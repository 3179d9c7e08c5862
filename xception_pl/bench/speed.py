"""What `bench train` and `bench infer` share: options, comparison, table, JSON and chart."""

import json
import sys
from dataclasses import asdict
from typing import Literal

from xception_pl.bench.options import parse


def main(what: Literal["train", "infer"], summary: str, arguments: list[str]) -> int:
    """Runs either command; returns its exit code."""
    options = parse(what, summary, arguments)
    from xception_pl.bench.compare import compare
    from xception_pl.bench.report import draw, table

    try:
        result = compare(options, training=what == "train")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    if options.chart is not None:
        draw(result, options.chart)
    return 1 if result.failed else 0
