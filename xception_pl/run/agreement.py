"""What the ranks of a run decide together: one all-reduce of four numbers a step."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xception_pl.run.interrupt import SignalFlag, number_of


class Agreement:
    """Each rank says what it knows, all take the largest of each number, and so leave, save and stop at the same step.

    On a GPU the host does not wait for the device: what was exchanged is known one exchange later, unless `wait` is asked
    for. On a CPU it is known at once.

    Args:
        signals: What this rank was sent.

    Attributes:
        signal: Number of the signal that any rank got, the largest of several; 0 for none.
        save: Rank 0 has said that a checkpoint is due; who saves sets it to False.
        give_up: Rank 0 has not been able to save for too long.
        nonfinite: Some rank has said so of a step; who answers that sets it to False.
        about: The `about` of that step.
    """

    def __init__(self, signals: SignalFlag) -> None:
        self.signals = signals
        self.signal = 0
        self.save = self.give_up = self.nonfinite = False
        self.about: Any = None
        self.save_due: Callable[[], bool] = lambda: False
        self.giving_up: Callable[[], bool] = lambda: False
        self._pending: tuple[Tensor, torch.cuda.Event, Any] | None = None

    def exchange(
        self, device: torch.device, *, nonfinite: Tensor | None = None, about: Any = None, wait: bool = False
    ) -> None:
        """Says and asks; all ranks call it equally often.

        Args:
            device: Where the ranks' process group reduces.
            nonfinite: Bool, a scalar on the device.
            about: What `nonfinite` belongs to, of this rank.
            wait: Know the answer now, on a GPU too.
        """
        said = [number_of(self.signals.received), int(self.save_due()), int(self.giving_up()), 0]
        vector = torch.tensor(said, dtype=torch.int32).to(device, non_blocking=True)
        if nonfinite is not None:
            vector[3] = nonfinite
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(vector, dist.ReduceOp.MAX)
        if device.type != "cuda" or wait:
            self._pending = None
            self._know(vector.tolist(), about)
            return
        self.settle()
        answer = torch.empty(4, dtype=torch.int32, pin_memory=True)
        answer.copy_(vector, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending = answer, arrived, about

    def look(self) -> None:
        """What a rank that is alone need not wait for."""
        if not (dist.is_available() and dist.is_initialized()):
            self.signal = max(self.signal, number_of(self.signals.received))

    def settle(self) -> None:
        """Waits for what is not known yet."""
        if self._pending is not None:
            answer, arrived, about = self._pending
            self._pending = None
            arrived.synchronize()
            self._know(answer.tolist(), about)

    def _know(self, answer: list[int], about: Any) -> None:
        self.signal = max(self.signal, answer[0])
        self.save |= bool(answer[1])
        self.give_up = bool(answer[2])
        if answer[3]:
            self.nonfinite, self.about = True, about
