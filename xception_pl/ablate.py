"""`python -m xception_pl.ablate FILE`: variants × seeds of a recipe, one after another or as a SLURM array, compared."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from xception_pl.ablation.file import Ablation, load_ablation
from xception_pl.ablation.runs import Runner, State, find_state, last_words, log_of
from xception_pl.ablation.slurm import array_script
from xception_pl.commands import FAILED, Arguments, one_sentence_errors, recipe_help, split_arguments
from xception_pl.recipe import RecipeError
from xception_pl.run.slurm import need_sbatch, sbatch

_OPTIONS = {
    "--dry-run": "list the runs, by index, and what is finished, and stop",
    "--collect": "run nothing: table, figure and report of what is finished",
    "--only INDEX": "run this one alone, and write no report",
    "--report FILE.md": "where the report goes, figure and numbers beside it (default: report.md in the ablation's folder)",
    "--slurm": "write an sbatch script that runs what is not finished, a task a run, and stop",
    "--submit": "with --slurm: and submit it",
    "--sbatch OPTIONS": "with --slurm: options of sbatch, for example --sbatch='--partition=gpu --gpus=1 --time=4:00:00'",
    "--help": "print this and stop",
}
_SUMMARY = """Runs an ablation file: variants × seeds of one base recipe. A finished run is not run again, an interrupted one is
resumed: after Ctrl-C, a crash or a time limit, give the same command again. Recipe keys given here hold for all variants.
At the end: a table (mean ± standard deviation over seeds), the training curves, and a Markdown report."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 1 a run failed, 2 a mistake in the input, 130 or 143 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(recipe_help("ablate", _SUMMARY, _OPTIONS).replace("RECIPE", "FILE", 1))
        return 0
    with one_sentence_errors():
        arguments = split_arguments(
            argv,
            flags=("dry-run", "collect", "slurm", "submit"),
            options=("only", "report", "sbatch"),
            example="recipes/ablations/residual.yaml",
        )
        ablation = _load(arguments)
        report = Path(arguments.options.get("report", ablation.folder / "report.md"))
        if "slurm" in arguments.flags:
            return _slurm(ablation, arguments)
    if "dry-run" in arguments.flags:
        print("\n".join(_listing(ablation)))
        return 0
    if "collect" in arguments.flags:
        return _report(ablation, report, arguments)
    chosen = [int(arguments.options["only"])] if "only" in arguments.options else list(range(len(ablation.cells)))
    runner = Runner()
    runner.install()
    failed = _run(ablation, chosen, runner)
    if runner.stopped_by is not None:
        finished = sum(find_state(cell).finished for cell in ablation.cells)
        print(f"\nstopped; {finished} of {len(ablation.cells)} runs are finished", flush=True)
        print(f"go on with: {arguments.line('ablate')}", flush=True)
        return 128 + runner.stopped_by
    code = 0 if "only" in arguments.options else _report(ablation, report, arguments)
    return FAILED if failed else code


def _load(arguments: Arguments) -> Ablation:
    """The ablation, after all mistakes of the command line and of the file are named."""
    problems = list(arguments.problems)
    flags, options = arguments.flags, arguments.options
    if "slurm" not in flags:
        problems += [
            f"--{name} has no effect without --slurm." for name in ("submit", "sbatch") if name in {*flags, *options}
        ]
    exclusive = [f"--{name}" for name in ("dry-run", "collect", "slurm", "only") if name in {*flags, *options}]
    if len(exclusive) > 1:
        problems.append(f"{' and '.join(exclusive)} exclude each other; give one.")
    try:
        shlex.split(options.get("sbatch", ""))
    except ValueError as error:
        problems.append(f"--sbatch {options['sbatch']!r} is not a shell's line of options: {error}.")
    if "report" in options:
        report = Path(options["report"])
        if report.suffix != ".md" or not report.parent.is_dir():
            problems.append(f"--report {report} must be a .md file in a folder that exists.")
    ablation = None
    try:
        if arguments.recipe:
            ablation = load_ablation(arguments.recipe, arguments.overrides)
    except RecipeError as error:
        problems += error.problems
    if ablation is not None and "only" in options:
        last = len(ablation.cells) - 1
        if not options["only"].isdecimal() or int(options["only"]) > last:
            problems.append(
                f"--only must be the index of a run, 0 to {last}, not {options['only']}; --dry-run lists them."
            )
    if problems or ablation is None:
        raise RecipeError(problems)
    return ablation


