"""Before each update: the ranks agree on signals and saves, and a loss that is not finite changes no weight."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from xception_pl.module import XceptionModule
from xception_pl.run.agreement import Agreement

_SHOWN_IDS = 64


class NotFinite(Exception):
    """A loss, a gradient or a weight is NaN or infinite, on all ranks at the same step. The message is one sentence."""


@dataclass
class _Step:
    """What a rank knows of a step: images, and whether its own loss was finite."""

    number: int
    ids: list[Tensor]
    finite: Tensor


class StepGuard(Callback):
    """Exchanges, before each optimiser step, what the ranks must agree on, and stops at a loss that is not finite.

    On a CPU, and wherever steps may be skipped, the answer is there before the update: the weights are never touched, and
    gradients are checked as well. On a GPU without skipping the host does not wait: it learns of a step while it prepares
    the next one, one update has then been made with what is not finite, and nothing was saved since.

    Args:
        agreement: How the ranks agree.
        skip: Steps that may be left out in a run because their loss or gradient is not finite
            (`trainer.skip_nonfinite_steps`); their images are used up, weights, statistics of batch norm, momentum and
            average stay as they are.

    Attributes:
        skipped: Steps left out so far; resuming goes on counting.
    """

    def __init__(self, agreement: Agreement, skip: int) -> None:
        self.agreement = agreement
        self.skip = skip
        self.skipped = 0
        self._ids: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._parameters: list[nn.Parameter] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, XceptionModule)
        self._parameters = list(pl_module.network.parameters())  # finding them takes half as long as looking at them

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, XceptionModule)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._ids, pl_module.loss_is_finite, pl_module.skip_update = [], None, False
            if self.skip:
                self._buffers = [buffer.clone() for buffer in pl_module.network.buffers()]
        self._ids.append(batch["id"])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, XceptionModule)
        finite = pl_module.loss_is_finite
        assert finite is not None
        wait = self.skip > 0 or finite.device.type != "cuda"
        step = _Step(trainer.global_step + 1, self._ids, finite)
        if wait and trainer.precision != "16-mixed":  # there an infinite gradient is daily business of the loss scaler
            finite = finite & _all_finite([p.grad for p in self._parameters if p.grad is not None])
        self.agreement.exchange(finite.device, nonfinite=~finite, about=step, wait=wait)
        if not self.agreement.nonfinite:
            return
        if self.skipped >= self.skip:
            raise NotFinite(self._sentence(trainer))
        self.skipped += 1
        self.agreement.nonfinite = False
        pl_module.skip_update = True
        for parameter in self._parameters:
            parameter.grad = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, XceptionModule)
        if pl_module.skip_update and self._buffers:  # what the batch did to batch norm's running statistics
            torch._foreach_copy_(list(pl_module.network.buffers()), self._buffers)
            self._buffers = []

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All that a checkpoint would hold is finite; all ranks call it before they save.

        Raises:
            NotFinite: the last step was made with a loss that is not, or weights are not.
        """
        assert isinstance(pl_module, XceptionModule)
        self.agreement.settle()
        if self.agreement.nonfinite:
            raise NotFinite(self._sentence(trainer))
        if not _all_finite([*pl_module.network.parameters(), *pl_module.evaluated.parameters()]):
            raise NotFinite(
                f"After step {trainer.global_step} the loss is finite and the weights are not: the gradient overflowed."
            )

    def _sentence(self, trainer: Trainer) -> str:
        step = self.agreement.about
        assert isinstance(step, _Step)
        mine = [] if bool(step.finite) else torch.cat(step.ids).tolist()
        ranks: list[list[int]] = [mine]
        if dist.is_available() and dist.is_initialized():
            ranks = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(ranks, mine)
        guilty = [rank for rank, ids in enumerate(ranks) if ids]
        after = f" after {self.skipped} skipped" if self.skip else ""
        if not guilty:
            return f"The gradient of step {step.number} is not finite, though the loss is{after}."
        ids = [number for rank in ranks for number in rank]
        shown = ", ".join(map(str, ids[:_SHOWN_IDS])) + (
            f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
        )
        where = f" on rank {', '.join(map(str, guilty))}" if trainer.world_size > 1 else ""
        return f"The loss of step {step.number}{where} is not finite{after}; its images are the training rows {shown}."

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """Bool scalar on the tensors' device: whether all their norms are finite."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).isfinite().all()
