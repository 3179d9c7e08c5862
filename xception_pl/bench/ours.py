"""This package's network in each of its modes."""

from functools import partial

from xception_pl.bench.contender import Contender, Runner, TorchInference, TorchTraining, torch_modes
from xception_pl.bench.task import Task
from xception_pl.kernels.choose import use_kernels
from xception_pl.kernels.inference import fast_inference
from xception_pl.nets.fold import fold_batch_norm

OWNER = "xception_pl"


def ours() -> list[Contender]:
    """Plain torch in both layouts, compiled, with norms folded, and with the kernels of the device."""
    return [
        *torch_modes(OWNER, lambda task: task.network()),
        Contender(name=f"{OWNER}:fold", way="compiled", start=_folded, unfit=_unfit_fold),
        Contender(name=f"{OWNER}:fold_compile", way="fused", start=partial(_folded, compile=True), unfit=_unfit_fold),
        Contender(name=f"{OWNER}:kernels", way="fused", start=_with_kernels, unfit=_unfit_kernels),
    ]


def _folded(task: Task, compile: bool = False) -> TorchInference:
    return TorchInference(fold_batch_norm(task.network()), task, channels_last=True, compile=compile)


def _unfit_fold(task: Task) -> str | None:
    return "folded norms cannot be trained" if task.training else None


def _with_kernels(task: Task) -> Runner:
    if not task.training:
        return TorchInference(fast_inference(task.network().to(task.device, task.dtype)), task, channels_last=True)
    prepare = partial(use_kernels, kernels="fused", device=task.device)
    return TorchTraining(task.network(), task, channels_last=True, prepare=prepare)


def _unfit_kernels(task: Task) -> str | None:
    if not task.training:
        path = fast_inference(task.network().to(task.device, task.dtype)).path
        return path.removeprefix("torch: ") if path.startswith("torch: ") else None
    try:
        use_kernels(task.network(), "fused", task.device)
    except ValueError as error:
        return str(error).partition("; use")[0]
    return None
