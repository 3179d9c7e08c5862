"""The watch over a run's ranks: from before they are started to when they are done."""

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import subprocess_script

from xception_pl.data.errors import DataError
from xception_pl.run.checkpoints import Checkpoints
from xception_pl.run.config import RunConfig
from xception_pl.run.requeue import requeue
from xception_pl.run.watch import Watch, end_with_parent

_KEY = "xception_pl/watch"


class Watchdog(Callback):
    """Ends all ranks, with a sentence that names one, when that one dies, hangs or fails; idle in a run of one rank.

    Args:
        config: For its bounds.
        checkpoints: Knows whether this start has saved something, without which a job is not requeued for ever.
    """

    def __init__(self, config: RunConfig, checkpoints: Checkpoints) -> None:
        self.config = config
        self.checkpoints = checkpoints
        self._watch: Watch | None = None
        self._port = 0

    def start(self, trainer: Trainer) -> None:
        """Before `Trainer.fit`, which starts the processes of other ranks on this node and waits for them to come."""
        if trainer.world_size == 1:
            return
        launcher = trainer.strategy.launcher
        # Lightning's observer of these processes kills all of them, this one first of all, without a word.
        vars(subprocess_script)["_launch_process_observer"] = lambda processes: None
        if self._started_by_rank_0:
            end_with_parent(signal.SIGKILL)

        def children() -> Sequence["subprocess.Popen[bytes]"]:
            return getattr(launcher, "procs", ())

        self._watch = Watch(
            trainer.global_rank,
            trainer.world_size,
            silence_seconds=self.config.rank_timeout_seconds,
            stall_seconds=self.config.stall_seconds,
            children=children,
            at_loss=self._requeue,
            last_good=self.checkpoints.last_good,
        )
        if trainer.global_rank == 0:
            self._port = self._watch.listen()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The ranks have met: rank 0 tells its port. A second time, for the evaluation at the end, there is nothing to do."""
        if self._watch is None or self._port < 0:
            return
        store = dist.distributed_c10d._get_default_store()
        if trainer.global_rank == 0:
            store.set(_KEY, str(self._port))
        else:
            self._watch.connect(os.environ["MASTER_ADDR"], int(store.get(_KEY)))
            if self._started_by_rank_0:
                end_with_parent(signal.SIGCONT)  # to say why it ends, even if it is stopped at that moment
        self._port = -1

    def failed(self, error: Exception) -> None:
        """This rank cannot go on: ends all ranks. Does not return.

        A broken connection is another rank's fault: that one is named, if it is one.
        """
        assert self._watch is not None
        if isinstance(error, RuntimeError) and not isinstance(error, DataError | torch.OutOfMemoryError):
            self._watch.wait_for_cause()
        if not isinstance(error, DataError):
            traceback.print_exception(error)
        first = (str(error).splitlines() or [""])[0].rstrip(".")
        self._watch.fail(str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {first}.")

    def close(self) -> None:
        """All ranks are done."""
        if self._watch is not None:
            self._watch.close()

    @property
    def _started_by_rank_0(self) -> bool:
        others = {"TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"}
        return os.environ.get("LOCAL_RANK", "0") != "0" and not others & os.environ.keys()

    def _requeue(self, sentence: str) -> None:
        assert self._watch is not None
        if self._watch.rank > 1:
            time.sleep(5)  # rank 0 is lost: rank 1 asks first, if its node is there, and that ends this process
        if (done := requeue(failed=True, saved=self.checkpoints.saved_here)) is not None:
            print(done, flush=True)

    def _at(self, where: str) -> None:
        if self._watch is not None:
            self._watch.at(where)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at("the start of training")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._at(f"step {trainer.global_step + 1}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._at(f"the end of step {trainer.global_step}")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *index: int) -> None:
        self._at(f"validation batch {index[0] + 1} after step {trainer.global_step}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at(f"the end of the epoch, step {trainer.global_step}")
