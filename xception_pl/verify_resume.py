"""`python -m xception_pl.verify_resume RECIPE --kill-at K`: proves on this machine that a killed run resumes exactly."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xception_pl.commands import FAILED, MISTAKE, Arguments, one_sentence_errors, recipe_help, split_arguments
from xception_pl.recipe import RecipeError
from xception_pl.run.interrupt import SignalFlag

if TYPE_CHECKING:
    from lightning.pytorch import Callback

_SUMMARY = "Trains a few steps; trains them again, with a kill -9 of one rank and a resume; compares both to the bit."
_OPTIONS = {
    "--kill-at K": "optimiser step in which the last rank is killed with SIGKILL",
    "--steps N": "optimiser steps to train (default: twice K)",
    "--devices N": "devices, as trainer.devices",
    "--tolerance T": "largest relative difference of a loss or weight that counts as none (default: 0; GPUs may need\n"
    "                        trainer.deterministic, or a tolerance)",
    "--keep FOLDER": "keep both runs there (default: a temporary folder, removed)",
    "--help": "print this and stop",
}
_KILL_AT = "XCEPTION_PL_VERIFY_KILL_AT"
"""In the processes that train: the step of the kill, 0 for none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 where resuming is exact, 1 where it is not or a run failed, 2 for a mistake in the input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help"} & set(argv):
        print(recipe_help("verify_resume", _SUMMARY, _OPTIONS))
        return 0
    if _KILL_AT in os.environ:
        return _train(argv, int(os.environ[_KILL_AT]))
    options = ("kill-at", "steps", "devices", "tolerance", "keep")
    with one_sentence_errors():
        arguments = split_arguments(argv, options=options)
        kill_at, steps, tolerance = _numbers(arguments)
        arguments.load()
    keep = arguments.options.get("keep")
    if keep is not None:
        return _verify(arguments, Path(keep), kill_at, steps, tolerance)
    with tempfile.TemporaryDirectory(prefix="verify_resume_") as folder:
        return _verify(arguments, Path(folder), kill_at, steps, tolerance)


def _numbers(arguments: Arguments) -> tuple[int, int, float]:
    """Step of the kill, steps in all, tolerance."""
    given, problems = arguments.options, arguments.problems
    try:
        kill_at = int(given.get("kill-at", ""))
        steps, tolerance = int(given.get("steps", 2 * kill_at)), float(given.get("tolerance", 0))
    except ValueError:
        raise RecipeError(
            [*problems, "--kill-at (needed) and --steps are whole numbers, --tolerance is a number."]
        ) from None
    if not 2 <= kill_at < steps:
        problems.append(
            f"--kill-at {kill_at} must be at least 2, to leave a checkpoint before it, and below --steps {steps}."
        )
    if "devices" in given:
        arguments.overrides["trainer.devices"] = given["devices"]
    arguments.overrides |= {"trainer.max_steps": str(steps), "run.save_every_steps": str(max(1, kill_at // 2))}
    arguments.overrides |= {"trainer.max_epochs": "1000000", "run.tensorboard": "false", "run.wandb": "null"}
    return kill_at, steps, tolerance


def _verify(arguments: Arguments, folder: Path, kill_at: int, steps: int, tolerance: float) -> int:
    whole, parts = folder / "whole", folder / "killed"
    if whole.exists() or parts.exists():
        print(f"error: --keep {folder} holds runs already; give another folder.", file=sys.stderr)
        return MISTAKE
    print(f"training {steps} steps, undisturbed …", flush=True)
    if code := _start(arguments, whole, 0):
        print(f"error: the undisturbed run ended with exit code {code}; its output is above.", file=sys.stderr)
        return FAILED
    print(f"training them again, with kill -9 in step {kill_at} …", flush=True)
    code = _start(arguments, parts, kill_at)
    print(f"it ended with exit code {code}; resuming …", flush=True)
    if code == 0 or (code := _start(arguments, parts, 0)):
        print(f"error: a run that should have ended otherwise ended with exit code {code}.", file=sys.stderr)
        return FAILED
    from xception_pl.run.compare import compare

    lines, exact = compare(whole, parts, tolerance)
    print("\n".join(lines))
    return 0 if exact else FAILED


def _start(arguments: Arguments, into: Path, kill_at: int) -> int:
    """Exit code of one start of a run; its output is shown where it fails by itself."""
    words = [arguments.recipe, *(f"--{key}={value}" for key, value in arguments.overrides.items())]
    command = [sys.executable, "-m", "xception_pl.verify_resume", *words, "--into", str(into), "--resume=auto"]
    done = subprocess.run(
        command,
        env={**os.environ, _KILL_AT: str(kill_at)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode and not kill_at:
        print(done.stdout)
    return done.returncode


def _train(argv: list[str], kill_at: int) -> int:
    """What `fit` does, noting each step, in a process that may kill itself."""
    signals = SignalFlag()
    signals.install()
    arguments = split_arguments(argv, options=("resume", "into"))
    recipe, into = arguments.load(), arguments.options["into"]
    from xception_pl.training import prepare, train

    with one_sentence_errors(ValueError):
        prepared = prepare(recipe, resume=arguments.options["resume"], into=into)
    return train(prepared, signals, command=arguments, callbacks=_callbacks(Path(into), kill_at))


def _callbacks(folder: Path, kill_at: int) -> "list[Callback]":
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback

    from xception_pl.run.trace import Trace

    class Kill(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step + 1 == kill_at and trainer.global_rank == trainer.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    return [Trace(folder), Kill()]


if __name__ == "__main__":
    sys.exit(main())
