"""`python -m xception_pl.reproduce [RUN_FOLDER …]`: each claim of the paper beside what these runs measured."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from xception_pl.commands import one_sentence_errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 2 a mistake in the input."""
    parser = argparse.ArgumentParser(
        prog="python -m xception_pl.reproduce",
        description="Prints the reproduction ledger: each claim of the paper, the recipe that runs it, the paper's number, "
        "ours, and every deviation that the recipe flags.",
    )
    parser.add_argument("folders", nargs="*", metavar="RUN_FOLDER", help="finished runs, or folders with runs below")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the ledger there as Markdown")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the ledger there as JSON")
    arguments = parser.parse_args(argv)

    from xception_pl.reproduce.ledger import make_ledger
    from xception_pl.reproduce.markdown import to_markdown

    with one_sentence_errors(ValueError, OSError):
        ledger = make_ledger(arguments.folders)
        if arguments.markdown is not None:
            arguments.markdown.write_text(to_markdown(ledger), encoding="utf-8")
        if arguments.json is not None:
            text = json.dumps(ledger, indent=2, ensure_ascii=False, allow_nan=False)
            arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.markdown is None and arguments.json is None:
        print(to_markdown(ledger), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
