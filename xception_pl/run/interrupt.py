"""Ending a run between two steps: a signal sets a flag, the loop looks at it. Imports no library: it comes before them."""

import signal
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """Training ended early, on request, on all ranks at the same step.

    Attributes:
        signal_name: What asked for the end, for example SIGINT.
        checkpoint: File that resumes the run; None where it ended before its first step.
        seconds: From this rank's signal to the saved checkpoint; None where another rank got the signal.
        lost: Why the last steps could not be saved, or None.
    """

    def __init__(
        self,
        signal_name: str,
        checkpoint: Path | None,
        *,
        seconds: float | None = None,
        lost: str | None = None,
    ) -> None:
        super().__init__(f"{signal_name}: saved {checkpoint}")
        self.signal_name = signal_name
        self.checkpoint = checkpoint
        self.seconds = seconds
        self.lost = lost

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells report it; 1 where steps were lost."""
        return 128 + signal.Signals[self.signal_name].value if self.lost is None else 1


class SignalFlag:
    """Remembers the first SIGINT (Ctrl-C), SIGTERM or SIGUSR1 (preemption) and does nothing else inside the handler.

    A second Ctrl-C raises KeyboardInterrupt at once, for people who cannot wait for the step.

    Attributes:
        received: Name of the signal, or None.
        at: When it came, on the monotonic clock.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.at: float | None = None

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.at = signal.Signals(number).name, time.monotonic()
