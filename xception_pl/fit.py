"""`python -m xception_pl.fit RECIPE`: trains what a recipe describes."""

import sys
from collections.abc import Sequence

from xception_pl.run.interrupt import SignalFlag

_OPTIONS = {
    "--resume last|auto|PATH": "go on from the newest run of this recipe (last), a checkpoint or a run folder; auto starts where there\n"
    "                        is nothing to go on from: for jobs that are started again",
    "--into FOLDER": "the run's folder, instead of a new one",
    "--dry-run": "print the plan and stop",
    "--print_config": "print the resolved recipe, which runs again unchanged, and stop",
    "--help": "print this and stop",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    0 done; 1 failed; 2 a mistake in the input; 75 a rank was lost, try again; 130, 138 or 143 stopped by SIGINT, SIGUSR1
    or SIGTERM, and saved.
    """
    signals = SignalFlag()
    signals.install()  # before the slow imports: a signal that comes during them ends the run before its first step
    from xception_pl.commands import one_sentence_errors, recipe_help, split_arguments
    from xception_pl.run.launcher import find_launcher
    from xception_pl.run.ranks import Ranks

    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(recipe_help("fit", "Trains what a recipe describes.", _OPTIONS))
        return 0
    with one_sentence_errors():
        ranks = Ranks(find_launcher())
        arguments = split_arguments(argv, flags=("dry-run", "print-config"), options=("resume", "into"))
        recipe = ranks.decide(arguments.load)
    if "print-config" in arguments.flags:
        if ranks.rank == 0:
            print(recipe.to_yaml(), end="")
        return 0

    from xception_pl.training import prepare, train

    dry_run = "dry-run" in arguments.flags
    resume, into = arguments.options.get("resume"), arguments.options.get("into")
    with one_sentence_errors(ValueError):
        prepared = prepare(recipe, resume=resume, into=into, dry_run=dry_run, ranks=ranks)
    if dry_run:
        if ranks.rank == 0:
            print("\n".join(prepared.lines()))
        return 0
    return train(prepared, signals, command=arguments, ranks=ranks)


if __name__ == "__main__":
    sys.exit(main())
