"""ONNX, with batch, height and width left open."""

import json
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from xception_pl.nets.xception import Xception
from xception_pl.weights.described import describe_use
from xception_pl.weights.stored import needs

OPSET = 18


def write_onnx(network: Xception, path: Path) -> None:
    """Writes `images` (B, C, H, W) in [-1, 1] to `logits` (B, num_classes).

    The file's metadata has the class names, the preprocessing and the loss. PyTorch's exporter folds batch norm by itself.

    Raises:
        WeightsError: onnx or onnxscript is not installed.
    """
    needs("onnx", "onnxscript")
    size, channels = network.preprocessing.image_size, network.block1.conv1.in_channels
    assert isinstance(channels, int)
    images = torch.zeros(2, channels, size, size)
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: Dim("batch"), 2: Dim("height", min=71), 3: Dim("width", min=71)},),
                verbose=False,
            )
    finally:
        noisy.setLevel(level)
    assert program is not None
    program.model.metadata_props.update({name: json.dumps(value) for name, value in describe_use(network).items()})
    program.save(path)


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """The file's network in ONNX Runtime on the CPU.

    Raises:
        WeightsError: onnxruntime is not installed.
    """
    needs("onnxruntime")
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
