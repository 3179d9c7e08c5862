"""`python -m xception_pl.fit RECIPE`: trains what a recipe describes."""

import sys
from collections.abc import Sequence

from xception_pl.commands import one_sentence_errors, recipe_help, split_arguments
from xception_pl.run.interrupt import SignalFlag

_OPTIONS = {
    "--resume last|PATH": "go on from the newest run of this recipe, a checkpoint or a run folder",
    "--dry-run": "print the plan and stop",
    "--print_config": "print the resolved recipe, which runs again unchanged, and stop",
    "--help": "print this and stop",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 1 failed, 2 a mistake in the input, 130 or 143 interrupted and saved."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(recipe_help("fit", "Trains what a recipe describes.", _OPTIONS))
        return 0
    with one_sentence_errors():
        arguments = split_arguments(argv, flags=("dry-run", "print-config"), options=("resume",))
        recipe = arguments.load()
    if "print-config" in arguments.flags:
        print(recipe.to_yaml(), end="")
        return 0

    signals = SignalFlag()
    signals.install()  # before the slow imports: a signal that comes during them ends the run at its first step
    from xception_pl.training import prepare, train

    dry_run = "dry-run" in arguments.flags
    with one_sentence_errors(ValueError):
        prepared = prepare(recipe, resume=arguments.options.get("resume"), dry_run=dry_run)
    if dry_run:
        print("\n".join(prepared.lines()))
        return 0
    return train(prepared, signals, command=arguments)


if __name__ == "__main__":
    sys.exit(main())
