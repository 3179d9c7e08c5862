"""What each layer of Xception moves and multiplies: a model in code, from shapes alone, of how fast a machine could go.

`layers` lists every layer with the elements that it reads and writes an image; `kernels` says how often each way of
computing passes over them. Nothing runs; a test compares with hooks on the real network.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from xception_pl.nets.convs import SegmentedConv2d
from xception_pl.nets.xception import Block, Stem, Xception

Kind = Literal["first", "spatial", "pointwise", "norm", "relu", "entry relu", "pool", "add", "mean", "linear"]
Way = Literal["eager", "compiled", "fused", "ideal"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer, its numbers for one image.

    Args:
        name: The module's, as `named_modules` gives it; functions have the block's name and what they do.
        kind: `first` is the convolution that reads the image, `spatial` any other wider than 1 × 1, `entry relu` the
            one before a block, whose input the shortcut reads too.
        inputs: Elements of the input; of one of the two, for an addition.
        outputs: Elements of the output.
        weights: Trainable numbers.
        macs: Multiply-accumulates of convolutions and linear layers, else 0.
    """

    name: str
    kind: Kind
    inputs: int
    outputs: int
    weights: int = 0
    macs: int = 0


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One pass over memory: elements read and written an image, those of weights a batch, and its arithmetic.

    `index_bytes` are those of max pooling's index tensor, whatever the precision.
    """

    name: str
    elements: int
    weights: int = 0
    macs: int = 0
    index_bytes: int = 0

    def bytes(self, element_bytes: int, batch: int) -> float:
        """Bytes moved an image, in batches of `batch`."""
        return self.elements * element_bytes + self.index_bytes + self.weights * element_bytes / batch


def layers(network: Xception, size: int) -> list[Layer]:
    """The layers that an image of `size` × `size` pixels passes, in order."""
    found: list[Layer] = []
    for name, block in network.named_children():
        if isinstance(block, Stem):
            size = _stem(found, name, block, size)
        elif isinstance(block, Block):
            size = _block(found, name, block, size)
    features = network.num_features * size**2
    found.append(Layer(name="relu", kind="relu", inputs=features, outputs=features))
    found.append(Layer(name="mean", kind="mean", inputs=features, outputs=network.num_features))
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            units, inputs = layer.out_features, layer.in_features
            found.append(
                Layer(
                    name=name,
                    kind="linear",
                    inputs=inputs,
                    outputs=units,
                    weights=(inputs + 1) * units,
                    macs=inputs * units,
                )
            )
            if name != "fc":
                found.append(Layer(name=f"{name}.relu", kind="relu", inputs=units, outputs=units))
    return found


def _stem(found: list[Layer], name: str, stem: Stem, size: int) -> int:
    kinds: tuple[Kind, Kind] = ("first", "spatial")
    for i, kind in enumerate(kinds, start=1):
        size = _conv(found, f"{name}.conv{i}", stem.get_submodule(f"conv{i}"), kind, size)
        _norm(found, f"{name}.bn{i}", stem.get_submodule(f"bn{i}"), size)
        found.append(Layer(name=f"{name}.relu{i}", kind="relu", inputs=found[-1].outputs, outputs=found[-1].outputs))
    return size


def _block(found: list[Layer], name: str, block: Block, size: int) -> int:
    before = size
    for i in range(1, block.depth + 1):
        conv = block.get_submodule(f"sepconv{i}")
        assert isinstance(conv, SegmentedConv2d)
        elements = conv.depthwise.in_channels * size**2
        if i > 1 or block.relu_first:
            kind: Kind = "relu" if i > 1 else "entry relu"
            found.append(Layer(name=f"{name}.relu{i}", kind=kind, inputs=elements, outputs=elements))
        size = _conv(found, f"{name}.sepconv{i}.depthwise", conv.depthwise, "spatial", size)
        if not isinstance(conv.activation, nn.Identity):
            found.append(Layer(name=f"{name}.sepconv{i}.activation", kind="relu", inputs=elements, outputs=elements))
        size = _conv(found, f"{name}.sepconv{i}.pointwise", conv.pointwise, "pointwise", size)
        _norm(found, f"{name}.bn{i}", block.get_submodule(f"bn{i}"), size)
    if block.pool_stride is not None:
        channels = found[-1].outputs // size**2
        after = -(-size // block.pool_stride)
        found.append(Layer(name=f"{name}.pool", kind="pool", inputs=channels * size**2, outputs=channels * after**2))
        size = after
    outputs = found[-1].outputs
    if block.shortcut is not None:
        _conv(found, f"{name}.shortcut", block.shortcut, "pointwise", before)
        _norm(found, f"{name}.shortcut_bn", block.shortcut_bn, size)
    if block.has_shortcut:
        found.append(Layer(name=f"{name}.add", kind="add", inputs=outputs, outputs=outputs))
    return size


def _conv(found: list[Layer], name: str, conv: nn.Module, kind: Kind, size: int) -> int:
    """Appends a convolution; returns the size of its output."""
    assert isinstance(conv, nn.Conv2d)
    stride, padding = conv.stride[0], conv.padding[0]
    assert isinstance(padding, int)
    after = (size + 2 * padding - conv.dilation[0] * (conv.kernel_size[0] - 1) - 1) // stride + 1
    # A 1 × 1 of stride 2 reads a quarter of the pixels.
    read = after if conv.kernel_size == (1, 1) else size
    outputs = conv.out_channels * after**2
    found.append(
        Layer(
            name=name,
            kind=kind,
            inputs=conv.in_channels * read**2,
            outputs=outputs,
            weights=conv.weight.numel(),
            macs=outputs * conv.weight[0].numel(),
        )
    )
    return after


def _norm(found: list[Layer], name: str, norm: nn.Module, size: int) -> None:
    assert isinstance(norm, nn.BatchNorm2d)
    elements = norm.num_features * size**2
    found.append(Layer(name=name, kind="norm", inputs=elements, outputs=elements, weights=2 * norm.num_features))


_Passes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Passes over a layer's input and its output: forward, gradient of the input, gradient of the weights."""
_CONV: _Passes = ((1, 1), (1, 1), (1, 1))
_NONE: _Passes = ((0, 0), (0, 0), (0, 0))
_EAGER: dict[Kind, _Passes] = {
    "first": ((1, 1), (0, 0), (1, 1)),
    "spatial": _CONV,
    "pointwise": _CONV,
    "linear": _CONV,
    "norm": ((2, 1), (3, 2), (0, 0)),  # statistics, then apply; two reductions, then the gradient
    "relu": ((1, 1), (1, 2), (0, 0)),
    "entry relu": ((1, 1), (1, 2), (0, 0)),
    "pool": ((1, 1), (2, 1), (0, 0)),  # backward zeros the gradient before it adds to it
    "add": ((2, 1), (2, 1), (0, 0)),  # backward adds the gradients of the two branches
    "mean": ((1, 1), (1, 1), (0, 0)),
}
_FUSED: dict[Kind, _Passes] = {
    "first": ((1, 1), (0, 0), (1, 2)),
    "spatial": ((1, 1), (2, 1), (0, 0)),  # both gradients, the mask and the norm's reductions in one kernel
    "pointwise": ((1, 1), (1, 2), (1, 2)),  # each gradient reads the output again, for the norm's backward
    "linear": _CONV,
    "norm": _NONE,
    "relu": _NONE,
    "entry relu": _NONE,
    "pool": ((1, 0), (2, 0), (0, 0)),  # its output goes straight into the addition
    "add": ((1, 1), (2, 1), (0, 0)),
    "mean": ((1, 1), (1, 1), (0, 0)),
}
_TRAINING: dict[Way, dict[Kind, _Passes]] = {
    "eager": _EAGER,
    "compiled": _EAGER | {"relu": _NONE, "entry relu": ((0, 1), (1, 0), (0, 0)), "pool": ((1, 1), (1, 1), (0, 0))},
    "fused": _FUSED,
    "ideal": _FUSED | {"spatial": ((1, 0), (2, 0), (1, 0)), "pointwise": ((0, 1), (0, 2), (0, 2))},
}
_INFERENCE: dict[Way, dict[Kind, tuple[int, int]]] = {
    "eager": {kind: passes[0] for kind, passes in _EAGER.items()} | {"norm": (1, 1)},
    "compiled": {kind: passes[0] for kind, passes in _TRAINING["compiled"].items()} | {"norm": (1, 1)},
    "fused": {kind: passes[0] for kind, passes in _FUSED.items()},
    "ideal": {kind: passes[0] for kind, passes in _TRAINING["ideal"].items()},
}
_INDEXED = ("eager", "compiled")  # max pooling keeps where each maximum was
_SGD = 5  # passes over the parameters: read value, gradient and momentum, write value and momentum


