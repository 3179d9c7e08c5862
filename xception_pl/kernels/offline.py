"""What the compiler makes of the fused kernels for a GPU that need not be there: registers, spills, shared memory.

A training step runs on shapes alone, its launches are recorded instead of made, and each different one is compiled as
Triton would compile it on the card. The tensors that the launches name are also the bytes that they move at least.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from xception_pl.kernels import gpu, parts
from xception_pl.nets.xception import Xception

OPTIONS = ("num_warps", "num_stages")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LIBRARY = ("convolution", "convolution_backward")
"""Launches of the stem's convolutions, which are cuDNN's: counted, not compiled."""


@dataclass
class Launch:
    """One kernel of a step: its arguments by name, its options, how many programs, and the bytes of its tensors."""

    name: str
    arguments: dict[str, Any]
    options: dict[str, int]
    programs: int
    bytes: int
    kernel: JITFunction | None = None

    @property
    def flags(self) -> str:
        """The compile-time choices that are no sizes, such as NORM or STRIDE=2."""
        said = []
        for name, value in self.arguments.items():
            if name.isupper() and value not in (False, 0, 1, "ieee") and name not in SIZES:
                if name in ("ALIGN", "STAGES"):
                    continue
                said.append(name if value is True else f"{name}={value}")
        return " ".join(said)

    @property
    def tile(self) -> str:
        """Its tile, such as 4×128, warps and stages."""
        sizes = "×".join(str(self.arguments[name]) for name in SIZES if name in self.arguments)
        stages = self.options.get("num_stages", self.arguments.get("STAGES", 1))
        return f"{sizes}, {self.options.get('num_warps', 4)} warps, {stages} stages"

    @property
    def shape(self) -> str:
        """The channels that it is for."""
        if "k_channels" in self.arguments:
            return f"{self.arguments['k_channels']}x{self.arguments['n_channels']}"
        return str(self.arguments.get("channels", ""))


SIZES = ("ROWS", "COLUMNS", "CHANNELS", "M", "N", "K", "PARTS")


@dataclass
class Report:
    """What the compiler says of one kernel; `spilled` are bytes a thread that did not fit into registers."""

    registers: int
    spilled: int
    shared: int
    products: int
    """Warp-group matrix instructions (HGMMA); 0 in a matrix product means a slower path."""
    wide: int
    """Bytes of its widest access to memory."""


@dataclass
class Step:
    """The launches of a training step, forward and backward."""

    images: int
    launches: list[Launch] = field(default_factory=list)

    @property
    def bytes_an_image(self) -> float:
        """Moved at least, an image: each tensor of each launch once."""
        return sum(launch.bytes for launch in self.launches) / self.images


def record(images: int = 256, size: int = 299, dtype: torch.dtype = torch.bfloat16) -> Step:
    """The launches of a step of the paper's network, without any memory or GPU."""
    step = Step(images)
    with _recording(step), torch.device("meta"):
        network = Xception(num_classes=0).train()
        gpu.fuse(network)
        features = network.forward_features(torch.empty(images, 3, size, size, dtype=dtype))
        features.backward(torch.empty_like(features))
    return step


@contextmanager
def _recording(step: Step) -> Iterator[None]:
    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        names = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: given.pop(name) for name in OPTIONS if name in given}
        arguments = {name: (names | given)[name] for name in kernel.arg_names}
        programs = 1
        for size in grid:
            programs *= size
        tensors = [(name, value) for name, value in arguments.items() if isinstance(value, Tensor)]
        stride = arguments.get("STRIDE", 1)
        step.launches.append(
            Launch(
                kernel.fn.__name__.removesuffix("_kernel"),
                arguments,
                options,
                programs,
                _bytes(tensors, stride),
                kernel,
            )
        )

    def convolve(x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
        y = original(x, conv)
        step.launches.append(Launch(LIBRARY[0], {}, {}, 0, _bytes([("x", x), ("y", y)])))
        return y

    def convolve_backward(dy: Tensor, x: Tensor, conv: torch.nn.Conv2d, grads: dict[Tensor, Tensor]) -> Tensor:
        dx = original_backward(dy, x, conv, grads)
        used = [("dy", dy), ("x", x), ("dy again", dy), *([("dx", dx)] if x.shape[-1] > 3 else [])]
        step.launches.append(Launch(LIBRARY[1], {}, {}, 0, sum(_bytes([one]) for one in used)))
        return dx

    original, original_backward = parts._convolve, parts._convolve_backward
    with (
        patch.object(JITFunction, "run", run),
        patch.object(parts, "_convolve", convolve),
        patch.object(parts, "_convolve_backward", convolve_backward),
    ):
        yield


def _bytes(tensors: list[tuple[str, Tensor]], stride: int = 1) -> int:
    """Of different tensors, each once; a stand-in for an absent one is another's. With a stride `x` is read in part."""
    found: dict[int, int] = {}
    for name, tensor in tensors:
        part = stride * stride if name == "x" else 1
        found.setdefault(tensor.untyped_storage()._cdata, tensor.numel() * tensor.element_size() // part)
    return sum(found.values())


def different(step: Step) -> list[Launch]:
    """The launches that the compiler tells apart, but for the divisibility of sizes; the most bytes first."""
    by: dict[tuple[str, str, str, str], Launch] = {}
    for launch in sorted(step.launches, key=lambda one: -one.bytes):
        if launch.kernel is not None:
            by.setdefault(
                (launch.name, launch.shape if launch.bytes > 1 << 24 else "", launch.flags, launch.tile), launch
            )
    return list(by.values())


def compile_for(launch: Launch, capability: int) -> Report:
    """Compiles a launch as on the card, arguments specialised as Triton does: 1 is a constant, a multiple of 16 a hint."""
    assert launch.kernel is not None
    signature, constants, hints = {}, {}, {}
    compile_time = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    for i, (name, value) in enumerate(launch.arguments.items()):
        if name in compile_time or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    access = r"(?:LDG|STG|LDGSTS)\.E(?:\.BYPASS)?(?:\.LTC128B)?\.(U16|64|128)?"
    widths = {{"U16": 2, "": 4, "64": 8, "128": 16}[width] for width in re.findall(access, code)} or {4}
    return Report(int(found[1]), int(found[2]), made.metadata.shared, code.count("HGMMA"), max(widths))
