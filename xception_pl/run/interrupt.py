"""Ending a run between two steps: a signal sets a flag, the loop looks at it. Imports no library: it comes before them."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def number_of(name: str | None) -> int:
    """Number of a signal; 0 for None."""
    return 0 if name is None else signal.Signals[name].value


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
        return 128 + number_of(self.signal_name) if self.lost is None else 1


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


def keep_handlers(trainer: Any) -> None:
    """Leaves the signals of a Lightning Trainer to SignalFlag.

    Lightning 2.6.6 puts handlers of its own over those it finds, which broadcast inside the handler and end the run
    without saving, and asks rank 0, at each batch, whether it got a SIGTERM, waiting for the device.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