def kernels(network: Xception, size: int, way: Way, *, training: bool) -> list[Kernel]:
    """The passes over memory of one way to compute the network, with nothing kept in a cache from one to the next.

    A separable convolution with its norm and its ReLU passes over a feature map, forward and backward:

    - `eager`, each layer by itself: 9 + 16 times in training, 8 in inference;
    - `compiled`, ReLU joined to the norm or the addition before it: 7 + 13, and 6;
    - `fused`: 4 + 9. Norm and ReLU are applied where they are read, statistics taken where they are written, masks made
      again. In inference the norms are folded into the convolutions: 4;
    - `ideal`, the whole separable convolution in one kernel each way: 2 + 7, and 2.

    Args:
        network: What is computed.
        size: Pixels of the image's side.
        way: How.
        training: Forward, backward and an SGD step with momentum; else the forward pass alone.
    """
    found = []
    for layer in layers(network, size):
        passes = _TRAINING[way][layer.kind] if training else (_INFERENCE[way][layer.kind],)
        for what, (over_input, over_output) in zip(("", " dx", " dw"), passes, strict=False):
            elements = over_input * layer.inputs + over_output * layer.outputs
            # The fused spatial kernel computes both gradients in one pass.
            both = layer.kind == "spatial" and training and way == "fused" and what == " dx"
            if elements:
                found.append(
                    Kernel(
                        name=layer.name + what,
                        elements=elements,
                        weights=layer.weights * (1 + both),
                        macs=layer.macs * (1 + both),
                        index_bytes=8 * layer.outputs if layer.kind == "pool" and training and way in _INDEXED else 0,
                    )
                )
    if training:
        weights = sum(parameter.numel() for parameter in network.parameters())
        found.append(Kernel(name="optimiser", elements=0, weights=_SGD * weights))
    return found


def seconds(found: Iterable[Kernel], *, element_bytes: int, batch: int, bandwidth: float, rate: float) -> float:
    """The least seconds an image: each kernel as slow as the slower of its bytes and its arithmetic.

    Args:
        found: From `kernels`.
        element_bytes: 4 for float32, 2 for bfloat16 and float16.
        batch: Images a batch, over which the weights' traffic is spread.
        bandwidth: Bytes a second.
        rate: Floating-point operations a second; a multiply-accumulate is two.
    """
    return sum(max(k.bytes(element_bytes, batch) / bandwidth, 2 * k.macs / rate) for k in found)