def _listing(ablation: Ablation) -> list[str]:
    """All runs with their state, and what does not count."""
    states = [find_state(cell) for cell in ablation.cells]
    width = max(len(cell.name) for cell in ablation.cells)
    lines = [
        f"{index:>3}  {cell.name:<{width}}  {state.word}" + (f"  {state.folder}" if state.folder else "")
        for index, (cell, state) in enumerate(zip(ablation.cells, states, strict=True))
    ]
    return lines + [note for state in states for note in state.notes]


def _run(ablation: Ablation, chosen: list[int], runner: Runner) -> list[str]:
    """Runs the chosen cells that are not finished; returns the names of those that failed."""
    failed = []
    for number, index in enumerate(chosen, start=1):
        cell = ablation.cells[index]
        state = find_state(cell)
        head = f"[{number}/{len(chosen)}] {cell.name}"
        if state.finished:
            print(f"{head}: finished before, {state.folder}", flush=True)
            continue
        if runner.stopped_by is not None:
            break
        begun = "resumed" if state.folder else "begun"
        print(f"{head}: {begun}; follow it with: tail -f {shlex.quote(str(log_of(cell)))}", flush=True)
        code, seconds = runner.run(cell, state)
        if code is None:
            print(f"{head}: left out, another process is running it", flush=True)
            continue
        state = find_state(cell)
        if code == 0 and state.finished:
            print(f"{head}: {_result(ablation, state)} in {seconds:.0f} s", flush=True)
        elif runner.stopped_by is None:
            reason = last_words(log_of(cell)) if code else "its recipe is no longer the one of this file"
            print(
                f"{head}: failed with exit code {code}: {reason} (all in {log_of(cell)})", file=sys.stderr, flush=True
            )
            failed.append(cell.name)
    return failed


def _result(ablation: Ablation, state: State) -> str:
    return f"{ablation.metric} {state.results()[ablation.metric]:.4f}"


def _slurm(ablation: Ablation, arguments: Arguments) -> int:
    submit = "submit" in arguments.flags
    if submit:
        need_sbatch()
    unfinished = [index for index, cell in enumerate(ablation.cells) if not find_state(cell).finished]
    if not unfinished:
        raise RecipeError([f"all {len(ablation.cells)} runs are finished; leave out --slurm to write the report."])
    script = ablation.folder / "ablate.sbatch"
    text = array_script(
        ablation,
        unfinished,
        options=shlex.split(arguments.options.get("sbatch", "")),
        overrides=arguments.overrides,
        folder=Path.cwd(),
    )
    script.parent.mkdir(parents=True, exist_ok=True)  # also for the tasks' logs: SLURM makes no folder
    script.write_text(text, encoding="utf-8")
    print(f"written to {script}: {len(unfinished)} of {len(ablation.cells)} runs", flush=True)
    if submit:
        print(f"submitted job array {sbatch(script)}")
        return 0
    print(f"submit it with: sbatch {shlex.quote(str(script))}")
    return 0


def _report(ablation: Ablation, path: Path, arguments: Arguments) -> int:
    """Table, figure and report of what is finished."""
    from xception_pl.ablation.report import write_report  # draws, and reads what training wrote: slow imports

    states = [find_state(cell) for cell in ablation.cells]
    if not any(state.finished for state in states):
        print("error: no run is finished yet; there is nothing to report.", file=sys.stderr)
        return FAILED
    overrides = {name: value for name, value in arguments.overrides.items() if name != "run.folder"}
    command = Arguments(recipe=arguments.recipe, overrides=overrides).line("ablate")
    text = write_report(ablation, states, path, command=command)
    print(
        f"\n{text}\n\nwritten to {path}, {path.with_suffix('.png').name} and {path.with_suffix('.json').name} beside it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
