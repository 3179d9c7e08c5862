"""The runs of an ablation: what is finished, and running what is not. Imports no torch."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from xception_pl.ablation.file import Cell
from xception_pl.recipe import RecipeError, flat, recipe_from_plain, to_plain
from xception_pl.run.decides import what_decides
from xception_pl.run.numbers import read_results


@dataclass(kw_only=True)
class State:
    """What lies on disk for a cell."""

    folder: Path | None = None
    """The newest run folder of the cell's present recipe that is finished, else that can be resumed."""
    finished: bool = False
    notes: list[str] = field(default_factory=list)
    """Run folders that do not count, a sentence each."""

    @property
    def word(self) -> str:
        return "finished" if self.finished else "begun" if self.folder else "not begun"

    def results(self) -> dict[str, float]:
        """The final numbers of a finished run."""
        assert self.folder is not None
        return read_results(self.folder)


def find_state(cell: Cell) -> State:
    """Looks through the cell's run folders. A run whose stored recipe is not the cell's present one never counts."""
    wanted = what_decides(flat(to_plain(cell.recipe)))
    state, finished, resumable = State(), [], []

    def name(folder: Path) -> Path:
        return folder.relative_to(cell.folder.parent)

    for folder in sorted(path.parent for path in cell.folder.glob("*/recipe.yaml")):
        changed = _difference(folder / "recipe.yaml", wanted)
        if changed:
            state.notes.append(f"{name(folder)} is a run of another recipe ({changed}) and does not count.")
        elif (folder / "results.json").is_file():
            finished.append(folder)
        elif (folder / "checkpoints" / "last.ckpt").is_file():
            resumable.append(folder)
    state.notes += [f"{name(folder)} repeats {name(finished[-1])} and does not count." for folder in finished[:-1]]
    if finished:
        state.folder, state.finished = finished[-1], True
    elif resumable:
        state.folder = resumable[-1]
    return state


def _difference(stored: Path, wanted: dict[str, Any]) -> str:
    """The first few keys in which a stored recipe differs from the wanted one; empty where it does not."""
    try:
        keys = what_decides(flat(to_plain(recipe_from_plain(yaml.safe_load(stored.read_text(encoding="utf-8"))))))
    except (RecipeError, yaml.YAMLError, AttributeError) as error:
        return f"unreadable: {str(error).splitlines()[0]}"
    changed = [f"{name} {keys[name]!r}, now {wanted[name]!r}" for name in wanted if keys[name] != wanted[name]]
    return "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def fit_command(cell: Cell, state: State) -> list[str]:
    """The command that runs a cell, or goes on with it."""
    command = [sys.executable, "-m", "xception_pl.fit", *cell.arguments()]
    return command if state.folder is None else [*command, f"--resume={state.folder}"]


def log_of(cell: Cell) -> Path:
    """Where the run's output goes."""
    return cell.folder.with_name(f"{cell.folder.name}.log")


class Runner:
    """Runs cells one after another, each in a process of its own; hands SIGINT (Ctrl-C) and SIGTERM on to the run.

    The run then saves and ends by itself, as `fit` does. It has a session of its own, so that a Ctrl-C reaches it once.

    Attributes:
        stopped_by: Number of the signal after which no further run begins, or None.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def install(self) -> None:
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        if self._process is not None:
            self._process.send_signal(number)

    def run(self, cell: Cell, state: State) -> tuple[int | None, float]:
        """Runs or resumes a cell; returns its exit code, None where another process is running it, and the seconds."""
        # A run that is started from a run, or by a launcher, must not inherit that one's folder.
        environment = {name: value for name, value in os.environ.items() if name != "XCEPTION_PL_RUN_FOLDER"}
        log = log_of(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with open(log, "ab") as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run inherits it, and holds it while it lives
            except BlockingIOError:
                return None, 0.0
            self._process = subprocess.Popen(
                fit_command(cell, state),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            if self.stopped_by is not None:  # it came while the process was starting
                self._process.send_signal(self.stopped_by)
            code = self._process.wait()
        self._process = None
        if self.stopped_by is None and code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            self.stopped_by = code - 128  # somebody stopped the run itself
        return code, time.monotonic() - start


def last_words(log: Path) -> str:
    """The last line that a run wrote: of a failed one, why."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it wrote nothing"
