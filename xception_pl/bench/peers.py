"""The others, made to compute the same network: timm, ONNX Runtime and OpenVINO; Keras has a file of its own.

timm's `legacy_xception` is Figure 5 with PyTorch's batch-norm epsilon and padding of pooling. Both are attributes: set
to the paper's, they change the results and not the work, and one reference serves all.
"""

import tempfile
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xception_pl.bench.check import Outcome
from xception_pl.bench.contender import Contender, torch_modes
from xception_pl.bench.keras_peer import KerasRunner
from xception_pl.bench.task import CLASSES, Task


def peers() -> list[Contender]:
    """All, installed or not."""
    return [
        *torch_modes("timm", timm_network, timm_names),
        *(
            Contender(
                name=f"keras:{backend}",
                way="compiled" if backend == "tensorflow" else "eager",
                start=partial(KerasRunner, backend=backend),
                unfit=partial(_unfit_keras, backend=backend),
            )
            for backend in ("torch", "tensorflow")
        ),
        Contender(
            name="onnxruntime",
            way="fused",
            start=OnnxRuntime,
            unfit=partial(_unfit_inference, packages=("onnxruntime", "onnx", "onnxscript")),
        ),
        Contender(
            name="openvino", way="fused", start=OpenVino, unfit=partial(_unfit_inference, packages=("openvino",))
        ),
    ]


def _unfit_keras(task: Task, backend: str) -> str | None:
    if task.precision != "fp32":
        return "is compared in fp32 only"
    if task.device.type != "cpu":
        return "is compared on the CPU only"
    return _missing("keras", backend)


def _unfit_inference(task: Task, packages: tuple[str, ...]) -> str | None:
    if task.training:
        return "does not train"
    if task.precision != "fp32":
        return "is compared in fp32 only"
    if task.device.type != "cpu":
        return "is compared on the CPU only"
    return _missing(*packages)


def _missing(*packages: str) -> str | None:
    missing = [package for package in packages if find_spec(package) is None]
    return f"needs {' and '.join(missing)}, which this Python does not have" if missing else None


def timm_names() -> dict[str, str]:
    """timm's names of the tensors, to ours."""
    names = {"conv1": "block1.conv1", "bn1": "block1.bn1", "conv2": "block1.conv2", "bn2": "block1.bn2", "fc": "fc"}
    for number in range(2, 15):
        ours, depth = f"block{number}", 3 if 5 <= number <= 12 else 2
        for i in range(1, depth + 1):
            if number == 14:
                theirs, norm = f"conv{i + 2}", f"bn{i + 2}"
            else:
                place = 3 * (i - 1) + (number != 2)  # each ReLU has a place of its own; block 2 begins without one
                theirs, norm = f"block{number - 1}.rep.{place}", f"block{number - 1}.rep.{place + 1}"
            names |= {
                f"{theirs}.conv1": f"{ours}.sepconv{i}.depthwise",
                f"{theirs}.pointwise": f"{ours}.sepconv{i}.pointwise",
                norm: f"{ours}.bn{i}",
            }
        if number in (2, 3, 4, 13):
            names |= {f"block{number - 1}.skip": f"{ours}.shortcut", f"block{number - 1}.skipbn": f"{ours}.shortcut_bn"}
    with torch.device("meta"):
        tensors = _create_timm().state_dict()
    return {tensor: f"{names[tensor.rpartition('.')[0]]}.{tensor.rpartition('.')[2]}" for tensor in tensors}


def timm_network(task: Task) -> nn.Module:
    """timm's network with the task's weights, the paper's epsilon and TensorFlow's padding of pooling."""
    with torch.device("meta"):
        network = _create_timm()
    weights = {theirs: task.weights[ours].clone() for theirs, ours in timm_names().items()}
    network.load_state_dict(weights, assign=True)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    _pad_pools(network, task.images[:1])
    return network.train(task.training)


def _create_timm() -> nn.Module:
    import timm

    network: nn.Module = timm.create_model("legacy_xception", num_classes=CLASSES)
    return network


def _pad_pools(network: nn.Module, image: Tensor) -> None:
    """Pads as TensorFlow does: after an even size only, which is PyTorch's rounding up, on both sides of an odd one."""

    def pad(pool: nn.MaxPool2d, inputs: tuple[Tensor, ...]) -> None:
        pool.padding, pool.ceil_mode = inputs[0].shape[-1] % 2, True

    hooks = [m.register_forward_pre_hook(pad) for m in network.modules() if isinstance(m, nn.MaxPool2d)]
    with torch.no_grad():
        network.eval()(image)
    for hook in hooks:
        hook.remove()


class OnnxRuntime:
    """ONNX Runtime on the CPU, from torch's exporter."""

    def __init__(self, task: Task) -> None:
        runtime = import_module("onnxruntime")
        self.images = task.images.numpy()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "xception.onnx"
            torch.onnx.export(task.network(), (task.images,), path, input_names=["images"], dynamo=True, verbose=False)
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def outcome(self) -> Outcome:
        return {"logits": torch.from_numpy(self._logits())}

    def turn(self, steps: int) -> None:
        for _ in range(steps):
            self._logits()

    def _logits(self) -> Any:
        return self.session.run(None, {"images": self.images})[0]


class OpenVino:
    """OpenVINO on the CPU, from the torch network."""

    def __init__(self, task: Task) -> None:
        openvino = import_module("openvino")
        self.images = task.images.numpy()
        model = openvino.convert_model(task.network(), example_input=task.images, input=list(task.images.shape))
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled = openvino.Core().compile_model(model, "CPU", settings)

    def outcome(self) -> Outcome:
        return {"logits": torch.from_numpy(self.compiled(self.images)[0].copy())}

    def turn(self, steps: int) -> None:
        for _ in range(steps):
            self.compiled(self.images)
