"""TensorBoard events, which a run can do without."""

from collections.abc import Callable, Mapping
from typing import Any
from warnings import warn

from lightning.pytorch.loggers import TensorBoardLogger


class Events(TensorBoardLogger):
    """Lightning's TensorBoardLogger that does not end a run when events cannot be written: a full disk, a lost mount."""

    _failed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)

    def save(self) -> None:
        self._try(super().save)

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    def _try(self, what: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            what(*arguments)
        except OSError as error:
            self._failed = True
            warn(f"TensorBoard events cannot be written ({error}): there will be no more of them.", stacklevel=3)
