"""Ending a run between two steps: a signal sets a flag, the loop looks at it."""

import signal
from types import FrameType


class Interrupted(Exception):
    """Training ended early, on request, after saving.

    Attributes:
        checkpoint: File that resumes the run.
        signal_name: What asked for the end, for example SIGINT.
    """

    def __init__(self, checkpoint: str, signal_name: str) -> None:
        super().__init__(f"{signal_name}: saved {checkpoint}")
        self.checkpoint = checkpoint
        self.signal_name = signal_name

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells report it."""
        return 128 + signal.Signals[self.signal_name].value


class SignalFlag:
    """Remembers the first SIGINT (Ctrl-C) or SIGTERM and does nothing else inside the handler.

    A second Ctrl-C raises KeyboardInterrupt at once, for people who cannot wait for the step.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def install(self) -> None:
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
